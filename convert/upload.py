"""A finished checkpoint to the Hugging Face Hub."""

import re
from pathlib import Path

from fastvlm_mlx.errors import HubError, OptionError

__all__ = ["check_repository", "upload"]


def check_repository(repository: str) -> None:
    """Raise OptionError unless `repository` looks like owner/name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise OptionError(f"upload is {repository!r}; expected a Hub id such as you/FastVLM-4bit.")


def upload(folder: Path, repository: str) -> str:
    """Create the repository if need be and upload the directory; returns its address.

    Raises HubError. The directory stays as it is whatever happens.
    """
    # Imported here: only this option needs it.
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Converted by fastvlm-mlx",
            ignore_patterns=[".DS_Store", "._*"],  # what macOS leaves beside files
        )
    except Exception as error:  # the client's own HTTP library differs between its releases
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise HubError(
            f"Cannot upload to {repository} ({reason}). The checkpoint is complete in {folder}; "
            "log in with `hf auth login`, check that you may write there, and upload it again "
            f"with `hf upload {repository} {folder}`."
        ) from error
    return f"https://huggingface.co/{repository}"
