"""Where a checkpoint is: built in, a directory, a zip as Apple publishes them, or the Hub."""

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError, OptionError
from .hub import Announce, fetch_headers, fetch_model

__all__ = ["DEFAULT_MODEL", "checkpoint_folder"]

DEFAULT_MODEL = "apple/FastVLM-0.5B"
_BUILT_IN = ("nano",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@contextmanager
def checkpoint_folder(
    source: str | os.PathLike[str],
    revision: str | None = None,
    announce: Announce | None = None,
    *,
    headers_only: bool = False,
) -> Iterator[Path]:
    """A directory with the files of `source`, for as long as the context lasts.

    `announce` gets one line before a download (size and licence). With `headers_only` no
    safetensors are downloaded: the directory then serves for `examine_checkpoint` alone. Raises
    CheckpointError for paths and zips, HubError for the Hub, OptionError for a revision of what is
    not on the Hub.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if revision is not None and (text in _BUILT_IN or path.exists()):
        raise OptionError(f"revision is {revision!r}, but {text} is not on the Hub; leave it out.")
    if text in _BUILT_IN and not path.exists():
        with as_file(files("fastvlm_mlx") / text) as folder:
            if not (folder / "config.json").is_file():
                raise CheckpointError(f"This installation does not contain the {text} model.")
            yield folder
    elif text and path.is_dir():
        yield path
    elif path.is_file():
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} is a file, but not a zip; give the directory that holds it, config.json "
                "and the tokenizer files."
            )
        with tempfile.TemporaryDirectory(prefix="fastvlm-") as temporary:
            yield _unpack(path, Path(temporary))
    elif _HUB_ID.fullmatch(text) and not text.startswith(("./", "../")):
        if not headers_only:
            yield fetch_model(text, revision, announce)
            return
        with tempfile.TemporaryDirectory(prefix="fastvlm-") as temporary:
            yield fetch_headers(text, revision, announce, Path(temporary))
    else:
        raise CheckpointError(
            f"No checkpoint at {text!r}: expected a directory, a .zip, a Hub id such as "
            f"{DEFAULT_MODEL}, or the built-in 'nano'."
        )


def _unpack(archive: Path, target: Path) -> Path:
    """Unpack the checkpoint in a zip; only plain file names are ever written, into `target`."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [m for m in packed.infolist() if not m.is_dir()]
            for member in members:
                parts = PurePosixPath(member.filename.replace("\\", "/")).parts
                if ".." in parts or parts[0].startswith("/") or ":" in parts[0]:
                    raise CheckpointError(
                        f"{archive} contains {member.filename!r}, which points outside the "
                        "archive; it is not one of Apple's. Nothing was unpacked."
                    )
            members = [m for m in members if "__MACOSX" not in m.filename]
            homes = [
                m.filename[: -len("config.json")]
                for m in members
                if PurePosixPath(m.filename).name == "config.json"
            ]
            if not homes:
                raise CheckpointError(f"{archive} contains no config.json; it is not a checkpoint.")
            home = min(homes, key=len)
            wanted = [
                m
                for m in members
                if m.filename.startswith(home) and "/" not in m.filename[len(home) :]
            ]
            needed, free = sum(m.file_size for m in wanted), shutil.disk_usage(target).free
            if needed > free:
                raise CheckpointError(
                    f"{archive} unpacks to {needed / 1e9:.1f} GB, but {target.parent} has "
                    f"{free / 1e9:.1f} GB free; free some space or set TMPDIR."
                )
            for member in wanted:
                name = target / member.filename[len(home) :]
                with packed.open(member) as source, name.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 22)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"{archive} is damaged or not readable ({error}); download it again."
        ) from error
    return target
