"""The object that users hold: pictures and a question in, an answer out."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx

from .batching import Prompt, encode_images, encode_pictures, fits_one_run, generate_batch
from .chat import Chat
from .checkpoint.loading import LoadedCheckpoint
from .config import Config
from .constraint import Constraint, SchemaCompiler
from .errors import OptionError, PromptError
from .features import EncodedImage, FeatureCache, model_fingerprint, pixel_digest
from .generation import Answer, Clock, Options, Prefix, Stream, Timings, generate, make_options
from .images import Fit, ImageSource, PreprocessedImage, load_image, to_pixels
from .many import Job, Known, Record
from .prompt import IMAGE, SYSTEM, USER, expand, prompt_ids
from .scoring import Choices, Score, check_choices, log_likelihoods
from .tiling import Grid, ImageSize, automatic_size, check_grid, check_image_size, fit_tiles
from .tokenizer import Tokenizer
from .vision import FastViTHD

if TYPE_CHECKING:
    from mlx_lm.models.cache import KVCache

__all__ = [
    "DEFAULT_PROMPT",
    "EncodedImage",
    "FastVLM",
    "Image",
    "Images",
    "PreprocessedImage",
    "as_list",
]

DEFAULT_PROMPT = "Describe the image."


Image: TypeAlias = "ImageSource | PreprocessedImage | EncodedImage"
Images: TypeAlias = "Image | Sequence[Image]"


class FastVLM:
    """A loaded model. Get one from `fastvlm_mlx.load`.

    Use it from one thread: answers would be right from several, but MLX's CPU backend then aborts
    when the process ends. `caption_many` and `ask_batch` have more than one picture in work.
    """

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
        self.prefix = Prefix(beginning)
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
        cache, done = self.prefix.start(self.network, ids)
        return self.answer(
            ids[done:], encoded, cache, chosen, timings, lambda: self.prefix.learn(ids, cache)
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

    def choose(self, images: Images, question: str, choices: Sequence[str]) -> Choices:
        """Weigh given answers to a question against each other.

        Raises OptionError (fewer than two choices, empty or equal ones), ImageError, PromptError.
        """
        return Choices(self._scores(images, question, check_choices(choices)))

    def score(self, images: Images, question: str, text: str) -> Score:
        """How likely `text` is as the answer to a question.

        Raises OptionError (no text), ImageError, PromptError.
        """
        if not isinstance(text, str):
            raise OptionError(f"text is {text!r:.100}; expected a text, which may be empty.")
        return self._scores(images, question, (text,))[0]

    def chat(self, *images: Image, sliding: bool = False) -> Chat:
        """Begin a conversation about pictures; each is encoded once, the KV cache is kept.

        With `sliding` it forgets its oldest turns when the context window is full (see `Chat`);
        without, it ends with a PromptError then.
        """
        return Chat(self, images, sliding=sliding)

    def ask_batch(self, requests: Sequence[tuple[Images, str]], **options: Any) -> list[Answer]:
        """Answer several requests (pictures, question) at once; `options` hold for all.

        Greedy answers are those of `ask` one by one, up to rounding. Clocks count the batch: each
        answer's encode, prefill, first_token and decode are shared by all. Errors as in `stream`;
        one request that cannot be answered fails all.
        """
        chosen = make_options(options)
        if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in requests):
            raise OptionError(
                f"requests is {requests!r:.200}; expected a list of (pictures, question) pairs."
            )
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
            room = self._check_context(len(ids))
            prompts.append(Prompt(ids, own, room, timings, self._constraint(chosen)))
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

    def _scores(self, images: Images, question: str, texts: Sequence[str]) -> tuple[Score, ...]:
        sources = as_list(images)
        ids, encoded, _ = self.prepare(self.prompt_ids(question, len(sources)), sources)
        answers = [[*self.tokenizer.encode(text), self.tokenizer.end_of_turn] for text in texts]
        self._check_context(len(ids) + max(map(len, answers)) - 1)
        cache, done = self.prefix.start(self.network, ids)
        logits = self.network.prefill(self.network.embed(ids[done:], encoded), cache)
        self.prefix.learn(ids, cache)
        found = log_likelihoods(self.network, logits, cache, answers)
        return tuple(map(Score, texts, map(tuple, answers), found))

    def prompt_ids(self, question: str, images: int = 1) -> list[int]:
        """Token ids of a first turn, with `IMAGE` once per picture (not yet expanded)."""
        return prompt_ids(self.tokenizer, question, images)

    def logits(self, token_ids: Sequence[int], images: Images = ()) -> mx.array:
        """Logits (1, L, vocab) of a whole prompt, in which `IMAGE` stands once per picture.

        Raises PromptError for no tokens at all, one outside the vocabulary, or too many.
        """
        rows = self.network.vocabulary
        wrong = [i for i in token_ids if i != IMAGE and not 0 <= i < rows]
        if wrong or not len(token_ids):
            raise PromptError(
                f"Token ids have {wrong[0] if wrong else 'nothing'}; expected numbers from 0 to "
                f"{rows - 1}, and {IMAGE} for each picture."
            )
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
        constraint = self._constraint(options)
        chunks = generate(
            self.network,
            self.tokenizer,
            ids,
            images,
            cache,
            options,
            eos,
            timings,
            after_prefill,
            constraint,
        )
        return Stream(chunks, length, eos)

    def prepare(
        self, prompt: Sequence[int], images: Sequence[Image]
    ) -> tuple[list[int], list[mx.array], Timings]:
        """Expanded token ids, image tokens, and what they cost; `prompt` has IMAGE per picture."""
        clock = Clock()
        encoded = [image.tokens for image in self.encode_each(images, clock)]
        ids = expand(prompt, [tokens.shape[0] for tokens in encoded])
        clock.lap("preprocess")
        return ids, encoded, clock.timings()

    def encode_each(self, images: Sequence[Image], clock: Clock) -> list[EncodedImage]:
        """Every picture encoded: as given, remembered, or now. `clock` is told what that costs."""
        encoded = [self._encoded(image, clock) for image in images]
        mx.eval([image.tokens for image in encoded])
        clock.lap("encode")
        return encoded

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
        """Lazy, but for tiles that take more than one run of the encoder."""
        if len(image.crops) > 1 and not fits_one_run(image.crops):
            return encode_pictures(self._encode_pixels, [image.crops])[0]
        tokens = self._encode_pixels(to_pixels(image.crops))
        return tokens.reshape(-1, tokens.shape[-1])

    def _checked(self, image: EncodedImage) -> EncodedImage:
        return image.checked(self.config.text.hidden_size, self.fingerprint)

    def _constraint(self, options: Options) -> Constraint | None:
        if options.json_schema is None:
            return None
        return self._schemas.constraint(options.json_schema)

    @cached_property
    def _schemas(self) -> SchemaCompiler:
        vocabulary = self.network.vocabulary
        return SchemaCompiler(self.tokenizer, self.config.eos_token_ids, vocabulary)

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
