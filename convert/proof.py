"""What shows that a conversion is right: four checks, each for what the others cannot see.

1. `stored`: every weight in the files is the source's, as near as its format allows (`stored.py`).
2. `fold`: the folded tower computes what the published one does (`published.py`).
3. Source and result answer the same questions about the same pictures (`verification.py`; layer
   by layer in `layered.py` where the model does not fit into memory).
4. For the built-in nano, whose questions have right answers: how many are right (`accuracy.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.checkpoint.dialects import Dialect
from fastvlm_mlx.checkpoint.loading import Examined, unpacked
from fastvlm_mlx.images import fit_image, to_pixels

from .accuracy import compare_accuracy, is_nano
from .calibration import samples
from .layered import observe_by_layer
from .options import Options, Progress, Say
from .plan import Plan
from .published import FOLD_LIMIT, fold_error
from .stored import check_stored
from .streaming import small_cache
from .verification import Thresholds, memory_shortage, observe, verify

__all__ = ["prove", "summary"]

_FOLD_SIDE = 256


def prove(
    source: Examined, folder: Path, plan: Plan, options: Options, say: Say, progress: Progress
) -> dict[str, Any]:
    """`verification` of conversion.json for the result in `folder`."""
    if not options.verify:
        return {"run": False, "reason": "switched off"}

    def tell(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total)

    with small_cache():
        stored = check_stored(source, folder, plan, tell("checking"))
        progress("checking the fold", 0, 1)
        fold = _fold(source, options)
    chosen = samples(options.samples, options.seed)
    side = source.config.vision.image_size
    names = "running the source", "running the result"
    shortage = memory_shortage(source.config)
    if shortage:
        say(f"{shortage}: verifying layer by layer, without answers")
        with small_cache():
            expected = observe_by_layer(source.folder, side, chosen, tell(names[0]))
            found = observe_by_layer(folder, side, chosen, tell(names[1]))
    else:
        expected = observe(source.folder, side, chosen, progress=tell(names[0]))
        found = observe(folder, side, chosen, expected.answers, tell(names[1]))
    compared = verify(expected, found, Thresholds.for_bits(*_coarsest(plan)))
    failures = [*_first(stored.failures), *_fold_failures(fold), *compared.failures]
    return {
        "run": True,
        "passed": not failures,
        "failures": failures,
        "stored": asdict(stored),
        "fold": fold,
        "by_layer": shortage,
        **{k: v for k, v in asdict(compared).items() if k != "failures"},
        "accuracy": (
            compare_accuracy(source.folder, folder, tell("asking nano"))
            if is_nano(source.folder)
            else None
        ),
    }


def _fold(source: Examined, options: Options) -> dict[str, Any]:
    if source.dialect is Dialect.FOLDED:
        return {"run": False, "reason": "the source's tower is folded already"}
    refs = unpacked(source)
    side = min(_FOLD_SIDE, source.config.vision.image_size)
    picture = samples(1, options.seed)[0].picture
    # On the CPU: GPUs may round the factors of float32 products to 11 bits.
    with mx.stream(mx.cpu):
        error = fold_error(
            source.config.vision,
            lambda name: refs[name].load().astype(mx.float32),
            to_pixels([fit_image(picture, side)]),
        )
    return {"run": True, "side": side, "error": error, "limit": FOLD_LIMIT}


def _fold_failures(fold: Mapping[str, Any]) -> list[str]:
    if not fold["run"] or fold["error"] <= fold["limit"]:
        return []
    return [
        f"the folded tower's features are off by {fold['error']:.3g} of the largest, more than "
        f"{fold['limit']:.3g}"
    ]


def _first(failures: list[str]) -> list[str]:
    more = [f"and {len(failures) - 3} more tensors"] if len(failures) > 3 else []
    return failures[:3] + more


def _coarsest(plan: Plan) -> tuple[int, int]:
    """Fewest bits in the language model and projector, and in the tower."""

    def least(vision: bool) -> int:
        packed = [h.bits for m, h in plan.quantization.items() if m.startswith("vision.") == vision]
        kinds = [t.dtype for n, t in plan.tensors.items() if n.startswith("vision.") == vision]
        return min([*packed, 16 if {"F16", "BF16"} & set(kinds) else 32])

    return least(False), least(True)


def summary(verification: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal."""
    if not verification["run"]:
        return [f"not verified: {verification['reason']}"]
    stored = verification["stored"]
    until, tokens = verification["tokens_until_divergence"], verification["answer_tokens"]
    said = f"answers agree for {sum(until)} of {sum(tokens)} tokens"
    lines = [
        f"every one of {stored['weights'] / 1e6:.1f} million weights is where rounding puts it",
        f"features {verification['feature_error']['head']:.2%} off, "
        f"KL {verification['kl_mean']:.4f} nats (unrelated: {verification['kl_unrelated']:.1f}), "
        f"top-1 agreement {verification['top1_agreement']:.0%}, "
        + (said if tokens else "no answers given (one layer in memory at a time)"),
    ]
    accuracy = verification["accuracy"]
    if accuracy:
        lines.append(
            f"accuracy {accuracy['result']['all']:.1%} (source {accuracy['source']['all']:.1%}) "
            f"of {accuracy['questions']} held-out questions"
        )
    return lines
