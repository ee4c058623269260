"""Every error that this library raises on purpose.

    FastVLMError
    ├── OptionError        an argument or option out of range (also a ValueError)
    ├── ImageError         a picture that cannot be fetched, decoded or prepared
    ├── PromptError        images and `<image>` slots disagree, or the prompt is too long
    ├── CheckpointError    weights, config or tokenizer that cannot be used as they are
    │   └── UnsupportedCheckpoint   recognised, but not something this library runs
    ├── SavedFileError     a saved conversation or encoded picture: damaged, of another model
    ├── HubError           the Hugging Face Hub could not give us the files
    ├── OutputError        a file that cannot be written, or would be lost by writing
    └── BenchmarkError     a measurement that cannot be made, or a result file that cannot be read

A message says what was got, what was expected, and what to do. The command line prints it
as one line and exits with 1 (2 for OptionError); everything else is a bug and shows a traceback.
"""

__all__ = [
    "BenchmarkError",
    "CheckpointError",
    "FastVLMError",
    "HubError",
    "ImageError",
    "OptionError",
    "OutputError",
    "PromptError",
    "SavedFileError",
    "UnsupportedCheckpoint",
]


class FastVLMError(Exception):
    """Base class of all errors raised on purpose by this library."""


class OptionError(FastVLMError, ValueError):
    """An argument or option is out of range or contradicts another."""


class ImageError(FastVLMError):
    """A picture cannot be fetched, decoded or prepared."""


class PromptError(FastVLMError):
    """The prompt and its images do not fit together, or exceed the context window."""


class CheckpointError(FastVLMError):
    """Weights, config or tokenizer files cannot be used as they are."""


class UnsupportedCheckpoint(CheckpointError):
    """A checkpoint that is recognised but cannot be run; the message names what to use instead."""


class SavedFileError(FastVLMError):
    """A saved file cannot be written, is damaged, or belongs to another model or version."""


class HubError(FastVLMError):
    """The Hugging Face Hub is unreachable or does not have the files."""


class OutputError(FastVLMError):
    """A file cannot be written, or writing it would destroy what is there."""


class BenchmarkError(FastVLMError):
    """A measurement cannot be made or trusted, or a result file cannot be read."""
