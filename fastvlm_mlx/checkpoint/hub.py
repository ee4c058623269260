"""Checkpoints on the Hugging Face Hub: the files that are needed, or no more than their headers."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError, HubError
from .reading import NOT_WEIGHTS, weight_files

__all__ = ["Announce", "fetch_headers", "fetch_model"]

Announce = Callable[[str], None]
# What a checkpoint needs beside weights; leaves out pictures, remote code and optimizer states.
_WANTED = ("*.json", "merges.txt", "LICENSE*", "README.md")
_PICKLES = (".bin", ".pt", ".pth")
_LONGEST_HEADER = 100_000_000  # the format's own limit


def fetch_model(repository: str, revision: str | None, announce: Announce | None) -> Path:
    """The directory of a model in the Hub's cache; the network is used if it is not complete.

    `announce` gets a line (size, licence) before a download. Raises HubError.
    """
    try:
        if found := _cached(repository, revision):
            return found
        sizes, licence = _listing(repository, revision)
        wanted = _wanted(sizes)
        if announce:
            size = sum(sizes[name] for name in wanted)
            announce(
                f"Downloading {repository} ({size / 1e9:.2f} GB), licence: {licence} "
                f"(https://huggingface.co/{repository})"
            )
        return _download(repository, revision, wanted)
    except Exception as error:  # the client's own HTTP library differs between its releases
        raise _hub_error(repository, error) from error


def fetch_headers(
    repository: str, revision: str | None, announce: Announce | None, target: Path
) -> Path:
    """A directory that can be examined but not loaded; `target` is empty, for its use.

    Of safetensors files only the headers are fetched, with a hole where the weights would be.
    A model in the cache is returned whole, one of pickles is fetched whole. Raises HubError.
    """
    # Imported here: it costs 0.2 s that a local checkpoint does not need.
    from huggingface_hub import HfFileSystem

    try:
        if found := _cached(repository, revision):
            return found
        sizes, _ = _listing(repository, revision)
        wanted = _wanted(sizes)
        headers = [name for name in wanted if name.endswith(".safetensors")]
        if not headers:
            return fetch_model(repository, revision, announce)
        folder = _download(repository, revision, [name for name in wanted if name not in headers])
        for small in folder.iterdir():
            shutil.copy(small, target)
        hub = HfFileSystem()
        for name in headers:
            path = f"{repository}/{name}"
            with (
                hub.open(path, revision=revision, block_size=1 << 20) as remote,
                (target / name).open("wb") as file,
            ):
                length = remote.read(8)
                count = min(int.from_bytes(length, "little"), _LONGEST_HEADER)
                file.write(length + remote.read(count))
                file.truncate(sizes[name])
        return target
    except HubError:
        raise
    except Exception as error:  # as above
        raise _hub_error(repository, error) from error


def _cached(repository: str, revision: str | None) -> Path | None:
    """The model in the cache, if complete.

    Not snapshot_download(local_files_only=True), which since huggingface-hub 2 asks for every file
    of the repository, the unwanted ones too.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    if isinstance(config, str) and _complete(Path(config).parent):
        return Path(config).parent
    return None


def _listing(repository: str, revision: str | None) -> tuple[dict[str, int], str]:
    """Name and bytes of every file, and the licence."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license_name") or card.get("license") or "not stated"
    return {f.rfilename: f.size or 0 for f in info.siblings or []}, str(licence)


def _download(repository: str, revision: str | None, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, allow_patterns=names))


def _wanted(names: Iterable[str]) -> list[str]:
    """The files to fetch: no folders, and pickles only where there are no safetensors."""
    files = [name for name in names if "/" not in name]
    weights = [name for name in files if name.endswith(".safetensors")] or [
        name for name in files if name.endswith(_PICKLES) and not name.startswith(NOT_WEIGHTS)
    ]
    return weights + [n for n in files if any(PurePosixPath(n).match(p) for p in _WANTED)]


def _complete(folder: Path) -> bool:
    """Whether a snapshot has all that loading needs: downloads can be interrupted."""
    try:
        weight_files(folder)
    except CheckpointError:
        return False
    present = {path.name for path in folder.iterdir()}
    return "config.json" in present and (
        "tokenizer.json" in present or {"vocab.json", "merges.txt"} <= present
    )


def _hub_error(repository: str, error: Exception) -> HubError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return HubError(
        f"Cannot get {repository} from the Hugging Face Hub ({reason}). Check the name and the "
        "connection, or use the built-in model: --model nano."
    )
