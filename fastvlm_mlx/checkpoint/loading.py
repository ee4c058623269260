"""Checkpoint directory -> `Network`: check everything, then read, fold and cast block by block."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..config import Config, parse_config
from ..errors import CheckpointError
from ..model import Network, flat_parameters
from ..tokenizer import Tokenizer
from .dialects import Dialect, canonical_names, detect
from .fold import fold_vision
from .half import choose_residual_scales
from .layout import expected_tensors
from .quantized import Quantization, Quantizer, dequantized, quantization_of
from .reading import OpenCheckpoint, open_checkpoint
from .reparam import fuse, is_training_form
from .tensors import TensorRef

__all__ = [
    "Examined",
    "LoadedCheckpoint",
    "examine_checkpoint",
    "in_float16_range",
    "load_checkpoint",
    "network_values",
    "unpacked",
    "weight_bytes",
]

Refs = dict[str, TensorRef]
_EMBEDDING = "language_model.model.embed_tokens"
_LM_HEAD = "language_model.lm_head"


@dataclass(frozen=True)
class Examined:
    """A checkpoint whose every name, shape and config value has been checked; nothing is read."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    dialect: Dialect
    training_form: bool
    refs: Mapping[str, TensorRef]
    quantized: Mapping[str, Quantization]
    file_bytes: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A network in memory, and what is known about where it came from."""

    network: Network
    config: Config
    source: Examined


def examine_checkpoint(folder: Path) -> Examined:
    """Open and check a checkpoint directory of any dialect, without allocating for weights.

    Raises CheckpointError, or UnsupportedCheckpoint for what is recognised but cannot be run.
    """
    opened = open_checkpoint(folder)
    dialect = detect(opened.tensors, opened.metadata, str(folder))
    config = parse_config(opened.config, str(folder / "config.json"))
    if dialect is Dialect.FOLDED:
        refs, training = dict(opened.tensors), False
    else:
        refs, training = _canonical(opened, dialect, config)
    config = _with_vocabulary(config, refs)
    tokenizer = Tokenizer.from_directory(folder)
    config = _check_tokenizer(tokenizer, config, folder)
    expected = _expected(config, dialect)
    quantized = quantization_of(refs, expected, config.quantization)
    _check(refs, expected, quantized, folder)
    return Examined(
        folder, config, tokenizer, dialect, training, refs, quantized, opened.bytes, opened.metadata
    )


def load_checkpoint(
    folder: Path,
    *,
    dtype: mx.Dtype,
    vision_dtype: mx.Dtype | None = None,
    keep_quantized: bool = True,
    quantize: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    examined: Callable[[Examined], None] | None = None,
) -> LoadedCheckpoint:
    """Load a checkpoint directory of any dialect.

    Weights become `dtype`, the encoder's `vision_dtype` if that is given; an encoder in float16
    gets residual streams that cannot overflow (`half.py`). Quantized ones stay quantized where
    `keep_quantized` (a tower that has to be folded never does). With `quantize` the language model
    and projector are quantized to that many bits as they are read, so that they are never all in
    memory as floats; without `keep_quantized` the quantized values are kept as floats. `progress`
    is told (tensors done, tensors in all), `examined` what was found before anything is read.
    Raises as `examine_checkpoint`, and CheckpointError for weights that are NaN or infinite.
    """
    source = examine_checkpoint(folder)
    if examined:
        examined(source)
    folded = source.dialect is Dialect.FOLDED
    packed = {
        name: how
        for name, how in source.quantized.items()
        if keep_quantized and (folded or not name.startswith("vision."))
    }
    refs = unpacked(source, packed)
    config = source.config
    vision_dtype = vision_dtype or dtype
    if vision_dtype == mx.float16 and not folded:
        config = in_float16_range(config, refs)
    network = Network(config)
    _quantize_modules(network, packed)
    values = network_values(refs, config, source.dialect)
    finish = Quantizer(network, quantize, keep_quantized) if quantize is not None else None
    _fill(network, values, dtype, vision_dtype, finish, progress)
    network.eval()
    return LoadedCheckpoint(network, config, source)


def weight_bytes(
    source: Examined, dtype: mx.Dtype, vision_dtype: mx.Dtype, quantize: int | None = None
) -> int:
    """Memory that the weights take once loaded, what is quantized kept so; a few percent off."""
    total = 0.0
    for name, ref in source.refs.items():
        count = math.prod(ref.shape)
        if name.startswith("vision."):
            total += count * vision_dtype.size
        elif ref.dtype in ("U32", "U8"):
            total += count * (4 if ref.dtype == "U32" else 1)
        elif quantize is not None and len(ref.shape) == 2:
            total += count * (quantize + 0.5) / 8  # 64 weights share two numbers of 16 bits
        else:
            total += count * dtype.size
    return round(total)


def unpacked(source: Examined, keep: Collection[str] = ()) -> Refs:
    """The source's tensors, quantized modules but those in `keep` as floats, lazily.

    An lm_head beside tied embeddings is left out, with a warning if it differs.
    """
    refs = dequantized(source.refs, {n: q for n, q in source.quantized.items() if n not in keep})
    return refs if source.dialect is Dialect.FOLDED else _apply_tie_policy(refs, source.config)


def _canonical(opened: OpenCheckpoint, dialect: Dialect, config: Config) -> tuple[Refs, bool]:
    names = canonical_names(dialect, opened.tensors, config.vision)
    refs = {name: opened.tensors[source] for name, source in names.items()}
    refs = _in_torch_layout(refs)
    training = is_training_form(refs)
    return (fuse(refs) if training else refs), training


def _in_torch_layout(refs: Refs) -> Refs:
    # Told from a depthwise kernel: the stem's [dim, 3, 3, 3] looks the same in both layouts.
    probes = [n for n in refs if n.startswith("vision.patch_embed.1.") and len(refs[n].shape) == 4]
    if not probes or refs[probes[0]].shape[1:] != (3, 3, 1):
        return refs

    def convert(name: str, ref: TensorRef) -> TensorRef:
        if not name.startswith("vision.") or len(ref.shape) < 3:
            return ref
        order = (0, 3, 1, 2) if len(ref.shape) == 4 else (2, 0, 1)
        shape = tuple(ref.shape[axis] for axis in order)
        return TensorRef(ref.dtype, shape, lambda: ref.load().transpose(*order))

    return {name: convert(name, ref) for name, ref in refs.items()}


def _with_vocabulary(config: Config, refs: Refs) -> Config:
    # The table in the file decides: re-saved checkpoints are trimmed or padded (notes, section 8).
    table = refs.get(f"{_EMBEDDING}.weight")
    if table is None or len(table.shape) != 2:
        return config
    return dataclasses.replace(
        config, text=dataclasses.replace(config.text, vocab_size=table.shape[0])
    )


def _check_tokenizer(tokenizer: Tokenizer, config: Config, folder: Path) -> Config:
    rows = config.text.vocab_size
    if len(tokenizer) > rows or (
        config.eos_token_ids and not config.eos_token_ids & tokenizer.eos_token_ids
    ):
        raise CheckpointError(
            f"The tokenizer in {folder} ({len(tokenizer)} tokens, end of text "
            f"{sorted(tokenizer.eos_token_ids)}) belongs to another model: the embedding table has "
            f"{rows} rows and config.json says that answers end with "
            f"{sorted(config.eos_token_ids)}. Copy the tokenizer files of this checkpoint."
        )
    return dataclasses.replace(config, eos_token_ids=config.eos_token_ids | tokenizer.eos_token_ids)


def _expected(config: Config, dialect: Dialect) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the file must hold, as if nothing were quantized."""
    if dialect is not Dialect.FOLDED:
        return expected_tensors(config)
    return {name: array.shape for name, array in flat_parameters(Network(config))}


def _check(
    refs: Refs,
    expected: Mapping[str, tuple[int, ...]],
    quantized: Mapping[str, Quantization],
    folder: Path,
) -> None:
    parts = {f"{name}.{part}" for name in quantized for part in ("scales", "biases")}
    optional = {f"{_LM_HEAD}.{part}" for part in ("weight", "scales", "biases")}
    missing = [name for name in expected if name not in refs]
    unknown = [name for name in refs if name not in expected and name not in parts | optional]
    wrong = [
        f"{name} {refs[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in refs
        and name.removesuffix(".weight") not in quantized
        and refs[name].shape != shape
    ]
    for found, what in (
        (missing, "missing"),
        (unknown, "unknown"),
        (wrong, "of another shape than config.json says"),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise CheckpointError(
                f"{folder}: {len(found)} tensors are {what}: {', '.join(found[:3])}{more}. "
                "The weights and config.json do not belong together, or a file is incomplete."
            )


def _apply_tie_policy(refs: Refs, config: Config) -> Refs:
    """Ignore an lm_head beside tied embeddings, as the reference does; aloud if it differs."""
    if not config.text.tie_word_embeddings:
        return refs
    head, table = refs.get(f"{_LM_HEAD}.weight"), refs[f"{_EMBEDDING}.weight"]
    if head is not None and (
        head.shape != table.shape or not mx.array_equal(head.load(), table.load()).item()
    ):
        warnings.warn(
            "The checkpoint ties its embeddings but stores another lm_head.weight; it is ignored, "
            "as the reference implementation does.",
            stacklevel=2,
        )
    return {name: ref for name, ref in refs.items() if not name.startswith(f"{_LM_HEAD}.")}


def _quantize_modules(network: Network, quantized: Mapping[str, Quantization]) -> None:
    if quantized:
        nn.quantize(
            network,
            class_predicate=lambda path, _: (
                dataclasses.asdict(quantized[path]) if path in quantized else False
            ),
        )


def in_float16_range(config: Config, refs: Refs) -> Config:
    """The config with residual scales under which the unfolded tower in `refs` fits float16."""
    scales = choose_residual_scales(config.vision, _float32(refs))
    return dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, residual_scales=scales)
    )


def _float32(refs: Refs) -> Callable[[str], mx.array]:
    return lambda name: refs[name].load().astype(mx.float32)


def network_values(refs: Refs, config: Config, dialect: Dialect) -> Iterator[tuple[str, mx.array]]:
    """Yield (name in the network, array), the tower folded in float32."""
    if dialect is not Dialect.FOLDED:
        yield from (
            (f"vision.{name}", array) for name, array in fold_vision(config.vision, _float32(refs))
        )
    for name, ref in refs.items():
        if dialect is Dialect.FOLDED or not name.startswith("vision."):
            yield name, ref.load()


_BATCH_BYTES = 64 << 20


def _fill(
    network: Network,
    arrays: Iterator[tuple[str, mx.array]],
    dtype: mx.Dtype,
    vision_dtype: mx.Dtype,
    finish: Quantizer | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Cast, finish, evaluate and hand over in batches, so that sources are freed as we go."""
    total = len(flat_parameters(network))
    # On the CPU reading and casting overlap on two streams; both touch fresh memory, which is slow.
    on_cpu = mx.default_device() == mx.cpu
    stream = mx.new_stream(mx.cpu) if on_cpu else mx.default_stream(mx.default_device())
    loaded: list[tuple[str, mx.array]] = []
    batch: list[tuple[str, mx.array]] = []
    sums: list[tuple[str, mx.array]] = []
    size = 0
    for name, array in arrays:
        # Integers are packed quantized weights; they have no other type.
        if mx.issubdtype(array.dtype, mx.floating):
            target = vision_dtype if name.startswith("vision.") else dtype
            array = array.astype(target, stream=stream)
            sums.append((name, _sum(array)))
        batch += finish(name, array) if finish else [(name, array)]
        size += array.nbytes
        del array
        if size >= _BATCH_BYTES:
            _evaluate(batch, sums)
            loaded += batch
            batch, sums, size = [], [], 0
            if progress:
                progress(len(loaded), total)
    _evaluate(batch, sums)
    network.load_weights(loaded + batch, strict=True)
    if progress:
        progress(total, total)


def _sum(array: mx.array) -> mx.array:
    """NaN and infinity survive a sum; in float32 finite weights cannot overflow it."""
    if array.nbytes <= _BATCH_BYTES:
        return array.astype(mx.float32).sum()
    # A table of 150,000 tokens: its float32 copy would be larger than all that is beside it.
    total = mx.zeros(())
    rows = max(1, _BATCH_BYTES // (4 * math.prod(array.shape[1:])))
    for at in range(0, array.shape[0], rows):
        total += array[at : at + rows].astype(mx.float32).sum()
        mx.eval(total)
    return total


def _evaluate(batch: list[tuple[str, mx.array]], sums: list[tuple[str, mx.array]]) -> None:
    mx.eval([a for _, a in batch], [s for _, s in sums])
    for name, total in sums:
        if not abs(total.item()) < float("inf"):
            raise CheckpointError(
                f"{name} holds NaN or infinite values; the checkpoint is damaged, or its values do "
                "not fit the dtype asked for."
            )
