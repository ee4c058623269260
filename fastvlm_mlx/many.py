"""Many pictures, one prompt: a lazy iterator of records, in which errors are records too.

Threads decode and fit the next pictures while the model answers about these. They leave MLX to the
calling thread, and only so many pictures are in work at a time, however many there are.
"""

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .colour import is_mlx_array
from .errors import FastVLMError, OptionError
from .generation import Answer, Timings, check_whole, make_options

if TYPE_CHECKING:
    from .vlm import FastVLM

__all__ = ["Job", "Known", "Record"]


@dataclass(frozen=True)
class Record:
    """What became of one picture: an answer or an error."""

    source: Any
    """The picture, as it was given."""
    answer: Answer | None = None
    """Its clocks count the whole batch, but for load_image and preprocess."""
    error: str | None = None
    """What is wrong; None if all is well."""
    batch: int = 1
    """Pictures that were answered together."""
    sha256: str | None = None
    """Of the file's bytes; with `dedupe` only."""
    duplicate_of: Any = None
    """The earlier source with the same bytes, whose text this is; no clocks, no tokens then."""

    @property
    def text(self) -> str | None:
        """The caption."""
        return self.answer.text if self.answer else None


@dataclass(frozen=True)
class Known:
    """What an earlier picture was answered, for pictures with the same bytes."""

    source: Any
    answer: Answer


@dataclass(frozen=True)
class _Picture:
    """A picture on its way to the model."""

    source: Any
    image: Any = None
    error: str | None = None
    sha256: str | None = None


class Job:
    """One prompt for many pictures; `FastVLM.caption_many` says what the arguments are."""

    def __init__(
        self,
        vlm: "FastVLM",
        prompt: str,
        options: dict[str, Any],
        dedupe: bool,
        known: Mapping[str, Known] | None,
    ) -> None:
        make_options(options)
        vlm.prompt_ids(prompt)
        self._vlm, self._prompt, self._options = vlm, prompt, options
        self._dedupe, self._known = dedupe, dict(known or {})

    def run(
        self, sources: Iterable[Any], batch: int, workers: int | None
    ) -> Generator[Record, None, None]:
        """The records, lazily. Raises OptionError at once."""
        workers = min(4, os.cpu_count() or 1) if workers is None else workers
        for name, number in (("batch", batch), ("workers", workers)):
            if not isinstance(number, int) or number < 1:
                raise OptionError(f"{name} is {number!r}; expected a whole number, at least 1.")
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Iterable):
            raise OptionError(
                f"images is {sources!r:.100}; expected several pictures, such as a list of paths."
            )
        return self._records(iter(sources), batch, workers)

    def _records(
        self, sources: Iterator[Any], batch: int, workers: int
    ) -> Generator[Record, None, None]:
        waiting: deque[Future[_Picture]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="fastvlm-picture")
        try:
            while True:
                # One batch for the model now, one for afterwards, and a picture in each thread.
                room = 2 * batch + workers - len(waiting)
                waiting.extend(self._submit(pool, source) for source in islice(sources, room))
                if not waiting:
                    return
                ready = [waiting.popleft().result() for _ in range(min(batch, len(waiting)))]
                yield from self._answer(ready)
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, source: Any) -> "Future[_Picture]":
        if not is_mlx_array(source):
            return pool.submit(self._open, source)
        opened: Future[_Picture] = Future()
        opened.set_result(self._open(source))
        return opened

    def _open(self, source: Any) -> _Picture:
        try:
            sha256 = _sha256(source) if self._dedupe else None
            if sha256 in self._known:
                return _Picture(source, sha256=sha256)
            return _Picture(source, self._vlm.before_encoder(source), sha256=sha256)
        except FastVLMError as error:
            return _Picture(source, error=str(error))

    def _answer(self, pictures: Sequence[_Picture]) -> Iterator[Record]:
        """Records of pictures, in order; those with the same bytes are asked about once."""
        keys = [picture.sha256 or str(n) for n, picture in enumerate(pictures)]
        fresh: dict[str, _Picture] = {}
        for key, picture in zip(keys, pictures, strict=True):
            if picture.error is None and key not in self._known:
                fresh.setdefault(key, picture)
        answers = self._ask([picture.image for picture in fresh.values()])
        for picture, answer in zip(fresh.values(), answers, strict=True):
            if picture.sha256 and isinstance(answer, Answer):
                bare = replace(answer, tokens=(), timings=Timings())
                self._known[picture.sha256] = Known(picture.source, bare)
        outcomes = dict(zip(fresh, answers, strict=True))
        for key, picture in zip(keys, pictures, strict=True):
            record = Record(picture.source, sha256=picture.sha256, error=picture.error)
            outcome = outcomes.get(key)
            if picture.error is not None:
                yield record
            elif isinstance(outcome, FastVLMError):
                yield replace(record, error=str(outcome))
            elif fresh.get(key) is picture:
                yield replace(record, answer=outcome, batch=len(fresh))
            else:
                known = self._known[key]
                yield replace(record, answer=known.answer, duplicate_of=known.source)

    def _ask(self, images: Sequence[Any]) -> list[Answer | FastVLMError]:
        try:
            requests = [(image, self._prompt) for image in images]
            answers = self._vlm.ask_batch(requests, **self._options)
            return [self._whole(answer) for answer in answers]
        except FastVLMError as error:
            if len(images) == 1:
                return [error]
            return [answer for image in images for answer in self._ask([image])]

    def _whole(self, answer: Answer) -> Answer | FastVLMError:
        try:
            check_whole(answer, self._options)
        except FastVLMError as error:
            return error
        return answer


def _sha256(source: Any) -> str | None:
    """Of bytes or of a file; None for what has neither, such as a URL."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return hashlib.sha256(source).hexdigest()
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        with Path(os.path.expanduser(source)).open("rb") as file:  # noqa: PTH111
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except (OSError, ValueError):
        return None  # a URL, or something that opening it as a picture will report
