"""Folders, patterns, files and URLs -> names of pictures, in a stable order."""

import errno
import glob
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .errors import ImageError

__all__ = ["find_pictures"]

_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".hif", ".avif",
    ".tif", ".tiff", ".gif", ".bmp", ".jp2", ".ppm", ".pgm",
)  # fmt: skip
# Folders that Finder shows as one file: Photos, iPhoto (before and after migration), Aperture.
_LIBRARIES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary")
_ORIGINALS = ("originals", "Masters")  # of Photos since macOS 10.15, and of what came before

Notice = Callable[[str], None]


def find_pictures(
    places: Sequence[str], *, recursive: bool = False, notice: Notice | None = None
) -> list[str]:
    """Names of pictures: those in a folder, those that match a pattern, or the place itself.

    Folders and patterns (`*`, `?`, `[...]`, `**` for any depth) give the files whose ending says
    picture, sorted by name, hidden ones left out; a file that several of them find is given once.
    A photo library of macOS holds each picture in several sizes: given as a place it stands for its
    originals, inside other folders it is left out, which `notice` is told in a line; so are folders
    inside that macOS does not let this program see.
    Every other place is taken as it is: whoever opens it says what is wrong with it.

    Raises ImageError for a folder or pattern that gives nothing, or that cannot be listed.
    """
    notice = notice or (lambda line: None)
    names: list[str] = []
    found: set[str] = set()
    for place in places:
        # os.path answers False where pathlib would raise: a data: URI is too long for a path.
        folder = os.path.expanduser(place)  # noqa: PTH111 - a shell leaves ~ alone in quotes
        if os.path.isdir(folder):  # noqa: PTH112
            if _is_library(folder):
                new = list(_in_folder(_originals(folder), True, notice))
            else:
                new = list(_in_folder(folder, recursive, notice))
            deeper = "" if recursive else ", or add --recursive to look in its folders too"
            advice = f"expected files that end in {', '.join(_SUFFIXES[:5])} or the like{deeper}"
        elif glob.has_magic(place) and "://" not in place and not os.path.lexists(place):
            new = _matching(folder, notice)
            advice = "check the pattern; folders it matches are not looked into"
        else:
            names.append(place)
            continue
        if not new:
            raise ImageError(f"{place}: no pictures found; {advice}")
        names += [name for name in new if name not in found]
        found.update(new)
    return names


def _in_folder(folder: str, recursive: bool, notice: Notice) -> Iterator[str]:
    def fail(error: OSError) -> None:
        # macOS keeps some folders, such as Photo Booth's, from programs without consent.
        if error.errno != errno.EPERM or error.filename == folder:
            raise _cannot_list(error) from error
        notice(f"left out: {_cannot_list(error)}")

    for root, folders, files in os.walk(folder, onerror=fail):
        libraries = sorted(name for name in folders if _is_library(name)) if recursive else ()
        for name in libraries:
            notice(_left_out(str(Path(root, name))))
        deeper = (n for n in folders if not n.startswith(".") and n not in libraries)
        folders[:] = sorted(deeper) * recursive
        yield from (str(Path(root, name)) for name in sorted(files) if _is_picture(name))


def _matching(pattern: str, notice: Notice) -> list[str]:
    # An accented letter is one character or two; macOS stores what an application happened to use,
    # so that one folder may hold both.
    forms = {pattern, *(unicodedata.normalize(form, pattern) for form in ("NFC", "NFD"))}
    found = {name for form in forms for name in glob.glob(form, recursive=True)}  # noqa: PTH207
    once = {_spelled(name): name for name in sorted(filter(_is_picture, found), reverse=True)}
    matches = sorted(once.values())
    libraries = {} if _library_of(pattern) else {name: _library_of(name) for name in matches}
    for library in sorted({found for found in libraries.values() if found}):
        notice(_left_out(library))
    return [name for name in matches if not libraries.get(name)]


def _spelled(name: str) -> tuple[object, ...]:
    """Equal for two spellings of one file: a folder in a pattern may be found by both."""
    try:
        status = os.stat(name)  # noqa: PTH116
    except OSError:
        return (name,)
    return unicodedata.normalize("NFC", name), status.st_dev, status.st_ino


def _is_picture(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


# --- photo libraries ---


def _is_library(name: str) -> bool:
    return Path(name).suffix.lower() in _LIBRARIES


def _library_of(name: str) -> str | None:
    """The library that a path leads into, if it does."""
    path = Path(name)
    return next((str(p) for p in (path, *path.parents) if _is_library(p.name)), None)


def _originals(library: str) -> str:
    try:
        inside = os.listdir(library)  # noqa: PTH208
    except OSError as error:
        raise _cannot_list(error) from error
    for name in _ORIGINALS:
        if name in inside:
            return str(Path(library, name))
    raise ImageError(
        f"{library}: this photo library has no folder of originals; export its pictures from the "
        "application that keeps it, and give that folder"
    )


def _left_out(library: str) -> str:
    return f"{library}: a photo library, left out; give it by name for its originals"


def _cannot_list(error: OSError) -> ImageError:
    from .fetching import permission_advice  # which imports ssl and http: --help need not wait

    return ImageError(
        f"{error.filename} cannot be listed ({error.strerror}); {permission_advice(error)}"
    )
