"""What a converted checkpoint looks like on disk: names, shapes, config.json, and the values.

* `folded`: this library's own; the tower ready to run, nothing left to do at load.
* `mlx_vlm`: what mlx-vlm and mlx-swift-lm load: Apple's fused tower with convolutions as OHWI
  (checkpoint notes, section 3.1).
* `apple`: Apple's own names and layout, the tower fused: what PyTorch code loads.

Modules are known by their canonical names here (those of `Network`, or of `layout.py` in the
tower); `rename` gives the name in the file.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.checkpoint.dialects import FORMAT, Dialect
from fastvlm_mlx.checkpoint.layout import expected_tensors
from fastvlm_mlx.checkpoint.loading import Examined, in_float16_range, network_values, unpacked
from fastvlm_mlx.checkpoint.reading import OpenCheckpoint, open_checkpoint
from fastvlm_mlx.checkpoint.tensors import TensorRef
from fastvlm_mlx.checkpoint.writing import FORMAT_VERSION, config_to_dict, write_json
from fastvlm_mlx.config import Config, VisionConfig
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.model import Network, flat_parameters

__all__ = ["LAYOUTS", "Layout", "layout_of", "processor_files"]

Shape = tuple[int, ...]
Values = Iterator[tuple[str, mx.array]]

_CLIP_WIDTH = 768


@dataclass(frozen=True)
class Layout:
    """Everything about the output but quantization and dtype. Nothing has been read yet."""

    shapes: Mapping[str, Shape]
    """Canonical name -> shape in the file, as if nothing were quantized, in writing order."""
    modules: Mapping[str, int]
    """Modules that may be quantized, with their number of inputs."""
    rename: Callable[[str], str]
    metadata: Mapping[str, str]
    values: Callable[[], tuple[dict[str, Any], Values]]
    """Reads: config.json (but for quantization), and (canonical name, array) in any order.
    Modules that are kept quantized come in their parts, all others as floats."""


def layout_of(name: str, source: Examined, keep: Mapping[str, object]) -> Layout:
    """The layout called `name` of a source, of which the modules in `keep` stay as they are.

    Raises OptionError for an unknown name and for what cannot be undone.
    """
    if name not in LAYOUTS:
        raise OptionError(f"layout is {name!r}; expected one of {', '.join(LAYOUTS)}.")
    if name != "fastvlm" and source.dialect is Dialect.FOLDED:
        raise OptionError(
            f"{source.folder} is folded, which cannot be undone; convert the original checkpoint "
            f"to layout {name!r}."
        )
    return LAYOUTS[name](source, keep)


def _folded(source: Examined, keep: Mapping[str, object]) -> Layout:
    network = Network(source.config)
    shapes = {name: tuple(array.shape) for name, array in flat_parameters(network)}
    # The tower first, as folding yields it: shards are then filled from front to back.
    shapes = dict(sorted(shapes.items(), key=lambda item: not item[0].startswith("vision.")))

    def values() -> tuple[dict[str, Any], Values]:
        refs = unpacked(source, keep)
        config = source.config
        if source.dialect is not Dialect.FOLDED:
            # Exact powers of two; without them the tower of a 16-bit file may overflow at load.
            config = in_float16_range(config, refs)
        return config_to_dict(config), network_values(refs, config, source.dialect)

    linear = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    return Layout(
        shapes,
        {n.removesuffix(".weight"): shape[-1] for n, shape in shapes.items() if n in linear},
        rename=lambda name: name,
        metadata={"format": FORMAT, "version": FORMAT_VERSION},
        values=values,
    )


def _mlx_vlm(source: Examined, keep: Mapping[str, object]) -> Layout:
    return _unfolded(source, keep, _to_mlx_vlm, channels_last=True, extra=_mlx_vlm_config)


def _apple(source: Examined, keep: Mapping[str, object]) -> Layout:
    return _unfolded(source, keep, _to_apple, channels_last=False, extra=_apple_config)


LAYOUTS: dict[str, Callable[[Examined, Mapping[str, object]], Layout]] = {
    "fastvlm": _folded,
    "mlx-vlm": _mlx_vlm,
    "apple": _apple,
}


def _unfolded(
    source: Examined,
    keep: Mapping[str, object],
    rename: Callable[[str], str],
    *,
    channels_last: bool,
    extra: Callable[[Config], dict[str, Any]],
) -> Layout:
    expected = expected_tensors(source.config)
    expected["vision.head.proj"] = (source.config.vision.out_dim, _CLIP_WIDTH)
    axes = {
        name: {4: (0, 2, 3, 1), 3: (1, 2, 0)}[len(shape)]
        for name, shape in expected.items()
        if channels_last and name.startswith("vision.") and len(shape) > 2
    }

    def arrays() -> Values:
        refs = unpacked(source, keep)
        for name, ref in refs.items():
            array = ref.load()
            yield name, array.transpose(*axes[name]) if name in axes else array
        yield "vision.head.proj", _clip_head(open_checkpoint(source.folder), source.config)

    return Layout(
        {
            name: tuple(shape[a] for a in axes[name]) if name in axes else shape
            for name, shape in expected.items()
        },
        {
            name.removesuffix(".weight"): shape[-1]
            for name, shape in expected.items()
            if not name.startswith("vision.") and len(shape) == 2
        },
        rename,
        {"format": "mlx" if channels_last else "pt"},
        lambda: (config_to_dict(source.config) | extra(source.config), arrays()),
    )


def _clip_head(opened: OpenCheckpoint, config: Config) -> mx.array:
    """FastViTHD's CLIP projection: unused, but a place in the layout; zeros if there is none."""
    shape = (config.vision.out_dim, _CLIP_WIDTH)
    found: list[TensorRef] = [r for n, r in opened.tensors.items() if n.endswith(".head.proj")]
    return found[0].load() if found and found[0].shape == shape else mx.zeros(shape)


def _to_mlx_vlm(name: str) -> str:
    name = re.sub(r"^vision\.patch_embed\.", "vision.patch_embed.blocks.", name)
    name = re.sub(r"^vision\.", "vision_tower.vision_model.", name)
    return re.sub(r"^projector\.fc([12])", _projector("mm_projector"), name)


def _to_apple(name: str) -> str:
    name = re.sub(r"^vision\.", "model.vision_tower.vision_tower.model.", name)
    name = re.sub(r"^language_model\.", "", name)
    return re.sub(r"^projector\.fc([12])", _projector("model.mm_projector"), name)


def _projector(prefix: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{prefix}.{2 * (int(match[1]) - 1)}"


def _mlx_vlm_config(config: Config) -> dict[str, Any]:
    return _apple_config(config) | {
        "image_token_index": -200,
        "vision_config": _mlx_vlm_tower(config.vision),
    }


def _apple_config(config: Config) -> dict[str, Any]:
    """Keys of the genuine files beyond those that change our own reading of them."""
    return {
        "bos_token_id": min(config.eos_token_ids),
        # Peers take one id; the end of a turn is the higher one in every Qwen2 vocabulary.
        "eos_token_id": max(config.eos_token_ids),
        "image_grid_pinpoints": None,
        "max_window_layers": config.text.num_hidden_layers,
        "mm_patch_merge_type": "flat",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "tokenizer_padding_side": "right",
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vision_config": _mlx_vlm_tower(config.vision),
    }


def _mlx_vlm_tower(vision: VisionConfig) -> dict[str, Any]:
    """mlx-vlm's complete `vision_config`; its hidden and projection sizes mean nothing."""
    return {
        "cls_ratio": float(vision.head_ratio),
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * len(vision.layers),
        "embed_dims": list(vision.dims),
        "hidden_size": 1024,
        "image_size": vision.image_size,
        "intermediate_size": vision.out_dim,
        "layer_scale_init_value": 1e-05,
        "layers": list(vision.layers),
        "mlp_ratios": list(vision.mlp_ratios),
        "model_type": "llava_qwen2",
        "num_classes": 1000,
        "patch_size": vision.stride,
        "pos_embs_shapes": [[7, 7] if attends else None for attends in vision.attention],
        "projection_dim": _CLIP_WIDTH,
        "repmixer_kernel_size": 3,
        "token_mixers": ["attention" if a else "repmixer" for a in vision.attention],
    }


def processor_files(folder: Path, source: Examined) -> None:
    """The files by which peers prepare pictures and text (checkpoint notes, section 6.1)."""
    side = source.config.vision.image_size
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": side, "width": side},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_processor_type": "FastVLMImageProcessor",
            "image_std": [1.0, 1.0, 1.0],
            "processor_class": "FastVLMProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": side},
        },
    )
    write_json(folder / "processor_config.json", {"processor_class": "FastVLMProcessor"})
    if not (folder / "tokenizer.json").is_file():
        source.tokenizer.save(folder / "tokenizer.json")
