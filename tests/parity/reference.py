"""The torch side: random, well-scaled reference models and reference preprocessing.

"Well-scaled" means that activations stay O(1) to O(10) through all 48 blocks, that every weight
changes the output visibly (test_reference.py measures it), and that BN statistics, both eps and
the layer scales are far from the values under which a mistake would not show.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from timm.layers import ConvNormAct
from timm.models.fastvit import (
    Attention,
    ConvMlp,
    LayerScale2d,
    MobileOneBlock,
    ReparamLargeKernelConv,
    RepConditionalPosEnc,
    RepMixer,
)
from torch import Tensor, nn
from transformers.initialization import no_init_weights

STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "stage5", "head")


# ---------------------------------------------------------------------------------------- tower


@contextmanager
def uninitialised() -> Iterator[None]:
    """Build models without their own slow initialisation: every weight is filled here anyway."""
    with no_init_weights(), mock.patch("timm.models.fastvit.trunc_normal_"):
        yield


@functools.cache
def tower(*, fused: bool) -> nn.Module:
    """FastViTHD as timm has it (fastvit_mci3), with random weights."""
    with uninitialised():
        model = timm.create_model(
            "fastvit_mci3", pretrained=False, num_classes=0, global_pool="", inference_mode=fused
        )
    randomise_tower(model.eval(), seed=0)
    return model


@torch.no_grad()
def randomise_tower(model: nn.Module, seed: int) -> None:
    """Fill a fastvit_mci3, fused or not, with random weights, then scale it layer by layer."""
    model.to(memory_format=torch.channels_last)  # six times faster on a CPU
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            _randomise_linear(module, g)
        elif isinstance(module, nn.BatchNorm2d):
            # Some variances are so small that eps counts; gamma takes the imbalance out again.
            module.running_var.copy_(10 ** _uniform(module.bias.shape, -3.5, 0.3, g).double())
            deviation = module.running_var.sqrt()
            module.running_mean.copy_(deviation * _noise(module.bias.shape, 0.3, g))
            module.weight.copy_(deviation * _uniform(module.weight.shape, 0.5, 1.5, g))
            module.bias.copy_(_noise(module.bias.shape, 0.3, g))
        elif isinstance(module, nn.LayerNorm):
            module.weight.copy_(_uniform(module.weight.shape, 0.5, 1.5, g))
            module.bias.copy_(_noise(module.bias.shape, 0.3, g))
        elif isinstance(module, LayerScale2d):
            module.gamma.copy_(_uniform(module.gamma.shape, 0.1, 1.0, g))
    for module in model.modules():
        if isinstance(module, ConvMlp):  # residual branches that add, and do not drown the rest
            module.fc2.weight.mul_(0.6)
        elif isinstance(module, Attention):  # logits wide enough for the softmax to choose
            module.qkv.weight[: 2 * module.proj.in_features].mul_(1.5)
        elif isinstance(module, RepMixer):
            if module.reparam_conv is not None:
                module.reparam_conv.weight.mul_(0.5)[:, :, 1, 1].add_(1.0)
            else:
                for branch in (module.mixer.conv_kxk[0], module.mixer.conv_scale):
                    branch.bn.weight.mul_(0.5)
    _scale_by_data(model, g)


def _randomise_linear(module: nn.Conv2d | nn.Linear, g: torch.Generator) -> None:
    fan_in = module.weight[0].numel()
    module.weight.copy_(_noise(module.weight.shape, 1 / math.sqrt(fan_in), g))
    if module.bias is not None:
        module.bias.copy_(_noise(module.bias.shape, 0.2, g))


def _scale_by_data(model: nn.Module, g: torch.Generator) -> None:
    """Give every convolution outside the residual branches centred outputs of O(1), front to back.

    Without this, random features are nearly the same constant for every picture. It is done in
    float64, so that the weights, rounded, are the same on every processor.
    """
    model.double()
    hooks = []
    for name, module in model.named_modules():
        target = 1.0
        if isinstance(module, MobileOneBlock | ReparamLargeKernelConv):
            chosen = name.startswith(("stem", "final_conv")) or ".downsample." in name
        else:
            chosen = isinstance(module, RepMixer | RepConditionalPosEnc)
            if name == "stages.3.pos_emb":
                # Stage 4's first LayerNorm sees a variance of 4e-4: its eps of 1e-5 is then 2.5 %.
                target = 0.02
        if chosen:
            hook = functools.partial(_normalise, target=target)
            hooks.append(module.register_forward_pre_hook(hook))
    model(nchw(np.concatenate([noise_pixels(128, 128, g) for _ in range(6)])).double())
    for hook in hooks:
        hook.remove()
    model.float()


def _normalise(module: nn.Module, args: tuple[Tensor], target: float) -> None:
    """Before `module` sees its input: shift and scale its channels to mean 0 and that RMS."""
    (x,) = args
    if isinstance(module, RepMixer) and module.reparam_conv is None:
        change = module.mixer(x) - module.norm(x)
        module.mixer.conv_kxk[0].bn.bias.sub_(change.mean((0, 2, 3)))
    elif isinstance(module, RepConditionalPosEnc) and module.reparam_conv is None:
        module.pos_enc.bias.sub_((module.pos_enc(x) + x).mean((0, 2, 3)))
    else:
        branches = [module.reparam_conv] if module.reparam_conv is not None else _branches(module)
        output = sum(branch(x) for branch in branches)
        factor = target / output.std((0, 2, 3)).clamp(min=output.std() / 10)
        affine = [b.bn if isinstance(b, ConvNormAct) else b for b in branches]
        for part in affine:
            part.weight.mul_(factor.reshape(-1, *[1] * (part.weight.ndim - 1)))
            part.bias.mul_(factor)
        affine[0].bias.sub_(factor * output.mean((0, 2, 3)))


def _branches(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, ReparamLargeKernelConv):
        return [module.large_conv, module.small_conv]
    found = [module.identity, module.conv_scale, *module.conv_kxk]
    return [branch for branch in found if branch is not None]


def stages(model: nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Every stage's output as an NHWC array, in order; the last is the whole tower's."""
    parts = [model.stem, *model.stages, model.final_conv]
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            found[name] = output.permute(0, 2, 3, 1).contiguous().numpy()

        return hook

    hooks = [p.register_forward_hook(keep(n)) for n, p in zip(STAGES, parts, strict=True)]
    with torch.no_grad():
        model.forward_features(nchw(pixels))
    for hook in hooks:
        hook.remove()
    return found


# -------------------------------------------------------------------------------- language model


@torch.no_grad()
def randomise_language(model: nn.Module, usable: Sequence[int], seed: int) -> None:
    """Fill a FastVlmForConditionalGeneration's projector and Qwen2 with random weights.

    Only tokens in `usable` can become the answer: rows of special and padding tokens are small,
    so greedy decoding neither stops nor reaches ids that no tokenizer knows.
    """
    g = torch.Generator().manual_seed(seed)
    for module in (model.model.multi_modal_projector, model.model.language_model):
        for part in module.modules():
            if isinstance(part, nn.Linear):
                _randomise_linear(part, g)
    for name, weight in model.model.language_model.named_parameters():
        if "norm" in name:
            weight.copy_(_uniform(weight.shape, 0.5, 1.5, g))
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(1.5)  # attention that chooses, and
        elif name.endswith("bias"):
            weight.mul_(0.25)  # little that is the same everywhere: else answers repeat one token
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for table in (embedding,) if embedding is head else (embedding, head):
        table.copy_(_noise(table.shape, 1 / math.sqrt(table.shape[1]), g))
    unused = torch.ones(len(head), dtype=torch.bool)
    unused[torch.tensor(list(usable))] = False
    head[unused] *= 0.05


@torch.no_grad()
def round_to_bfloat16(model: nn.Module) -> None:
    """Make every weight representable in bfloat16, so that both file dtypes hold the same model."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16().float())


# ---------------------------------------------------------------------------------------- images


def noise_pixels(height: int, width: int, g: torch.Generator) -> np.ndarray:
    """An image in [0, 1] with detail at every scale, (1, height, width, 3) float32."""
    image = _noise((1, 3, 1, 1), 1, g).double()
    for cells in (2, 5, 16, 64):
        coarse = _noise((1, 3, cells, cells), 1, g).double() * torch.rand(1, generator=g)
        image = image + nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return image.sigmoid().float().permute(0, 2, 3, 1).contiguous().numpy()


def picture(folder: Path, width: int, height: int, seed: int) -> Path:
    """A PNG file of that size."""
    pixels = noise_pixels(height, width, torch.Generator().manual_seed(seed))[0]
    path = folder / f"{width}x{height}-{seed}.png"
    Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(path)
    return path


def padded(path: Path, size: int) -> np.ndarray:
    """Apple's predict.py: a black square around the picture, then bicubic.

    Returns (size, size, 3) uint8.
    """
    image = Image.open(path).convert("RGB")
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), (0, 0, 0))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def to_unit(image: np.ndarray) -> np.ndarray:
    """Bytes to floats in [0, 1], with a batch axis in front."""
    return (image[None] * (1 / 255)).astype(np.float32)


def nchw(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) array to (B, 3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------ arithmetic


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference over the reference's largest absolute value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"got shape {ours.shape}, expected {theirs.shape}"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())  # NaN fails every limit


def _noise(shape: torch.Size, std: float, g: torch.Generator) -> Tensor:
    # Uniform: the same bits on every processor, as normal numbers (libm) are not.
    return (torch.rand(shape, generator=g) - 0.5) * (std * math.sqrt(12))


def _uniform(shape: torch.Size, low: float, high: float, g: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)
