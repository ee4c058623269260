"""Running a model that does not fit into memory: one layer at a time, over all samples at once.

Nothing can be generated that way, as each token would read the whole file again. So source and
result are compared over the question's own tokens, of which every position predicts the next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.checkpoint.loading import Examined, examine_checkpoint, network_values, unpacked
from fastvlm_mlx.checkpoint.tensors import TensorRef
from fastvlm_mlx.images import fit_image, to_pixels
from fastvlm_mlx.model import Network, Projector
from fastvlm_mlx.prompt import IMAGE, prompt_ids
from fastvlm_mlx.vision import FastViTHD

from .calibration import Sample
from .streaming import dequantize
from .verification import VERIFY_SIDE, Observed, unscaled_maps

__all__ = ["observe_by_layer"]

_ROWS = 1 << 14
_MODEL = "language_model.model"

Refs = Mapping[str, TensorRef]


def observe_by_layer(
    folder: Path,
    side: int,
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] | None = None,
) -> Observed:
    """Like `verification.observe`, in float32, with the memory of one layer or embedding table."""
    source = examine_checkpoint(folder)
    refs = unpacked(source)
    maps, images = _encode(source, refs, min(side, VERIFY_SIDE), samples)
    hidden: list[mx.array] = []
    tails: list[int] = []
    for sample, tokens in zip(samples, images, strict=True):
        ids = prompt_ids(source.tokenizer, sample.question, 1)
        at = ids.index(IMAGE)
        text = _rows(source, refs, [i for i in ids if i != IMAGE])
        hidden.append(mx.concatenate([text[:at], tokens, text[at:]])[None])
        # At once: each sample reads the whole embedding table.
        mx.eval(hidden)
        tails.append(len(ids) - at - 1)
    # Only its shape is used: unevaluated weights take no memory.
    model = Network(source.config).language_model
    for index, layer in enumerate(model.model.layers):
        if progress:
            progress(index, len(model.model.layers))
        block = type(layer)(model.args)
        prefix = f"{_MODEL}.layers.{index}."
        block.load_weights(
            [(n.removeprefix(prefix), _float(refs, n)) for n in refs if n.startswith(prefix)],
            strict=True,
        )
        hidden = [block(x, "causal", None) for x in hidden]
        mx.eval(hidden)
        del block
    ends = mx.concatenate([x[0, -tail:] for x, tail in zip(hidden, tails, strict=True)])
    normed = mx.fast.rms_norm(ends, _float(refs, f"{_MODEL}.norm.weight"), model.args.rms_norm_eps)
    parts = []
    for rows in _head(source, refs):
        parts.append(normed @ rows.T)
        mx.eval(parts)
    logits = mx.concatenate(parts, axis=-1)
    starts = [sum(tails[:n]) for n in range(len(tails))]
    return Observed(maps, [logits[s : s + t] for s, t in zip(starts, tails, strict=True)], [])


def _encode(
    source: Examined, refs: Refs, side: int, samples: Sequence[Sample]
) -> tuple[list[dict[str, mx.array]], list[mx.array]]:
    """Maps per picture, and image tokens per sample."""
    config = source.config
    tower = FastViTHD(config.vision)
    tower.load_weights(
        [
            (name.removeprefix("vision."), array.astype(mx.float32))
            for name, array in network_values(dict(refs), config, source.dialect)
            if name.startswith("vision.")
        ],
        strict=True,
    )
    projector = Projector(config.vision.out_dim, config.text.hidden_size)
    names = [n for n in refs if n.startswith("projector.")]
    projector.load_weights([(n.removeprefix("projector."), _float(refs, n)) for n in names])
    maps: list[dict[str, mx.array]] = []
    tokens: dict[int, mx.array] = {}
    for sample in samples:
        key = id(sample.picture)
        if key not in tokens:
            pixels = to_pixels([fit_image(sample.picture, side)])
            found = unscaled_maps(tower, pixels, config.vision.residual_scales)
            features = found["head"].reshape(1, -1, config.vision.out_dim)
            tokens[key] = found["image tokens"] = projector(features)[0]
            mx.eval(found)
            maps.append(found)
    return maps, [tokens[id(sample.picture)] for sample in samples]


def _rows(source: Examined, refs: Refs, ids: list[int]) -> mx.array:
    name, chosen = f"{_MODEL}.embed_tokens", mx.array(ids)
    how = source.quantized.get(name)
    if how is None:
        return refs[f"{name}.weight"].load()[chosen].astype(mx.float32)
    return dequantize([part[chosen] for part in _packed(source, name)], how)


def _head(source: Examined, refs: Refs) -> Iterator[mx.array]:
    """The output matrix in float32, some rows at a time."""
    tied = source.config.text.tie_word_embeddings
    name = f"{_MODEL}.embed_tokens" if tied else "language_model.lm_head"
    how = source.quantized.get(name)
    parts = [refs[f"{name}.weight"].load()] if how is None else _packed(source, name)
    mx.eval(parts)
    for at in range(0, parts[0].shape[0], _ROWS):
        pieces = [part[at : at + _ROWS] for part in parts]
        yield pieces[0].astype(mx.float32) if how is None else dequantize(pieces, how)


def _packed(source: Examined, name: str) -> list[mx.array]:
    names = (f"{name}.{part}" for part in ("weight", "scales", "biases"))
    return [source.refs[n].load() for n in names if n in source.refs]


def _float(refs: Refs, name: str) -> mx.array:
    return refs[name].load().astype(mx.float32)
