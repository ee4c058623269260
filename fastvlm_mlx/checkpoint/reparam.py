"""Training form -> fused form: parallel branches and BatchNorms become one convolution.

Works on Apple's names (`dialects.py` has renamed timm's) and lazily: the result is another
dictionary of tensor references, whose shapes are known before anything is computed. The algebra
is that of checkpoint notes, section 5; all of it runs in float32.
"""

import re
from collections.abc import Mapping

import mlx.core as mx

from ..errors import CheckpointError
from .fold import BN_EPS
from .tensors import TensorRef

__all__ = ["fuse", "is_training_form"]

Shape = tuple[int, ...]
Kernel = tuple[mx.array, mx.array]
"""Weight (O, I/groups, k, k) and bias (O,) of one convolution."""

_BRANCH = re.compile(
    r"^(?P<owner>.+?)\.(?:norm\.rbr_|mixer\.rbr_|rbr_|lkb_origin\.|small_conv\.|pe\.)"
)


def is_training_form(names: Mapping[str, object]) -> bool:
    """Whether any name belongs to an unfused branch."""
    return any(_BRANCH.match(name) for name in names if name.startswith("vision."))


def fuse(refs: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Replace every group of branches by `reparam_conv` (or `lkb_reparam`) weight and bias.

    Raises CheckpointError for missing, unknown or misshapen branches, before reading any.
    """
    groups: dict[str, dict[str, TensorRef]] = {}
    fused: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        match = _BRANCH.match(name) if name.startswith("vision.") else None
        if match is None:
            fused[name] = ref
        else:
            groups.setdefault(match["owner"], {})[name[len(match["owner"]) + 1 :]] = ref
    for owner, group in groups.items():
        # RepMixer's own layer scale disappears here; the block's stays.
        if any(name.startswith("mixer.") for name in group) and f"{owner}.layer_scale" in fused:
            group["layer_scale"] = fused.pop(f"{owner}.layer_scale")
        fused |= _fused_convolution(owner, group)
    return fused


class _Branches:
    """The branches of one convolution: hands out arrays, checking names and shapes."""

    def __init__(self, owner: str, refs: Mapping[str, TensorRef], *, dry: bool) -> None:
        self._owner, self._refs, self._dry = owner, refs, dry
        self._unused = set(refs)

    def __contains__(self, name: str) -> bool:
        return name in self._refs

    def take(self, name: str, shape: Shape) -> mx.array:
        """The float32 array `name`; a lazy stand-in of the same shape in a dry run."""
        ref = self._refs.get(name)
        if ref is None:
            raise CheckpointError(
                f"{self._owner} is in training form but lacks {name}; the checkpoint is incomplete."
            )
        if ref.shape != shape:
            raise CheckpointError(
                f"{self._owner}.{name} has shape {ref.shape}; expected {shape} beside its branches."
            )
        self._unused.discard(name)
        return mx.zeros(shape) if self._dry else ref.load().astype(mx.float32)

    def finish(self) -> None:
        """Raise CheckpointError if anything was left over."""
        unused = sorted(n for n in self._unused if not n.endswith("num_batches_tracked"))
        if unused:
            raise CheckpointError(
                f"{self._owner} has branches that no known block has: {', '.join(unused[:3])}."
            )


def _fused_convolution(owner: str, group: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    if any(name.startswith("mixer.") for name in group):
        conv, kernel, fused = "mixer.rbr_conv.0.conv", _repmixer, "reparam_conv"
    elif any(name.startswith("lkb_origin.") for name in group):
        conv, kernel, fused = "lkb_origin.conv", _large_kernel, "lkb_reparam"
    elif any(name.startswith("pe.") for name in group):
        conv, kernel, fused = "pe", _position, "reparam_conv"
    else:
        conv, kernel, fused = "rbr_conv.0.conv", _mobile_one, "reparam_conv"
    model = group.get(f"{conv}.weight")
    if model is None or len(model.shape) != 4:
        raise CheckpointError(
            f"{owner} is in training form but {conv}.weight is "
            f"{'missing' if model is None else f'of shape {model.shape}'}; expected 4 dimensions."
        )
    shape = model.shape
    absent = [name for name in _required(owner, kernel, shape) if name not in group]
    if absent:
        raise CheckpointError(
            f"{owner} is in training form but lacks {absent[0]}; every branch is needed, the "
            "checkpoint is incomplete."
        )
    dry = _Branches(owner, group, dry=True)
    kernel(dry, shape)
    dry.finish()

    def compute(part: int) -> mx.array:
        return kernel(_Branches(owner, group, dry=False), shape)[part]

    return {
        f"{owner}.{fused}.weight": TensorRef("F32", shape, lambda: compute(0)),
        f"{owner}.{fused}.bias": TensorRef("F32", shape[:1], lambda: compute(1)),
    }


def _required(owner: str, kernel: object, shape: Shape) -> list[str]:
    """A tensor of each branch that this convolution is trained with (notes, section 4)."""
    if kernel is _repmixer:
        skips = ["norm.rbr_skip.weight", "mixer.rbr_skip.weight"]
        return [*skips, "mixer.rbr_scale.conv.weight", "layer_scale"]
    if kernel is _large_kernel:
        return ["small_conv.conv.weight"]
    if kernel is _position:
        return ["pe.bias"]
    names = ["rbr_skip.weight"] if shape[0] == shape[1] and shape[2:] == (1, 1) else []
    return [*names, "rbr_scale.conv.weight"] if owner.endswith("conv_exp") else names


def _mobile_one(branches: _Branches, shape: Shape, prefix: str = "") -> Kernel:
    """Sum of the k x k branches, the 1x1 branch and the skip, each with its BatchNorm."""
    weight, bias = mx.zeros(shape), mx.zeros(shape[:1])
    parts: list[Kernel] = []
    while f"{prefix}rbr_conv.{len(parts)}.conv.weight" in branches:
        parts.append(_conv_bn(branches, f"{prefix}rbr_conv.{len(parts)}", shape))
    if f"{prefix}rbr_scale.conv.weight" in branches:
        small, shift = _conv_bn(branches, f"{prefix}rbr_scale", (*shape[:2], 1, 1))
        parts.append((_pad(small, shape), shift))
    if f"{prefix}rbr_skip.weight" in branches:
        gain, shift = _batch_norm(branches, f"{prefix}rbr_skip", shape[:1])
        parts.append((_identity(shape) * gain[:, None, None, None], shift))
    for part_weight, part_bias in parts:
        weight, bias = weight + part_weight, bias + part_bias
    return weight, bias


def _large_kernel(branches: _Branches, shape: Shape) -> Kernel:
    weight, bias = _conv_bn(branches, "lkb_origin", shape)
    if "small_conv.conv.weight" in branches:
        small, shift = _conv_bn(branches, "small_conv", (*shape[:2], 3, 3))
        weight, bias = weight + _pad(small, shape), bias + shift
    return weight, bias


def _position(branches: _Branches, shape: Shape) -> Kernel:
    return branches.take("pe.weight", shape) + _identity(shape), branches.take("pe.bias", shape[:1])


def _repmixer(branches: _Branches, shape: Shape) -> Kernel:
    # x + layer_scale * (mixer(x) - norm(x)), the form RepMixer is trained in; norm is a skip only.
    weight, bias = _mobile_one(branches, shape, "mixer.")
    norm_weight, norm_bias = _mobile_one(branches, shape, "norm.")
    scale = branches.take("layer_scale", (shape[0], 1, 1)).reshape(-1)
    delta = (weight - norm_weight) * scale[:, None, None, None]
    return _identity(shape) + delta, scale * (bias - norm_bias)


def _conv_bn(branches: _Branches, name: str, shape: Shape) -> Kernel:
    gain, shift = _batch_norm(branches, f"{name}.bn", shape[:1])
    return branches.take(f"{name}.conv.weight", shape) * gain[:, None, None, None], shift


def _batch_norm(branches: _Branches, name: str, shape: Shape) -> Kernel:
    mean = branches.take(f"{name}.running_mean", shape)
    variance = branches.take(f"{name}.running_var", shape)
    gain = branches.take(f"{name}.weight", shape) * mx.rsqrt(variance + BN_EPS)
    return gain, branches.take(f"{name}.bias", shape) - mean * gain


def _pad(weight: mx.array, shape: Shape) -> mx.array:
    border = (shape[-1] - weight.shape[-1]) // 2
    return mx.pad(weight, [(0, 0), (0, 0), (border, border), (border, border)])


def _identity(shape: Shape) -> mx.array:
    """The kernel that copies its input: output i reads channel i of its group, in the centre."""
    outputs, inputs, size, _ = shape
    channel = mx.arange(outputs)[:, None] % inputs == mx.arange(inputs)[None]
    centre = mx.arange(size) == size // 2
    taps = centre[:, None] & centre[None]
    return (channel[:, :, None, None] & taps).astype(mx.float32)
