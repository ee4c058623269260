"""Does the result still say what the source says? Both run on the same pictures and questions.

The source answers each question greedily; the result then reads the same prompt and the same
answer. So all positions are compared like with like, and the first position at which the result
would have chosen another token is where its own greedy answer would have left the source's.
One model is in memory at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

import fastvlm_mlx as fv
from fastvlm_mlx.config import Config
from fastvlm_mlx.images import fit_image, to_pixels
from fastvlm_mlx.memory import available_memory
from fastvlm_mlx.model import parameter_counts
from fastvlm_mlx.vision import FastViTHD

from .calibration import Sample

__all__ = [
    "VERIFY_SIDE",
    "Observed",
    "Thresholds",
    "Verification",
    "kl_divergence",
    "memory_shortage",
    "observe",
    "unscaled_maps",
    "verify",
]

VERIFY_SIDE = 512
"""Pictures are fitted to this side, if the model's own is larger: a quarter of the time."""
_ANSWER = 12


@dataclass(frozen=True)
class Thresholds:
    """Where a result is broken, which is far from where it is good.

    Whether the weights are right is `stored.py`'s question, answered for each of them. What is left
    for these is a model that does not work although they are: values that overflow when it runs, or
    quantization so coarse that the answers have nothing to do with the source's.
    """

    features: float
    """Relative error of the tower's features."""
    kl: float
    """Mean KL divergence of the next-token distributions, in nats; or, if `relative`, as a share of
    what unrelated answers would have."""
    relative: bool = False

    @classmethod
    def for_bits(cls, text: int, vision: int) -> "Thresholds":
        """For the fewest bits in the language model and projector, and in the tower."""
        coarse = min(text, vision)
        features = next(limit for bits, limit in _FEATURES if vision >= bits)
        kl = next(limit for bits, limit in _KL if coarse >= bits)
        return cls(features, kl, relative=coarse < 16)


# (Bits, limit). float16 towers are measured at 1e-3, bfloat16 at 2e-2; features of zeros would be
# off by 1. KL of a 16-bit model is measured below 0.01; quantized, half the way to unrelated.
_FEATURES = ((32, 1e-4), (16, 0.05), (0, 0.5))
_KL = ((32, 1e-5), (16, 0.05), (0, 0.5))


@dataclass(frozen=True)
class Observed:
    """What one model does with the samples."""

    maps: list[dict[str, mx.array]]
    """Per picture: stage -> map, as float32 without residual scales."""
    logits: list[mx.array]
    """Per sample: (positions, vocab) from the end of the prompt to the end of the answer."""
    answers: list[tuple[int, ...]]
    """What the source said; empty if it was only made to read (`layered.py`)."""


@dataclass(frozen=True)
class Verification:
    """The comparison, as it goes into conversion.json."""

    samples: int
    positions: int
    feature_error: dict[str, float]
    """Stage -> root mean square of the difference over that of the source."""
    kl_mean: float
    kl_max: float
    kl_unrelated: float
    """Of the source's distributions moved to other tokens: as sure, and of something else."""
    top1_agreement: float
    tokens_until_divergence: list[int]
    """Per sample: tokens of the greedy answer that agree from its beginning; empty if none was
    given."""
    answer_tokens: list[int]
    thresholds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every threshold was kept."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For conversion.json."""
        return {"passed": self.passed, **asdict(self)}


def memory_shortage(config: Config, dtype: mx.Dtype | None = None) -> str | None:
    """Why a model cannot be run here for want of memory, or None; by default as `load` loads it."""
    on_gpu = mx.default_device() == mx.gpu
    width = (dtype or (mx.bfloat16 if on_gpu else mx.float32)).size
    needed = sum(parameter_counts(config).values()) * width * 1.25 + 1e9
    available = available_memory()
    if available is None or needed <= available:
        return None
    return (
        f"running the model takes about {needed / 1e9:.0f} GB of memory, "
        f"{available / 1e9:.0f} GB are free"
    )


def observe(
    folder: Path,
    side: int,
    samples: Sequence[Sample],
    answers: Sequence[tuple[int, ...]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Observed:
    """Run a checkpoint on the samples; `answers` are read instead of given, if there are any."""
    side = min(side, VERIFY_SIDE)
    vlm = fv.load(folder, image_size=side, feature_cache=None)
    scales = vlm.config.vision.residual_scales
    encoded: dict[int, fv.EncodedImage] = {}
    maps: list[dict[str, mx.array]] = []
    logits: list[mx.array] = []
    given: list[tuple[int, ...]] = []
    for n, sample in enumerate(samples):
        if progress:
            progress(n, len(samples))
        key = id(sample.picture)
        if key not in encoded:
            found = unscaled_maps(vlm.vision, to_pixels([fit_image(sample.picture, side)]), scales)
            encoded[key] = vlm.encode(sample.picture)
            found["image tokens"] = encoded[key].tokens.astype(mx.float32)
            mx.eval(found)
            maps.append(found)
        image = encoded[key]
        if answers is None:
            given.append(vlm.ask(image, sample.question, max_tokens=_ANSWER).tokens)
        else:
            given.append(answers[n])
        ids = vlm.prompt_ids(sample.question) + list(given[-1])
        rows = vlm.logits(ids, [image])[0, -len(given[-1]) - 1 :].astype(mx.float32)
        mx.eval(rows)
        logits.append(rows)
    return Observed(maps, logits, given)


def unscaled_maps(
    tower: FastViTHD, pixels: mx.array, scales: Sequence[float]
) -> dict[str, mx.array]:
    """The tower's maps in float32, without the powers of two that keep float16 in range."""
    found = {stage: m.astype(mx.float32) for stage, m in tower.feature_maps(pixels).items()}
    for index, scale in enumerate(scales, start=1):
        found[f"stage{index}"] = found[f"stage{index}"] / scale
    return found


def verify(expected: Observed, found: Observed, thresholds: Thresholds) -> Verification:
    """Compare what two models did with the same samples."""
    errors = {
        stage: max(
            _relative(theirs[stage], ours[stage])
            for theirs, ours in zip(expected.maps, found.maps, strict=True)
        )
        for stage in expected.maps[0]
    }
    kls, agreements, until = [], [], []
    for theirs, ours in zip(expected.logits, found.logits, strict=True):
        kls += _numbers(kl_divergence(theirs, ours))
        same = _numbers(theirs.argmax(-1) == ours.argmax(-1))
        agreements += same
        until.append(next((n for n, s in enumerate(same) if not s), len(same)))
    mean, unrelated = sum(kls) / len(kls), _unrelated(expected.logits)
    kl_limit = thresholds.kl * (unrelated if thresholds.relative else 1)
    failures = []
    for value, limit, what in (
        (errors["head"], thresholds.features, "relative error of the image features"),
        (mean, kl_limit, "mean KL divergence"),
    ):
        if not value <= limit:  # NaN fails
            failures.append(f"{what} is {value:.3g}, more than {limit:.3g}")
    answered = bool(expected.answers)
    return Verification(
        samples=len(until),
        positions=len(kls),
        feature_error=errors,
        kl_mean=mean,
        kl_max=max(kls),
        kl_unrelated=unrelated,
        top1_agreement=sum(agreements) / len(agreements),
        tokens_until_divergence=until if answered else [],
        answer_tokens=[len(a) for a in expected.logits] if answered else [],
        thresholds={"features": thresholds.features, "kl": kl_limit},
        failures=failures,
    )


def _unrelated(logits: Sequence[mx.array]) -> float:
    """Mean KL divergence from distributions of the same shape over other tokens."""
    values: list[float] = []
    for rows in logits:
        half = rows.shape[-1] // 2
        other = mx.concatenate([rows[:, half:], rows[:, :half]], axis=-1)
        values += _numbers(kl_divergence(rows, other))
    return sum(values) / len(values)


def kl_divergence(expected: mx.array, found: mx.array) -> mx.array:
    """KL(expected || found) per row of float32 logits, in nats."""
    p = expected - mx.logsumexp(expected, axis=-1, keepdims=True)
    q = found - mx.logsumexp(found, axis=-1, keepdims=True)
    # Rounding may leave a tiny negative number where the two are equal.
    return mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)


def _relative(expected: mx.array, found: mx.array) -> float:
    ratio: Any = mx.sqrt((found - expected).square().mean() / expected.square().mean()).item()
    return float(ratio)


def _numbers(array: mx.array) -> list[float]:
    values: Any = array.astype(mx.float32).tolist()
    return list(values)
