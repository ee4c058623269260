"""Pictures that have been encoded: as values, in files, and remembered by a bounded cache.

Features depend on the model and on the pixels that its encoder is given, and on nothing else. So a
model has a fingerprint, the pixels a digest, and the two together are what a feature is found by.
"""

import contextlib
import hashlib
import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .config import Config
from .errors import OptionError, PromptError, SavedFileError
from .model import Network, flat_parameters
from .saved import check_replaceable, read_saved, write_saved

__all__ = [
    "MEMORY_BYTES",
    "EncodedImage",
    "FeatureCache",
    "model_fingerprint",
    "pixel_digest",
]

MEMORY_BYTES = 64 << 20
"""What a model remembers by default: 140 pictures of the 0.5B at 1024 x 1024 in bfloat16."""
_DISK_BYTES = 4 << 30
_KIND = "encoded picture"
_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture as the language model sees it; pass it wherever a picture goes."""

    tokens: mx.array
    """(N, hidden) image tokens in row-major order; of a tiled picture, crop after crop."""
    model: str | None = None
    """Fingerprint of the model that encoded it, which alone takes it; None is not checked."""
    pixels: str | None = None
    """Digest of the pixels that were encoded; None if nothing needed it."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, all or nothing. Raises SavedFileError."""
        check_replaceable(path, _KIND)
        self._write(path, durable=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EncodedImage":
        """Read what `save` wrote. Raises SavedFileError; another model's is refused when asked."""
        tensors, facts = read_saved(path, _KIND)
        try:
            (tokens,) = tensors.values()
            image = cls(tokens, **facts)
            well = tokens.ndim == 2 and isinstance(image.model, (str, type(None)))
        except (TypeError, ValueError):
            well = False
        if not well:
            raise SavedFileError(f"{path} does not hold the tokens of one picture.")
        return image

    def checked(self, hidden: int, model: str) -> "EncodedImage":
        """This very picture, if it is for that model of that width; else raises PromptError."""
        if self.tokens.ndim != 2 or self.tokens.shape[1] != hidden:
            raise PromptError(
                f"An encoded image of shape {tuple(self.tokens.shape)} was given; this model "
                f"takes (N, {hidden}). Encode the picture with this very model."
            )
        if self.model not in (None, model):
            raise PromptError(
                "An encoded image of another model was given (or of this one in another dtype or "
                "quantization). Encode the picture with this very model."
            )
        return self

    def _write(self, path: str | os.PathLike[str], *, durable: bool) -> None:
        facts = {"model": self.model, "pixels": self.pixels}
        write_saved(path, _KIND, {"tokens": self.tokens}, facts, durable=durable)


def model_fingerprint(network: Network, config: Config, prompt: Sequence[int]) -> str:
    """A name for a model as it is in memory: equal for equal models, whatever they are called.

    Hashed are the config, every parameter's name, type and shape, 64 values of each at equal
    distances, and `prompt`, the ids of a known text, for the tokenizer. So another dtype or
    quantization is another model, and so is a fine-tuned one; a change to a few single weights
    would not be noticed. Costs milliseconds, whatever the size.
    """
    described = asdict(config)
    described["eos_token_ids"] = sorted(config.eos_token_ids)
    digest = hashlib.sha256(f"{sorted(described.items())} {list(prompt)}".encode())
    samples = []
    for name, parameter in flat_parameters(network):
        digest.update(f"{name} {parameter.dtype} {parameter.shape}".encode())
        flat = parameter.reshape(-1)
        samples.append(flat[:: -(-max(flat.size, 1) // _SAMPLES)].view(mx.uint8))
    digest.update(np.asarray(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()


def pixel_digest(crops: Sequence[npt.NDArray[np.uint8]]) -> str:
    """SHA-256 of what an encoder is given for one picture: (H, W, 3) uint8 each, in order.

    Size and fit are in the pixels. 0.5 ms per megabyte; 1024 x 1024 are 3.1 MB.
    """
    digest = hashlib.sha256()
    for crop in crops:
        digest.update(str(crop.shape).encode())
        digest.update(np.ascontiguousarray(crop).data)
    return digest.hexdigest()


class FeatureCache:
    """Encoded pictures by model and pixels, the least recently used forgotten first.

    One may serve several models, and several threads. With a folder it outlives the process, and
    several processes may share that folder: a file appears in one step, and one that is damaged
    counts as missing and is written anew.
    """

    def __init__(
        self,
        memory_bytes: int = MEMORY_BYTES,
        folder: str | os.PathLike[str] | None = None,
        disk_bytes: int = _DISK_BYTES,
    ) -> None:
        """Remember at most `memory_bytes` in memory and `disk_bytes` in `folder`.

        Raises OptionError for limits below 0 and a folder that cannot be made.
        """
        for name, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OptionError(f"{name} is {value!r}; expected a number of bytes, 0 or more.")
        self.memory_bytes = memory_bytes
        self._memory: OrderedDict[tuple[str, str], EncodedImage] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()
        self._disk = _Folder(Path(folder).expanduser(), disk_bytes) if folder is not None else None

    @staticmethod
    def of(given: "int | str | os.PathLike[str] | FeatureCache | None") -> "FeatureCache | None":
        """The cache that `load(feature_cache=...)` asks for. Raises OptionError."""
        if given is None or isinstance(given, FeatureCache):
            return given
        if isinstance(given, (str, os.PathLike)):
            return FeatureCache(folder=given)
        return FeatureCache(given)

    def get(self, model: str, pixels: str) -> EncodedImage | None:
        """What that model made of those pixels, if it is remembered."""
        key = model, pixels
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        found = self._disk.get(key) if self._disk else None
        if found is not None:
            self._remember(key, found)
        return found

    def put(self, image: EncodedImage) -> None:
        """Remember a picture; one that does not say its model and pixels is left out."""
        if image.model is None or image.pixels is None:
            return
        key = image.model, image.pixels
        self._remember(key, image)
        if self._disk:
            self._disk.put(key, image)

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        with self._lock:
            self._memory.clear()
            self._used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of image tokens in memory."""
        return self._used

    def _remember(self, key: tuple[str, str], image: EncodedImage) -> None:
        if image.tokens.nbytes > self.memory_bytes:
            return
        with self._lock:
            known = self._memory.pop(key, None)
            self._memory[key] = image
            self._used += image.tokens.nbytes - (known.tokens.nbytes if known else 0)
            while self._used > self.memory_bytes:
                _, oldest = self._memory.popitem(last=False)
                self._used -= oldest.tokens.nbytes


class _Folder:
    """Encoded pictures in files, named by what they are found by."""

    # How many files a process writes before it looks at the folder again: others write there too.
    _EVERY = 32

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._written, self._estimate = self._EVERY, 0
        self._told = False
        try:
            # Features tell what is in a picture: they are for the owner's eyes, like the pictures.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"feature_cache is {str(folder)!r}, which cannot be used as a directory "
                f"({error.strerror}); choose another place."
            ) from error

    def get(self, key: tuple[str, str]) -> EncodedImage | None:
        path = self._path(key)
        if not path.exists():
            return None
        try:
            image = EncodedImage.load(path)
        except SavedFileError:
            return None
        if (image.model, image.pixels) != key:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # recently used
        return image

    def put(self, key: tuple[str, str], image: EncodedImage) -> None:
        path = self._path(key)
        try:
            # Not worth waiting for the disk: what a power cut spoils is found out by its checksum.
            image._write(path, durable=False)
            self._written += 1
            with contextlib.suppress(FileNotFoundError):  # another process made room
                self._estimate += path.stat().st_size
            if self._written > self._EVERY or self._estimate > self._limit:
                self._tidy()
        except (OSError, SavedFileError) as error:
            if not self._told:
                self._told = True
                warnings.warn(f"The feature cache keeps nothing new: {error}", stacklevel=2)

    def _tidy(self) -> None:
        """Remove the least recently used files beyond the limit, and what killed runs left."""
        files = []
        for entry in os.scandir(self._folder):
            try:
                status = entry.stat()
            except OSError:  # another process removed it
                continue
            if entry.name.endswith(".safetensors"):
                files.append((status.st_mtime, status.st_size, entry.path))
            elif entry.name.endswith(".partial") and status.st_mtime < time.time() - 3600:
                Path(entry.path).unlink(missing_ok=True)
        self._written, self._estimate = 0, sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self._estimate <= self._limit:
                break
            Path(path).unlink(missing_ok=True)
            self._estimate -= size

    def _path(self, key: tuple[str, str]) -> Path:
        name = hashlib.sha256(" ".join(key).encode()).hexdigest()
        return self._folder / f"{name}.safetensors"
