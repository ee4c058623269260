"""What is measured: a checkpoint, or a model of the published shape with random weights.

Latency does not depend on the weights' values, so random models need no download and no file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from fastvlm_mlx import ops
from fastvlm_mlx.checkpoint.dialects import Dialect
from fastvlm_mlx.checkpoint.loading import Examined, LoadedCheckpoint, examine_checkpoint
from fastvlm_mlx.checkpoint.quantized import quantize_linears
from fastvlm_mlx.checkpoint.source import checkpoint_folder
from fastvlm_mlx.config import Config
from fastvlm_mlx.errors import BenchmarkError, OptionError
from fastvlm_mlx.memory import available_memory
from fastvlm_mlx.model import Network, flat_parameters, parameter_counts
from fastvlm_mlx.opening import DTYPES, load
from fastvlm_mlx.testing_files import model_config, vocabulary_of
from fastvlm_mlx.tokenizer import Tokenizer
from fastvlm_mlx.vlm import FastVLM

from .record import Operation, Subject

__all__ = [
    "BITS",
    "RANDOM",
    "Choice",
    "build",
    "describe",
    "random_model",
    "stand_in_tokenizer",
    "weight_bytes",
]

RANDOM = ("0.5b", "1.5b", "7b", "nano")
BITS = (2, 3, 4, 5, 6, 8)


_WORDS = ("system", "user", "assistant", "You", "Describe")
_LATER_WORDS = ("are", "a", "helpful", "assistant", "the", "image")
_RING = 1_048_573
"""A prime: no two rows of a matrix are alike."""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Choice:
    """Which model, in which form. Raises OptionError for what cannot be."""

    model: str | None = None
    """As for `fastvlm caption`."""
    random: str | None = None
    """One of RANDOM, in place of a model; "nano" is the built-in one."""
    dtype: str | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.random is not None:
            raise OptionError("Both --model and --random are given; choose one.")
        for name, value, choices in (
            ("--random", self.random, RANDOM),
            ("--dtype", self.dtype, tuple(DTYPES)),
            ("--bits", self.bits, BITS),
        ):
            if value is not None and value not in choices:
                raise OptionError(
                    f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}."
                )
        if self.model is None and self.random is None:
            object.__setattr__(self, "random", "0.5b")

    @property
    def source(self) -> str | None:
        """What `fastvlm_mlx.load` takes; None for a model that exists in memory only."""
        return self.model if self.random is None else "nano" if self.random == "nano" else None

    @property
    def name(self) -> str:
        """For records: a checkpoint's own name, without the folders it lies in."""
        if self.source is None:
            return f"random {self.random}"
        path = Path(self.source).expanduser()
        return (path.name or path.resolve().name) if path.exists() else self.source


def build(
    choice: Choice,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FastVLM:
    """The model, with no cache of encoded pictures. Raises BenchmarkError if it does not fit."""
    if choice.source is None:
        return random_model(str(choice.random), choice.dtype, choice.bits, progress)
    with checkpoint_folder(choice.source, announce=announce) as folder:
        source = examine_checkpoint(folder)
        packed = min((how.bits for how in source.quantized.values()), default=None)
        _check_room(choice.name, source.config, *_dtypes(choice.dtype), choice.bits or packed)
        return load(
            folder,
            dtype=choice.dtype,
            quantize=choice.bits,
            progress=progress,
            feature_cache=None,  # every repeat has to encode its picture
        )


def _dtypes(dtype: str | None) -> tuple[mx.Dtype, mx.Dtype]:
    """Of the tower and of the language model: those of `fastvlm_mlx.load`."""
    if dtype is not None:
        return DTYPES[dtype], DTYPES[dtype]
    on_gpu = mx.default_device() == mx.gpu
    return (mx.float16, mx.bfloat16) if on_gpu else (mx.float32, mx.float32)


def random_model(
    size: str,
    dtype: str | None = None,
    bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FastVLM:
    """A model of a published size with random weights, made in memory, piece by piece."""
    on_gpu = mx.default_device() == mx.gpu
    vision_dtype, text_dtype = _dtypes(dtype)
    vocabulary = vocabulary_of(size, None)
    config = model_config(size, vocabulary, native=False, image_size=None)
    _check_room(f"random {size}", config, vision_dtype, text_dtype, bits)
    network = Network(config)
    network.eval()
    _fill(network)
    network.set_dtype(text_dtype)
    network.vision.set_dtype(vision_dtype)
    if bits is not None:
        for part in (network.language_model, network.projector):
            quantize_linears(part, bits, keep_packed=on_gpu)
    # One array at a time: a float matrix is freed as soon as it is quantized.
    arrays = flat_parameters(network)
    for done, (_, array) in enumerate(arrays, start=1):
        mx.eval(array)
        if progress:
            progress(done, len(arrays))
    source = Examined(
        Path(f"random {size}"), config, stand_in_tokenizer(), Dialect.FOLDED, False, {}, {}, 0, {}
    )
    return FastVLM(LoadedCheckpoint(network, config, source))


def _fill(network: Network) -> None:
    """Random matrices from one ring of numbers, which is ten times faster than drawing each."""
    ring = mx.random.normal((_RING,), key=mx.random.key(0))
    filled = []
    for name, array in flat_parameters(network):
        if array.ndim > 1:
            fan_in = array.shape[-1] if array.ndim == 2 else math.prod(array.shape[:-1])
            turns = mx.broadcast_to(ring, (-(-array.size // _RING), _RING)).reshape(-1)
            filled.append((name, turns[: array.size].reshape(array.shape) * (0.5 / fan_in**0.5)))
    network.load_weights(filled, strict=False)


def _check_room(
    name: str, config: Config, vision: mx.Dtype, text: mx.Dtype, bits: int | None
) -> None:
    on_gpu = mx.default_device() == mx.gpu
    counts = parameter_counts(config)
    # A group of 64 has a scale and a bias of 16 bits each.
    text_bytes = (bits + 0.5) / 8 if bits and on_gpu else text.size
    rest = counts["projector"] + counts["language_model"]
    needed = counts["vision"] * vision.size + rest * text_bytes
    room = available_memory()
    if room is not None and needed > room:
        raise BenchmarkError(
            f"The weights of {name} take {needed / 1e9:.1f} GB here; {room / 1e9:.1f} GB are free. "
            f"Choose a smaller model{', or fewer --bits.' if on_gpu else '.'}"
        )


def stand_in_tokenizer() -> Tokenizer:
    """A tokenizer that cuts the default prompt into as many tokens as Qwen2's does, from no file.

    The prompt's words are tokens, everything else is bytes.
    """
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_WORDS]
    words += [f"\u0120{word}" for word in _LATER_WORDS]
    vocabulary = {word: n for n, word in enumerate(words)}
    backend = HFTokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in _SPECIAL])
    return Tokenizer(backend)


def describe(choice: Choice, vlm: FastVLM) -> Subject:
    """What the record says about the model, and the operations in use for it."""
    network = vlm.network
    vision_dtype = network.vision.stem.conv.weight.dtype
    text_dtype = network.language_model.model.norm.weight.dtype
    bits = choice.bits
    if bits is None and vlm.source.quantized:
        bits = max(how.bits for how in vlm.source.quantized.values())
    operations = {(s.op, s.form): None for s in ops.statuses(vision_dtype)}
    return Subject(
        model=choice.name,
        parameters=parameter_counts(vlm.config),
        dtype=_dtype_name(text_dtype),
        vision_dtype=_dtype_name(vision_dtype),
        bits=bits,
        operations=tuple(Operation(op, form) for op, form in operations),
    )


def weight_bytes(vlm: FastVLM) -> int:
    """Bytes of all weights as they are in memory."""
    return sum(array.nbytes for _, array in flat_parameters(vlm.network))


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
