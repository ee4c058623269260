"""The object that users hold: pictures and a question in, an answer out."""

import dataclasses
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx

from .batching import Prompt, encode_images, generate_batch
from .chat import Chat
from .checkpoint.loading import LoadedCheckpoint, load_checkpoint
from .checkpoint.quantized import quantize_linears
from .checkpoint.source import DEFAULT_MODEL, checkpoint_folder
from .config import Config
from .errors import OptionError, PromptError
from .features import (
    MEMORY_BYTES,
    EncodedImage,
    FeatureCache,
    as_feature_cache,
    model_fingerprint,
    pixel_digest,
)
from .generation import Answer, Clock, Options, Prefix, Stream, Timings, generate, make_options
from .images import Fit, ImageSource, PreprocessedImage, load_image, to_pixels
from .many import Job, Known, Record
from .prompt import SYSTEM, USER, expand, prompt_ids
from .tiling import Grid, ImageSize, automatic_size, check_grid, check_image_size, fit_tiles
from .tokenizer import Tokenizer
from .vision import FastViTHD

if TYPE_CHECKING:
    from mlx_lm.models.cache import KVCache

__all__ = [
    "DEFAULT_PROMPT",
    "DTYPES",
    "EncodedImage",
    "FastVLM",
    "Image",
    "Images",
    "PreprocessedImage",
    "as_list",
    "default_model",
    "load",
]

DEFAULT_PROMPT = "Describe the image."
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


Image: TypeAlias = "ImageSource | PreprocessedImage | EncodedImage"
Images: TypeAlias = "Image | Sequence[Image]"


def default_model() -> str:
    """$FASTVLM_MODEL, else apple/FastVLM-0.5B."""
    return os.environ.get("FASTVLM_MODEL") or DEFAULT_MODEL


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    image_size: ImageSize | None = None,
    tiles: Grid = (1, 1),
    fit: Fit = "pad",
    feature_cache: int | str | os.PathLike[str] | FeatureCache | None = MEMORY_BYTES,
    revision: str | None = None,
    allow_private_urls: bool = False,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "FastVLM":
    """Load a FastVLM.

    Args:
        model: "nano" (built in), a checkpoint directory, one of Apple's .zip files, or a Hub id;
            by default $FASTVLM_MODEL, else apple/FastVLM-0.5B.
        dtype: "float32", "float16" or "bfloat16"; by default what suits the device.
        quantize: quantize the language model and projector to this many bits while loading. On
            the CPU the values are those of the quantized model, but kept as float32.
        image_size: side in pixels, a multiple of 64 up to 2048, of the square a picture is fitted
            to; by default the checkpoint's own. Fewer pixels are fewer tokens and a faster answer.
            "auto" takes the least that holds the picture, from 256 to the checkpoint's own.
        tiles: (rows, columns), up to (4, 4), of squares of that size that a picture is cut into,
            besides an overview of the whole; (1, 1) is the whole picture once.
        fit: "pad" to a square with black first (as the models are used by Apple's predict.py), or
            "crop" the centre.
        feature_cache: where to remember encoded pictures, so that a further question about one
            costs no encoder run: bytes of memory, a directory (which also outlives the process), a
            `FeatureCache`, or None for nowhere (to measure the encoder, for example).
        revision: branch, tag or commit on the Hub.
        allow_private_urls: let picture URLs point into private networks.
        announce: gets one line (size, licence) before a download.
        progress: is told (tensors loaded, tensors in all).

    Raises OptionError, CheckpointError or HubError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    if quantize is not None and quantize not in (2, 3, 4, 5, 6, 8):
        raise OptionError(f"quantize is {quantize!r}; expected 2, 3, 4, 5, 6 or 8 bits.")
    if image_size is not None:
        check_image_size(image_size)
    check_grid(tiles)
    if fit not in ("pad", "crop"):
        raise OptionError(f"fit is {fit!r}; expected 'pad' or 'crop'.")
    cache = as_feature_cache(feature_cache)
    on_gpu = mx.default_device() == mx.gpu
    if mx.metal.is_available():
        # Once, so that macOS keeps the weights resident; 15 and later, a no-op before.
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    with checkpoint_folder(model or default_model(), revision, announce) as folder:
        loaded = load_checkpoint(
            folder,
            dtype=DTYPES[dtype] if dtype else (mx.bfloat16 if on_gpu else mx.float32),
            vision_dtype=DTYPES[dtype] if dtype else (mx.float16 if on_gpu else mx.float32),
            keep_quantized=on_gpu,
            progress=progress,
        )
    if quantize is not None:
        for part in (loaded.network.language_model, loaded.network.projector):
            quantize_linears(part, quantize, keep_packed=on_gpu)
        mx.eval(loaded.network.parameters())
    return FastVLM(
        loaded,
        image_size=image_size,
        tiles=tiles,
        fit=fit,
        feature_cache=cache,
        allow_private_urls=allow_private_urls,
    )


class FastVLM:
    """A loaded model. Get one from `fastvlm_mlx.load`."""

    def __init__(
        self,
        loaded: LoadedCheckpoint,
        *,
        image_size: ImageSize | None = None,
        tiles: Grid = (1, 1),
        fit: Fit = "pad",
        feature_cache: FeatureCache | None = None,
        allow_private_urls: bool = False,
    ) -> None:
        self.network = loaded.network
        self.source = loaded.source
        self.config: Config = loaded.config
        self.tokenizer: Tokenizer = loaded.source.tokenizer
        self.image_size: ImageSize = image_size or self.config.vision.image_size
        self.tiles = check_grid(tiles)
        self.fit: Fit = fit
        self.feature_cache = feature_cache
        self._allow_private_urls = allow_private_urls
        beginning = self.tokenizer.encode(SYSTEM + USER)
        self.fingerprint = model_fingerprint(self.network, self.config, beginning)
        """Equal for equal models: what encoded pictures and saved conversations belong to."""
        self._prefix = Prefix(beginning)
        # One graph per input shape. MLX's CPU backend compiles each operation by itself instead.
        on_gpu = mx.default_device() == mx.gpu
        self._encode_pixels = mx.compile(self.network.encode) if on_gpu else self.network.encode

    @property
    def vision(self) -> FastViTHD:
        """The encoder: (B, H, W, 3) pixels in [0, 1] -> (B, H/64 * W/64, features)."""
        return self.network.vision

    def caption(self, image: Image, prompt: str = DEFAULT_PROMPT, **options: Any) -> Answer:
        """Describe one picture. `options` are the fields of `Options`; errors as in `stream`."""
        return self.ask(image, prompt, **options)

    def ask(self, images: Images, question: str, **options: Any) -> Answer:
        """Answer a question about any number of pictures, in the order given.

        `<image>` in the question says where a picture stands; without it they stand in front.
        Errors as in `stream`.
        """
        return self.stream(images, question, **options).finish()

    def stream(self, images: Images, question: str, **options: Any) -> Stream:
        """Like `ask`, chunk by chunk as the answer is produced.

        Everything that can be wrong with the input is raised at the call, not at the first chunk:
        OptionError, ImageError, and PromptError (slots, context window).
        """
        chosen = make_options(options)
        sources = as_list(images)
        prompt = self.prompt_ids(question, len(sources))
        ids, encoded, timings = self.prepare(prompt, sources)
        cache, done = self._prefix.start(self.network, ids)
        return self.answer(
            ids[done:], encoded, cache, chosen, timings, lambda: self._prefix.learn(ids, cache)
        )

    def caption_many(
        self,
        images: "Iterable[Image]",
        prompt: str = DEFAULT_PROMPT,
        *,
        batch: int = 4,
        workers: int | None = None,
        dedupe: bool = False,
        known: Mapping[str, Known] | None = None,
        **options: Any,
    ) -> Generator[Record, None, None]:
        """Describe any number of pictures: one record for each, in order, as they are ready.

        A picture that fails is a record with `error`; OptionError and PromptError are raised at
        once. `images` is read only as far as needed, and closing the iterator ends its threads.

        Args:
            images: any iterable; at most 3 * `batch` + `workers` pictures are in memory.
            prompt: the same for all; `STYLES` has some.
            batch: how many are answered together. Greedy captions do not depend on it.
            workers: threads that decode the next pictures; by default up to four.
            dedupe: ask only once about files (or bytes) with the same content.
            known: for `dedupe`, answers from before, by sha256.
            options: the fields of `Options`.
        """
        return Job(self, prompt, options, dedupe, known).run(images, batch, workers)

    def chat(self, *images: Image) -> Chat:
        """Begin a conversation about pictures; each is encoded once, the KV cache is kept."""
        return Chat(self, images)

    def ask_batch(self, requests: Sequence[tuple[Images, str]], **options: Any) -> list[Answer]:
        """Answer several requests (pictures, question) at once; `options` hold for all.

        Greedy answers are those of `ask` one by one, up to rounding. Clocks count the batch: each
        answer's encode, prefill, first_token and decode are shared by all. Errors as in `stream`;
        one request that cannot be answered fails all.
        """
        chosen = make_options(options)
        asked = [(as_list(images), question) for images, question in requests]
        if len(asked) < 2:
            return [self.ask(*request, **options) for request in asked]
        unexpanded = [self.prompt_ids(question, len(images)) for images, question in asked]
        rows = [[self.before_encoder(image) for image in images] for images, _ in asked]
        started = time.perf_counter()
        flat, cache = [image for row in rows for image in row], self.feature_cache
        encoded = iter(encode_images(self._encode_pixels, flat, cache, self.fingerprint))
        seconds = time.perf_counter() - started
        prompts = []
        for prompt, row in zip(unexpanded, rows, strict=True):
            own = [next(encoded).tokens for _ in row]
            ids = expand(prompt, [tokens.shape[0] for tokens in own])
            fitted = [i for i in row if isinstance(i, PreprocessedImage)]
            timings = Timings(
                load_image=sum(i.load_image for i in fitted),
                preprocess=sum(i.preprocess for i in fitted),
                encode=seconds,
            )
            prompts.append(Prompt(ids, own, self._check_context(len(ids)), timings))
        eos = self.config.eos_token_ids
        return generate_batch(self.network, self.tokenizer, prompts, chosen, eos)

    def preprocess(
        self,
        image: ImageSource,
        *,
        image_size: ImageSize | None = None,
        tiles: Grid | None = None,
    ) -> PreprocessedImage:
        """Decode and fit a picture, without MLX: what other threads may do ahead of the encoder.

        `image_size` and `tiles` replace the model's own. Raises OptionError and ImageError.
        """
        size = self.image_size if image_size is None else check_image_size(image_size)
        grid = self.tiles if tiles is None else check_grid(tiles)
        started = time.perf_counter()
        picture = load_image(image, allow_private_urls=self._allow_private_urls)
        loaded = time.perf_counter()
        if size == "auto":
            size = automatic_size(*picture.size, self.config.vision.image_size, self.fit, grid)
        crops = fit_tiles(picture, size, self.fit, grid)
        return PreprocessedImage(tuple(crops), loaded - started, time.perf_counter() - loaded)

    def before_encoder(self, image: Image) -> PreprocessedImage | EncodedImage:
        """The picture preprocessed, or as it is if it was encoded already."""
        if isinstance(image, EncodedImage):
            return self._checked(image)
        return image if isinstance(image, PreprocessedImage) else self.preprocess(image)

    def encode(
        self,
        image: "ImageSource | PreprocessedImage",
        *,
        image_size: ImageSize | None = None,
        tiles: Grid | None = None,
    ) -> EncodedImage:
        """Run the encoder once; the value can be asked about any number of times.

        `image_size` and `tiles` as in `preprocess`. Raises OptionError and ImageError.
        """
        if not isinstance(image, PreprocessedImage):
            image = self.preprocess(image, image_size=image_size, tiles=tiles)
        elif image_size is not None or tiles is not None:
            raise OptionError("The picture is preprocessed; give image_size and tiles there.")
        encoded = self._encoded(image, Clock())
        mx.eval(encoded.tokens)
        return encoded

    def prompt_ids(self, question: str, images: int = 1) -> list[int]:
        """Token ids of a first turn, with `IMAGE` once per picture (not yet expanded)."""
        return prompt_ids(self.tokenizer, question, images)

    def logits(self, token_ids: Sequence[int], images: Images = ()) -> mx.array:
        """Logits (1, L, vocab) of a whole prompt, in which `IMAGE` stands once per picture."""
        encoded = [self._encoded(image, Clock()).tokens for image in as_list(images)]
        ids = expand(token_ids, [tokens.shape[0] for tokens in encoded])
        self._check_context(len(ids))
        return self.network.logits(self.network.embed(ids, encoded))

    def answer(
        self,
        ids: list[int],
        images: list[mx.array],
        cache: "list[KVCache]",
        options: Options,
        timings: Timings,
        after_prefill: Callable[[], None] = lambda: None,
    ) -> Stream:
        """Generate from expanded ids and image tokens, continuing `cache`. Raises PromptError."""
        length = cache[0].offset + len(ids)
        room = self._check_context(length)
        options = dataclasses.replace(options, max_tokens=min(options.max_tokens, room))
        eos = self.config.eos_token_ids
        chunks = generate(
            self.network, self.tokenizer, ids, images, cache, options, eos, timings, after_prefill
        )
        return Stream(chunks, length, eos)

    def prepare(
        self, prompt: Sequence[int], images: Sequence[Image]
    ) -> tuple[list[int], list[mx.array], Timings]:
        """Expanded token ids, image tokens, and what they cost; `prompt` has IMAGE per picture."""
        clock = Clock()
        encoded = [self._encoded(image, clock).tokens for image in images]
        ids = expand(prompt, [tokens.shape[0] for tokens in encoded])
        clock.lap("preprocess")
        mx.eval(encoded)
        clock.lap("encode")
        return ids, encoded, clock.timings()

    def _encoded(self, image: Image, clock: Clock) -> EncodedImage:
        """A picture's tokens: as given, remembered, or queued for the device but not awaited."""
        fitted = self.before_encoder(image)
        if isinstance(fitted, EncodedImage):
            return fitted
        clock.took(load_image=fitted.load_image, preprocess=fitted.preprocess)
        cache = self.feature_cache
        digest = pixel_digest(fitted.crops) if cache else None
        known = cache.get(self.fingerprint, digest) if cache and digest else None
        clock.lap("preprocess")
        if known is not None:
            return known
        # The device encodes while the next picture is decoded.
        encoded = EncodedImage(self._encode(fitted), self.fingerprint, digest)
        mx.async_eval(encoded.tokens)
        if cache:
            cache.put(encoded)
        clock.lap("encode")
        return encoded

    def _encode(self, image: PreprocessedImage) -> mx.array:
        tokens = self._encode_pixels(to_pixels(image.crops))
        return tokens.reshape(-1, tokens.shape[-1])

    def _checked(self, image: EncodedImage) -> EncodedImage:
        hidden = self.config.text.hidden_size
        if image.tokens.ndim != 2 or image.tokens.shape[1] != hidden:
            raise PromptError(
                f"An encoded image of shape {tuple(image.tokens.shape)} was given; this model "
                f"takes (N, {hidden}). Encode the picture with this very model."
            )
        if image.model not in (None, self.fingerprint):
            raise PromptError(
                "An encoded image of another model was given (or of this one in another dtype or "
                "quantization). Encode the picture with this very model."
            )
        return image

    def _check_context(self, length: int) -> int:
        """Positions left for the answer. Raises PromptError if there are none."""
        room = self.config.context_length - length
        if room < 1:
            raise PromptError(
                f"The prompt takes {length} positions, image tokens included; the context window "
                f"is {self.config.context_length}. Ask a shorter question or give fewer pictures."
            )
        return room


def as_list(images: Images) -> list[Image]:
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
