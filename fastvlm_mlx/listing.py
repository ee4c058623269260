"""Folders, patterns, files and URLs -> names of pictures, in a stable order."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import ImageError

__all__ = ["find_pictures"]

_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".hif", ".avif",
    ".tif", ".tiff", ".gif", ".bmp", ".jp2", ".ppm", ".pgm",
)  # fmt: skip


def find_pictures(places: Sequence[str], *, recursive: bool = False) -> list[str]:
    """Names of pictures: those in a folder, those that match a pattern, or the place itself.

    Folders and patterns (`*`, `?`, `[...]`, `**` for any depth) give the files whose ending says
    picture, sorted by name, hidden ones left out; a file that several of them find is given once.
    Every other place is taken as it is: whoever opens it says what is wrong with it.

    Raises ImageError for a folder or pattern that gives nothing.
    """
    names: list[str] = []
    found: set[str] = set()
    for place in places:
        # os.path answers False where pathlib would raise: a data: URI is too long for a path.
        if os.path.isdir(place):  # noqa: PTH112
            new = list(_in_folder(place, recursive))
            deeper = "" if recursive else ", or add --recursive to look in its folders too"
            advice = f"expected files that end in {', '.join(_SUFFIXES[:5])} or the like{deeper}"
        elif glob.has_magic(place) and "://" not in place and not os.path.lexists(place):
            new = sorted(filter(_is_picture, glob.glob(place, recursive=True)))  # noqa: PTH207
            advice = "check the pattern; folders it matches are not looked into"
        else:
            names.append(place)
            continue
        if not new:
            raise ImageError(f"{place}: no pictures found; {advice}")
        names += [name for name in new if name not in found]
        found.update(new)
    return names


def _in_folder(folder: str, recursive: bool) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise ImageError(
            f"{error.filename} cannot be listed ({error.strerror}); check its permissions"
        ) from error

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) * recursive
        yield from (str(Path(root, name)) for name in sorted(files) if _is_picture(name))


def _is_picture(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
