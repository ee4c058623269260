"""The counter, on graphs whose cost can be worked out by hand."""

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.benchmarks.counting import count_encoder, count_launches, total
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.vision import FastViTHD

X = mx.zeros((32, 64), mx.float16)
W = mx.eye(64, dtype=mx.float16)
B = mx.zeros((64,), mx.float16)
mx.eval(X, W, B)
MAP = 32 * 64 * 2  # bytes


def test_matrix_product_with_its_addend() -> None:
    cost = count_launches(lambda x: mx.addmm(B, x, W), X, compiled=False)
    assert [launch.name for launch in cost.launches] == ["AddMM"]
    assert cost.flops == 2 * 32 * 64 * 64
    assert cost.bytes == 2 * MAP + 64 * 64 * 2 + 64 * 2, "a broadcast bias is read once"


def test_compiling_fuses_a_chain_of_element_wise_operations() -> None:
    def chain(x: mx.array) -> mx.array:
        return mx.sqrt(mx.abs(x) + 1) * x

    loose = count_launches(chain, X, compiled=False)
    fused = count_launches(chain, X, compiled=True)
    assert len(loose.launches) == 4 and len(fused.launches) == 1
    assert fused.bytes < loose.bytes / 3


def test_a_value_with_two_consumers_is_not_fused_away() -> None:
    def fork(x: mx.array) -> mx.array:
        y = mx.exp(x)
        return mx.addmm(y, y, W)

    assert len(count_launches(fork, X, compiled=True).launches) == 2

    def both_are_element_wise(x: mx.array) -> mx.array:
        y = mx.exp(x)
        return mx.matmul(mx.sqrt(y), mx.abs(y).T)

    launches = count_launches(both_are_element_wise, X, compiled=True).launches
    assert sorted(launch.name for launch in launches) == ["Abs", "Exp", "Matmul", "Sqrt"]


def test_views_are_free_and_strided_copies_are_not() -> None:
    assert count_launches(lambda x: x.reshape(64, 32)[:, None], X, compiled=False).launches == ()
    copied = count_launches(lambda x: x.T.reshape(-1), X, compiled=False)
    assert [launch.bytes for launch in copied.launches] == [2 * MAP]
    part = count_launches(lambda x: mx.exp(x[:4]), X, compiled=False)
    assert [launch.bytes for launch in part.launches] == [2 * MAP // 8], "a slice reads its part"


def test_a_convolution_gets_a_copy_of_a_strided_map() -> None:
    kernel = mx.zeros((8, 3, 3, 4), mx.float16)
    mx.eval(kernel)

    def turned(x: mx.array) -> mx.array:
        return mx.conv2d(mx.exp(x).transpose(0, 2, 1, 3), kernel, padding=1)

    picture = mx.zeros((1, 16, 32, 4), mx.float16)
    launches = count_launches(turned, picture, compiled=False).launches
    assert [launch.name for launch in launches] == ["Exp", "copy", "Convolution"]
    assert launches[1].bytes == 2 * picture.nbytes


def test_fused_kernels_of_mlx_count_once() -> None:
    assert len(count_launches(nn.GELU(), X, compiled=False).launches) == 1
    assert (
        len(
            count_launches(
                lambda x: mx.fast.layer_norm(x, None, None, 1e-5), X, compiled=False
            ).launches
        )
        == 1
    )
    q = mx.zeros((1, 4, 32, 64), mx.float16)
    wide = count_launches(
        lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0), q, compiled=False
    )
    narrow = count_launches(
        lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0),
        q[..., :32],
        compiled=False,
    )
    assert len(wide.launches) == 1 < 4 <= len(narrow.launches), "32 wide is not fused on Metal"


def test_the_encoder_scales_with_the_picture() -> None:
    tower = FastViTHD(
        VisionConfig(layers=(1, 1, 1, 1, 1), dims=(16, 32, 64, 128, 256), image_size=256)
    )
    small, large = (total(count_encoder(tower, side).values()) for side in (384, 768))
    assert len(small.launches) == len(large.launches)
    assert 3.5 < large.flops / small.flops < 4.5
    assert 2 < large.bytes / small.bytes < 4, "weights do not grow with the picture"
