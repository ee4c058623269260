"""Training form -> one convolution: against running the branches one by one."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.checkpoint.dialects import canonical_names, detect
from fastvlm_mlx.checkpoint.layout import expected_tensors
from fastvlm_mlx.checkpoint.reparam import fuse, is_training_form
from fastvlm_mlx.checkpoint.tensors import TensorRef
from fastvlm_mlx.config import Config
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.testing import random_checkpoint
from fastvlm_mlx.testing_files import model_config, vocabulary_of

Tensors = dict[str, mx.array]
Refs = dict[str, TensorRef]


def tiny_config() -> Config:
    return model_config("tiny", vocabulary_of("tiny", None), native=False, image_size=None)


@pytest.fixture(scope="module", params=["apple-train", "native-train"])
def tensors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The training form's tensors by canonical name, out of both sets of names."""
    folder = tmp_path_factory.mktemp("train") / "x"
    return read(random_checkpoint(folder, "tiny", request.param, dtype="float32"))


def read(folder: Path) -> Tensors:
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    names = canonical_names(detect(loaded, {}, "x"), loaded, tiny_config().vision)
    return {name: loaded[source] for name, source in names.items()}


def reference(array: mx.array) -> TensorRef:
    return TensorRef("F32", array.shape, lambda: array)


@pytest.fixture
def refs(tensors: Tensors) -> Refs:
    return {name: reference(array) for name, array in tensors.items()}


# ------------------------------------------------------------------ the branches, run one by one


class Branches:
    """Forward passes of the training form, channels last."""

    def __init__(self, tensors: Tensors, owner: str, stride: int = 1) -> None:
        self.tensors, self.owner, self.stride = tensors, owner, stride

    def __contains__(self, name: str) -> bool:
        return f"{self.owner}.{name}" in self.tensors

    def __getitem__(self, name: str) -> mx.array:
        return self.tensors[f"{self.owner}.{name}"]

    def conv(self, x: mx.array, weight: mx.array) -> mx.array:
        groups = x.shape[-1] // weight.shape[1]
        taps = weight.transpose(0, 2, 3, 1)
        return mx.conv2d(x, taps, self.stride, weight.shape[-1] // 2, groups=groups)

    def batch_norm(self, x: mx.array, name: str) -> mx.array:
        variance = self[f"{name}.running_var"] + 1e-5
        normed = (x - self[f"{name}.running_mean"]) / mx.sqrt(variance)
        return normed * self[f"{name}.weight"] + self[f"{name}.bias"]

    def conv_norm(self, x: mx.array, name: str) -> mx.array:
        return self.batch_norm(self.conv(x, self[f"{name}.conv.weight"]), f"{name}.bn")

    def mobile_one(self, x: mx.array, prefix: str = "") -> mx.array:
        parts = []
        if f"{prefix}rbr_skip.weight" in self:
            parts.append(self.batch_norm(x, f"{prefix}rbr_skip"))
        if f"{prefix}rbr_scale.conv.weight" in self:
            parts.append(self.conv_norm(x, f"{prefix}rbr_scale"))
        if f"{prefix}rbr_conv.0.conv.weight" in self:
            parts.append(self.conv_norm(x, f"{prefix}rbr_conv.0"))
        return sum(parts[1:], parts[0])

    def __call__(self, x: mx.array) -> mx.array:
        if "mixer.rbr_conv.0.conv.weight" in self:
            scale = self["layer_scale"].reshape(-1)
            return x + scale * (self.mobile_one(x, "mixer.") - self.mobile_one(x, "norm."))
        if "lkb_origin.conv.weight" in self:
            return self.conv_norm(x, "lkb_origin") + self.conv_norm(x, "small_conv")
        if "pe.weight" in self:
            return x + self.conv(x, self["pe.weight"]) + self["pe.bias"]
        return self.mobile_one(x)


OWNERS = {
    # owner: (input channels, stride)
    "vision.patch_embed.0": (3, 2),
    "vision.patch_embed.1": (16, 2),
    "vision.patch_embed.2": (16, 1),
    "vision.network.0.0.token_mixer": (16, 1),
    "vision.network.4.0.token_mixer": (64, 1),
    "vision.network.1.proj.0": (16, 2),
    "vision.network.8.proj.0": (128, 2),
    "vision.network.3.proj.1": (64, 1),
    "vision.network.6": (128, 1),
    "vision.network.9": (256, 1),
    "vision.conv_exp": (256, 1),
}


@pytest.mark.parametrize("owner", OWNERS)
def test_fused_convolution_is_the_sum_of_its_branches(
    owner: str, tensors: Tensors, refs: Refs
) -> None:
    channels, stride = OWNERS[owner]
    rng = np.random.default_rng(len(owner))
    x = mx.array(rng.standard_normal((2, 12, 9, channels), dtype=np.float32))
    branches = Branches(tensors, owner, stride)
    separately = np.array(branches(x))
    fused = fuse(refs)
    kind = "lkb_reparam" if owner.endswith("proj.0") else "reparam_conv"
    weight, bias = (fused[f"{owner}.{kind}.{part}"].load() for part in ("weight", "bias"))
    together = np.array(branches.conv(x, weight) + bias)
    assert np.abs(together - separately).max() <= 2e-6 * np.abs(separately).max()
    assert np.abs(separately).max() > 0.5


def test_every_branch_counts(tensors: Tensors, refs: Refs) -> None:
    """Doubling any one tensor of a training form changes what it is fused to."""
    before = fuse(refs)
    for owner in ("vision.network.0.0.token_mixer", "vision.network.1.proj.0", "vision.conv_exp"):
        kind = "lkb_reparam" if owner.endswith("proj.0") else "reparam_conv"
        names = [f"{owner}.{kind}.{part}" for part in ("weight", "bias")]
        for name in (n for n in tensors if n.startswith(f"{owner}.") and ".se." not in n):
            after = fuse(refs | {name: reference(tensors[name] * 2)})
            assert any(not mx.allclose(after[n].load(), before[n].load()) for n in names), name


def test_names_and_shapes_become_the_fused_ones(refs: Refs) -> None:
    assert is_training_form(refs)
    fused = fuse(refs)
    assert not is_training_form(fused)
    expected = expected_tensors(tiny_config())
    vision = {n: s for n, s in expected.items() if n.startswith("vision.")}
    assert {n: r.shape for n, r in fused.items() if n.startswith("vision.")} == vision
    # Told before anything is read, and true once it is.
    for name in ("vision.conv_exp.reparam_conv.weight", "vision.network.6.reparam_conv.bias"):
        assert fused[name].load().shape == fused[name].shape
        assert fused[name].dtype == "F32"


def test_fusing_reads_nothing(tensors: Tensors) -> None:
    def refuse() -> mx.array:
        raise AssertionError("read before it was asked for")

    fuse({name: TensorRef("BF16", array.shape, refuse) for name, array in tensors.items()})


def test_bfloat16_files_are_fused_in_float32(tensors: Tensors) -> None:
    halves = {n: a.astype(mx.bfloat16) for n, a in tensors.items()}
    refs = {n: TensorRef("BF16", a.shape, lambda a=a: a) for n, a in halves.items()}
    widened = {n: reference(a.astype(mx.float32)) for n, a in halves.items()}
    name = "vision.network.0.0.token_mixer.reparam_conv.weight"
    made = fuse(refs)[name].load()
    assert made.dtype == mx.float32
    assert mx.array_equal(made, fuse(widened)[name].load())


def test_several_convolution_branches(refs: Refs, tensors: Tensors) -> None:
    owner = "vision.conv_exp"
    first = [n for n in refs if n.startswith(f"{owner}.rbr_conv.0.")]
    doubled = refs | {n.replace("rbr_conv.0", "rbr_conv.1"): refs[n] for n in first}
    x = mx.array(np.random.default_rng(3).standard_normal((1, 5, 6, 256), dtype=np.float32))
    branches = Branches(tensors, owner)
    separately = branches(x) + branches.conv_norm(x, "rbr_conv.0")
    fused = fuse(doubled)
    weight, bias = (fused[f"{owner}.reparam_conv.{p}"].load() for p in ("weight", "bias"))
    together = branches.conv(x, weight) + bias
    assert mx.allclose(together, separately, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- planted errors

MIXER = "vision.network.0.0.token_mixer"
LARGE = "vision.network.1.proj.0"


@pytest.mark.parametrize(
    "name",
    [
        f"{MIXER}.mixer.rbr_conv.0.conv.weight",
        f"{MIXER}.mixer.rbr_conv.0.bn.running_var",
        f"{MIXER}.mixer.rbr_scale.bn.bias",
        f"{MIXER}.mixer.rbr_skip.running_mean",
        f"{MIXER}.norm.rbr_skip.bias",
        f"{MIXER}.layer_scale",
        f"{LARGE}.lkb_origin.conv.weight",
        f"{LARGE}.lkb_origin.bn.weight",
        f"{LARGE}.small_conv.bn.running_mean",
        "vision.patch_embed.0.rbr_conv.0.bn.weight",
        "vision.network.6.pe.weight",
        "vision.network.6.pe.bias",
    ],
)
def test_a_missing_tensor_is_named(name: str, refs: Refs) -> None:
    del refs[name]
    owner = re.sub(r"\.(mixer|norm|lkb_origin|small_conv|rbr_conv|pe|layer_scale)\b.*", "", name)
    with pytest.raises(CheckpointError, match=re.escape(owner)) as caught:
        fuse(refs)
    assert name.removeprefix(f"{owner}.") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{MIXER}.mixer.rbr_scale.conv.weight", (16, 1, 3, 3)),
        (f"{MIXER}.mixer.rbr_conv.0.conv.weight", (16, 9)),
        (f"{MIXER}.mixer.rbr_conv.0.bn.running_var", (8,)),
        (f"{MIXER}.layer_scale", (16,)),
        (f"{LARGE}.small_conv.conv.weight", (32, 1, 5, 5)),
        ("vision.network.6.pe.bias", (1,)),
        ("vision.conv_exp.rbr_scale.bn.weight", (3,)),
    ],
)
def test_a_misshapen_tensor_is_named(name: str, shape: tuple[int, ...], refs: Refs) -> None:
    refs[name] = reference(mx.zeros(shape))
    with pytest.raises(CheckpointError, match=r"shape \(") as caught:
        fuse(refs)
    assert name.rpartition(".rbr")[0].removesuffix(".mixer") in str(caught.value)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        f"{MIXER}.mixer.rbr_extra.weight",
        f"{MIXER}.mixer.rbr_conv.2.conv.weight",
        f"{LARGE}.rbr_skip.weight",
        "vision.patch_embed.0.rbr_reparam.weight",
        "vision.network.6.pe.scale",
    ],
)
def test_an_unknown_branch_is_named(name: str, refs: Refs) -> None:
    refs[name] = reference(mx.ones((16,)))
    with pytest.raises(CheckpointError, match="no known block has") as caught:
        fuse(refs)
    assert re.split(r"\d\.token_mixer\.|proj\.0\.|patch_embed\.0\.|6\.", name)[-1] in str(
        caught.value
    )


@pytest.mark.parametrize(
    "branch",
    [
        "vision.network.0.0.token_mixer.norm.",
        "vision.network.0.0.token_mixer.mixer.rbr_skip.",
        "vision.network.0.0.token_mixer.mixer.rbr_scale.",
        "vision.network.1.proj.0.small_conv.",
        "vision.network.1.proj.1.rbr_skip.",
        "vision.patch_embed.2.rbr_skip.",
        "vision.conv_exp.rbr_scale.",
    ],
)
def test_a_whole_branch_cannot_be_missing(branch: str, refs: Refs) -> None:
    """Without it the sum is still a convolution, but another one."""
    kept = {name: ref for name, ref in refs.items() if not name.startswith(branch)}
    assert len(kept) < len(refs)
    with pytest.raises(CheckpointError, match=r"lacks .*the checkpoint is incomplete"):
        fuse(kept)
