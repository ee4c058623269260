"""Checkpoints with random weights in every published file layout, for tests and benchmarks.

They have the names, shapes, dtypes and files of the genuine ones (checkpoint notes, sections 1 to
4), so whatever loads them loads those; what such a model says is noise.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .config import SIDE_MULTIPLE, Config
from .errors import CheckpointError, OptionError
from .testing_files import SIZES, metadata_files, model_config, vocabulary_of
from .testing_names import DIALECTS, Planned, plan

__all__ = ["DIALECTS", "SIZES", "random_checkpoint"]

Progress = Callable[[int, int], None]
Floats = NDArray[np.float32]

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U32": 4}
_SHARD_BYTES = 5_000_000_000

# Matrices above _DRAWN elements read a ring of numbers of prime length round and round: no two
# rows of a matrix are then the same window, and 8e9 weights take seconds instead of minutes.
_DRAWN = 1 << 17
_RING = 4_194_301
_CHUNK = 1 << 19


def random_checkpoint(
    path: str | os.PathLike[str],
    size: str = "0.5b",
    dialect: str = "apple",
    *,
    seed: int = 0,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    image_size: int | None = None,
    quantize: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint directory with random, well-scaled weights; return its path.

    `size` is "0.5b", "1.5b", "7b" (1.5, 3.8 and 15.5 GB in bfloat16) or "tiny", the same
    architecture at small widths (3 MB). `dialect` is "apple", "native" (transformers) or
    "mlx-vlm"; "apple-train" and "native-train" hold the tower's training form. `tokenizer` is a
    directory to copy the tokenizer's files from ("tiny" then gets the rows that it needs);
    without it a byte tokenizer is written, whose special tokens have the genuine ids. `quantize`
    (bits; "mlx-vlm" only) packs what mlx-vlm packs. `progress` is called with the bytes written
    and to be written.

    One (size, seed) is one model in every dialect, before rounding to `dtype`; the training form
    is a model of its own. BatchNorm statistics, layer scales and biases are all far from neutral,
    activations stay near 1, and an answer never ends by itself: special tokens are never likely.
    Big matrices are a ring of 4 million numbers read from a place of their own (distinct rows,
    repeated numbers), written piece by piece: memory does not grow with the model.

    Raises OptionError for an unknown or impossible option, CheckpointError if `path` exists and is
    not an empty directory, or `tokenizer` cannot be used. Nothing is left behind after a failure.
    """
    _check_options(size, dialect, dtype, image_size, quantize)
    target = Path(path)
    source = None if tokenizer is None else Path(tokenizer)
    native = dialect.startswith("native")
    vocabulary = vocabulary_of(size, source)
    config = model_config(size, vocabulary, native=native, image_size=image_size)
    planned = plan(config, dialect, _DTYPES[dtype], quantize)
    with _new_directory(target) as folder:
        metadata_files(folder, size, dialect, config, vocabulary, source, dtype, quantize)
        numbers = _Numbers(seed, config, vocabulary.ordinary)
        _write_shards(folder, planned, numbers, dialect, quantize, progress)
    return target


def _check_options(
    size: str, dialect: str, dtype: str, image_size: int | None, quantize: int | None
) -> None:
    for name, value, choices in (
        ("size", size, SIZES),
        ("dialect", dialect, DIALECTS),
        ("dtype", dtype, tuple(_DTYPES)),
        ("quantize", quantize, (None, 2, 3, 4, 5, 6, 8)),
    ):
        if value not in choices:
            raise OptionError(
                f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}."
            )
    if quantize is not None and dialect != "mlx-vlm":
        raise OptionError(
            f"quantize={quantize} needs dialect 'mlx-vlm'; {dialect!r} has no such form."
        )
    if image_size is not None and (image_size <= 0 or image_size % SIDE_MULTIPLE):
        raise OptionError(
            f"image_size is {image_size}; expected a positive multiple of {SIDE_MULTIPLE}."
        )


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its place when all has gone well."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(
            f"{target} exists and is not an empty directory; choose another path."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{os.getpid()}.partial"
    folder.mkdir()
    try:
        yield folder
        folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# -------------------------------------------------------------------------------------- numbers


class _Numbers:
    """The values of every tensor: a function of the seed and the canonical name alone."""

    def __init__(self, seed: int, config: Config, ordinary: int) -> None:
        self._seed, self._hidden, self._ordinary = seed, config.text.hidden_size, ordinary

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[Floats]:
        """The tensor's float32 values, flat, in pieces of a multiple of 64 (but for the last)."""
        if name.endswith((".embed_tokens.weight", ".lm_head.weight")):
            yield from self._table(name, shape)
        elif math.prod(shape) > _DRAWN:
            yield from self._stream(name, math.prod(shape), self._spread(name, shape))
        else:
            yield self._small(name, shape)

    def _small(self, name: str, shape: tuple[int, ...]) -> Floats:
        count = math.prod(shape)
        owner, _, part = name.rpartition(".")
        if owner.endswith((".bn", ".rbr_skip")):
            return self._batch_norm(owner, part, count)
        if "layer_scale" in part:
            return self._uniform(name, count, 0.1, 0.5)
        if part == "weight" and len(shape) == 1:
            return self._uniform(name, count, 0.5, 1.5)
        if part == "bias":
            return self._noise(name, count) * np.float32(0.1)
        values = self._noise(name, count) * np.float32(self._spread(name, shape))
        centre = _CENTRES.get(_rule(_CENTRES, name))
        if centre:  # a depthwise kernel with a skip connection folded into it
            values.reshape(shape[0], -1)[:, shape[-1] ** 2 // 2] += np.float32(centre)
        return values

    def _batch_norm(self, owner: str, part: str, count: int) -> Floats:
        # Variances from 1e-3 (where eps is 1 %) to 4; gamma and mean follow, so outputs do not.
        deviation = self._uniform(f"{owner}.running_var", count, 0.03, 2.0)
        if part == "running_var":
            return deviation * deviation
        if part == "weight":
            gain = np.float32(_GAINS.get(_rule(_GAINS, f"{owner}."), 1.0) if "skip" in owner else 1)
            return gain * deviation * self._uniform(f"{owner}.weight", count, 0.5, 1.5)
        shift = self._noise(f"{owner}.{part}", count) * np.float32(0.2)
        return shift * deviation if part == "running_mean" else shift

    def _spread(self, name: str, shape: tuple[int, ...]) -> float:
        """Standard deviation of a weight: what keeps activations near 1."""
        deviation = _GAINS.get(_rule(_GAINS, name), 1.0) / math.sqrt(math.prod(shape[1:]))
        if name == "projector.fc2.weight":
            deviation *= _LOGITS / math.sqrt(self._hidden)  # the scale of embeddings
        return deviation

    def _table(self, name: str, shape: tuple[int, ...]) -> Iterator[Floats]:
        """Rows for ordinary tokens, then weak ones for special and padding ids."""
        rows, columns = shape
        spread = _LOGITS / math.sqrt(columns)
        others = (rows - self._ordinary) * columns
        yield from self._stream(name, self._ordinary * columns, spread)
        yield from self._stream(f"{name}/special", others, spread / 20)

    def _stream(self, name: str, count: int, spread: float) -> Iterator[Floats]:
        if count <= _DRAWN:
            yield self._noise(name, count) * np.float32(spread)
            return
        ring = _ring(self._seed)
        at = int(self._rng(name).integers(_RING))
        for start in range(0, count, _CHUNK):
            length = min(_CHUNK, count - start)
            yield ring[at : at + length] * np.float32(spread)
            at = (at + length) % _RING

    def _noise(self, name: str, count: int) -> Floats:
        return _noise(self._rng(name), count)

    def _uniform(self, name: str, count: int, low: float, high: float) -> Floats:
        drawn = self._rng(name).random(count, dtype=np.float32)
        return np.float32(low) + np.float32(high - low) * drawn

    def _rng(self, name: str) -> np.random.Generator:
        return _generator(self._seed, name)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def _noise(generator: np.random.Generator, count: int) -> Floats:
    # Uniform, of variance 1: exact on every platform, as the tails of normals (libm) are not.
    return (generator.random(count, dtype=np.float32) - np.float32(0.5)) * np.float32(12**0.5)


@lru_cache(maxsize=1)
def _ring(seed: int) -> Floats:
    ring = _noise(_generator(seed, "ring"), _RING)
    return np.concatenate([ring, ring[:_CHUNK]])


_LOGITS = 3.0
"""Standard deviation of the logits that a normalised hidden state gets."""

# Patterns of names -> gain over 1/sqrt(fan in). Above 1 they make up for what GELU takes, below
# for branches that add up; Qwen2's layers must outweigh the embedding, or answers repeat one token.
_GAINS = {
    r"(patch_embed\.2|proj\.1|token_mixer\.mixer)\.rbr_skip\.": 0.5,
    r"patch_embed\.2\.rbr_conv\.": 1.2,
    r"patch_embed\.": 1.8,
    r"proj\.0\.lkb_reparam\.": 1.5,
    r"proj\.0\.(lkb_origin|small_conv)\.": 0.8,
    r"proj\.1\.reparam_conv\.": 1.7,
    r"proj\.1\.rbr_conv\.": 1.2,
    r"(convffn\.fc2|projector\.fc2|[oq]_proj|k_proj|down_proj|token_mixer\.qkv)\.": 1.5,
    r"conv_exp\.reparam_conv\.": 1.5,
    r"\.se\.": 2.0,
    r"token_mixer\.(reparam_conv|mixer\.rbr_\w+(\.\d)?)\.": 0.3,
    r"vision\.network\.\d+\.(reparam_conv|pe)\.": 0.3,
}
_CENTRES = {
    r"token_mixer\.reparam_conv\.weight": 0.9,
    r"vision\.network\.\d+\.reparam_conv\.weight": 1.0,
}


def _rule(rules: Iterable[str], name: str) -> str:
    return next((pattern for pattern in rules if re.search(pattern, name)), "")


# -------------------------------------------------------------------------------------- writing


def _write_shards(
    folder: Path,
    planned: list[Planned],
    numbers: _Numbers,
    dialect: str,
    bits: int | None,
    progress: Progress | None,
) -> None:
    total = sum(map(_bytes, planned))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    shards = _shards(planned)
    metadata = {"format": "mlx" if dialect == "mlx-vlm" else "pt"}
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        numbered = f"model-{index:05}-of-{len(shards):05}.safetensors"
        name = numbered if len(shards) > 1 else "model.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        _write_shard(folder / name, shard, metadata, numbers, bits, advance)
    if len(shards) > 1:
        contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(contents, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(planned: list[Planned]) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for _, group in itertools.groupby(planned, key=_source):
        tensors = list(group)  # a quantized matrix stays in one file
        needed = sum(map(_bytes, tensors))
        if shards[-1] and size + needed > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += needed
    return shards


def _source(tensor: Planned) -> str:
    return tensor.source


def _bytes(tensor: Planned) -> int:
    return math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]


def _write_shard(
    path: Path,
    shard: list[Planned],
    metadata: dict[str, str],
    numbers: _Numbers,
    bits: int | None,
    advance: Callable[[int], None],
) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    # Sorted as the safetensors library does, so that every tensor is aligned to its own items.
    for tensor in sorted(shard, key=lambda t: (-_ITEM_BYTES[t.dtype], t.name)):
        end = at + _bytes(tensor)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + at)
        cursors = {t.name: start + header[t.name]["data_offsets"][0] for t in shard}
        for _, group in itertools.groupby(shard, key=_source):
            for name, data in _pieces(list(group), numbers, bits):
                _write_at(file, cursors[name], data)
                cursors[name] += len(data)
                advance(len(data))


def _write_at(file: BinaryIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    file.write(data)


def _pieces(
    group: list[Planned], numbers: _Numbers, bits: int | None
) -> Iterator[tuple[str, bytes]]:
    """(name, data) of the tensors made from one source, piece by piece, each in order."""
    first = group[0]
    if first.dtype == "I64":
        yield first.name, struct.pack("<q", 1000)  # num_batches_tracked, of no consequence
        return
    chunks = numbers.chunks(first.source, first.source_shape)
    if first.axes is not None:
        whole = np.concatenate(list(chunks)).reshape(first.source_shape)
        yield first.name, _encode(np.ascontiguousarray(whole.transpose(first.axes)), first.dtype)
    elif first.part is None:
        for chunk in chunks:
            yield first.name, _encode(chunk, first.dtype)
    else:
        assert bits is not None
        names = {tensor.part: tensor.name for tensor in group}
        for chunk in chunks:
            for part, data in _packed(chunk, group[1].dtype, bits).items():
                yield names[part], data


def _encode(values: Floats, dtype: str) -> bytes:
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    # bfloat16 is float32's upper half; to the nearest, ties to even.
    word = values.view(np.uint32)
    return ((word + ((word >> 16) & 1) + 0x7FFF) >> 16).astype("<u2").tobytes()


def _packed(chunk: Floats, dtype: str, bits: int) -> dict[str, bytes]:
    # Groups of 64 are independent, so any whole number of them can be packed on its own.
    kind = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[dtype]
    groups = mx.array(chunk.reshape(-1, 64)).astype(kind)
    packed, scales, biases = mx.quantize(groups, group_size=64, bits=bits, stream=mx.cpu)
    as_words = mx.uint32 if dtype == "F32" else mx.uint16
    return {
        "weight": np.array(packed).tobytes(),
        "scales": np.array(scales.view(as_words)).tobytes(),
        "biases": np.array(biases.view(as_words)).tobytes(),
    }
