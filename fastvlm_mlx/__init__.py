"""FastVLM vision-language models in pure MLX.

    import fastvlm_mlx as fv
    vlm = fv.load("nano")
    print(vlm.caption("photo.jpg"))

Names are imported when first used, so that `fastvlm --help` does not wait for MLX.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import Chat, ChatStream, load_chat
    from .errors import (
        BenchmarkError,
        CheckpointError,
        FastVLMError,
        HubError,
        ImageError,
        OptionError,
        OutputError,
        PromptError,
        SavedFileError,
        UnsupportedCheckpoint,
    )
    from .features import EncodedImage, FeatureCache
    from .generation import Answer, Chunk, Options, Stream, Timings
    from .images import PreprocessedImage
    from .many import Record
    from .opening import load
    from .prompt import IMAGE, STYLES
    from .scoring import Choices, Score
    from .vlm import FastVLM

_HOME = {
    "Answer": "generation",
    "BenchmarkError": "errors",
    "Chat": "chat",
    "ChatStream": "chat",
    "CheckpointError": "errors",
    "Choices": "scoring",
    "Chunk": "generation",
    "EncodedImage": "features",
    "FastVLM": "vlm",
    "FastVLMError": "errors",
    "FeatureCache": "features",
    "HubError": "errors",
    "IMAGE": "prompt",
    "ImageError": "errors",
    "OptionError": "errors",
    "Options": "generation",
    "OutputError": "errors",
    "Record": "many",
    "STYLES": "prompt",
    "PreprocessedImage": "images",
    "PromptError": "errors",
    "SavedFileError": "errors",
    "Score": "scoring",
    "Stream": "generation",
    "Timings": "generation",
    "UnsupportedCheckpoint": "errors",
    "load": "opening",
    "load_chat": "chat",
}
__all__ = [
    "IMAGE",
    "Answer",
    "BenchmarkError",
    "Chat",
    "ChatStream",
    "CheckpointError",
    "Choices",
    "Chunk",
    "EncodedImage",
    "FastVLM",
    "FastVLMError",
    "FeatureCache",
    "HubError",
    "ImageError",
    "OptionError",
    "Options",
    "OutputError",
    "Record",
    "STYLES",
    "PreprocessedImage",
    "PromptError",
    "SavedFileError",
    "Score",
    "Stream",
    "Timings",
    "UnsupportedCheckpoint",
    "__version__",
    "load",
    "load_chat",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version("fastvlm-mlx")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
