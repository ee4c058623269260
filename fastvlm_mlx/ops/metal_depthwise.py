"""Depthwise convolution on Metal: one kernel for every size, stride, multiplier and trimming.

A thread computes a tile of TW x TH outputs for four channels. It reads each input row it needs
once, as vectors of neighbouring channels, and sums in float; the weights are tap-major, so that
the lanes of a SIMD group read consecutive vectors of them.
"""

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import rational

DTYPES = (mx.float32, mx.float16, mx.bfloat16)

# Index arithmetic is in vectors: four outputs come from four input channels (M = 1) or from two
# (M = 2), so the input too has C*M/4 of its vectors per pixel.
SOURCE = """
  const int H = x_shape[1], W = x_shape[2];
  const int HO = (H + S - 1) / S, WO = (W + S - 1) / S;
  const int CG = x_shape[3] * M / 4, NY = (HO + TH - 1) / TH;
  const int cg = int(thread_position_in_grid.x);
  const int ox = int(thread_position_in_grid.y) * TW;
  const int image = int(thread_position_in_grid.z) / NY;
  const int oy = (int(thread_position_in_grid.z) % NY) * TH;

  const device vec<T, 4 / M>* pixels = (const device vec<T, 4 / M>*)x + image * H * W * CG + cg;
  const device vec<T, 4>* taps = (const device vec<T, 4>*)w + cg;
  device vec<T, 4>* out = (device vec<T, 4>*)y + image * HO * WO * CG + cg;
@PRE_LOAD@
  float4 acc[TH][TW];
  UNROLL
  for (int t = 0; t < TH; ++t) {
    UNROLL
    for (int i = 0; i < TW; ++i) {
      acc[t][i] = @BIAS@;
    }
  }
  constexpr int SPAN = (TW - 1) * S + K;
  for (int r = 0; r < (TH - 1) * S + K; ++r) {
    const int iy = oy * S - K / 2 + r;
    if (iy < 0 || iy >= H) {
      continue;
    }
    float4 row[SPAN];
    UNROLL
    for (int j = 0; j < SPAN; ++j) {
      const int ix = ox * S - K / 2 + j;
      row[j] = float4(0.0f);
      if (ix >= 0 && ix < W) {
        row[j] = fastvlm_spread(pixels[(iy * W + ix) * CG])@PRE_ADD@;
      }
    }
    UNROLL
    for (int t = 0; t < TH; ++t) {
      const int kh = r - t * S;
      if (kh < 0 || kh >= K) {
        continue;
      }
      UNROLL
      for (int q = 0; q < K; ++q) {
        const float4 tap = float4(taps[(kh * K + q) * CG]);
        UNROLL
        for (int i = 0; i < TW; ++i) {
          acc[t][i] = fma(row[i * S + q], tap, acc[t][i]);
        }
      }
    }
  }
  UNROLL
  for (int t = 0; t < TH; ++t) {
    UNROLL
    for (int i = 0; i < TW; ++i) {
      if (oy + t < HO && ox + i < WO) {
        out[((oy + t) * WO + ox + i) * CG] = vec<T, 4>(@RESULT@);
      }
    }
  }
"""

# Input channels to the outputs they feed: one each, or two each.
HEADER = """
#define UNROLL _Pragma("clang loop unroll(full)")

template <typename T>
inline float4 fastvlm_spread(vec<T, 4> v) {
  return float4(v);
}

template <typename T>
inline float4 fastvlm_spread(vec<T, 2> v) {
  return float4(float(v.x), float(v.x), float(v.y), float(v.y));
}
"""


@dataclass(frozen=True)
class Spec:
    """What distinguishes one compiled kernel from another; sizes are read at run time."""

    dtype: mx.Dtype
    k: int
    stride: int
    multiplier: int
    tile: tuple[int, int]
    bias: bool
    pre_bias: bool
    gelu: bool

    def __str__(self) -> str:
        trimmings = [n for n in ("pre_bias", "bias", "gelu") if getattr(self, n)]
        shape = f"{self.k}x{self.k} stride {self.stride} x{self.multiplier}"
        return " ".join([shape, f"tile {self.tile[0]}x{self.tile[1]}", *trimmings, str(self.dtype)])


def tiles(stride: int, columns: int) -> tuple[tuple[int, int], ...]:
    """(TW, TH), outputs per thread: those worth timing, the likeliest first.

    8x2 loads least per output, but LLVM wants 153 registers for it at 7x7, and 101 for 4x2 (its
    AMD backend, as a stand-in); an Apple GPU's thread has 128, and what is more spills to memory.
    With stride 2 even more; half of it would lie beside a map of 4.
    """
    return ((4, 2),) if stride == 2 or columns <= 4 else ((4, 2), (8, 2))


def fits(x: mx.array, weight: mx.array) -> bool:
    """Whether the kernel takes these arrays; under 8 elements MLX passes `constant` memory."""
    channels, outputs = x.shape[-1], weight.shape[-1]
    return (
        x.dtype in DTYPES
        and weight.dtype == x.dtype
        and outputs in (channels, 2 * channels)
        and outputs % 4 == 0
        and channels >= 8
        and x.size < 2**31
    )


def spec(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    stride: int,
    pre_bias: mx.array | None,
    gelu: bool,
) -> Spec:
    """The kernel that these arguments of `run` need, with the likeliest tile."""
    k = weight.shape[0]
    return Spec(
        dtype=x.dtype,
        k=k,
        stride=stride,
        multiplier=weight.shape[2] // x.shape[3],
        tile=tiles(stride, -(-x.shape[2] // stride))[0],
        bias=bias is not None,
        pre_bias=pre_bias is not None,
        gelu=gelu,
    )


def run(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    stride: int,
    pre_bias: mx.array | None,
    gelu: bool,
    kernel: Spec | None = None,
    **options: Any,
) -> mx.array:
    """What `depthwise_conv` computes, for arrays that `fits`."""
    kernel = kernel or spec(x, weight, bias, stride, pre_bias, gelu)
    batch, height, width, _ = x.shape
    rows, columns, outputs = -(-height // stride), -(-width // stride), weight.shape[2]
    tw, th = kernel.tile
    groups = outputs // 4
    lanes = min(groups, 64)
    (y,) = _metal_kernel(kernel.bias, kernel.pre_bias, kernel.gelu)(
        inputs=[a for a in (x, weight, bias, pre_bias) if a is not None],
        template=[
            ("T", x.dtype),
            ("K", kernel.k),
            ("S", stride),
            ("M", kernel.multiplier),
            ("TW", tw),
            ("TH", th),
        ],
        output_shapes=[(batch, rows, columns, outputs)],
        output_dtypes=[x.dtype],
        grid=(groups, -(-columns // tw), batch * -(-rows // th)),
        threadgroup=(lanes, max(1, 128 // lanes), 1),
        **options,
    )
    result: mx.array = y
    return result


@functools.cache
def _metal_kernel(bias: bool, pre_bias: bool, gelu: bool) -> Any:
    names = ["x", "w"] + ["b"] * bias + ["pre"] * pre_bias
    vectors = "\n  const float4 before = fastvlm_spread(((const device vec<T, 4 / M>*)pre)[cg]);"
    parts = {
        "@PRE_LOAD@": vectors if pre_bias else "",
        "@PRE_ADD@": " + before" if pre_bias else "",
        "@BIAS@": "float4(((const device vec<T, 4>*)b)[cg])" if bias else "float4(0.0f)",
        "@RESULT@": "fastvlm_gelu(acc[t][i])" if gelu else "acc[t][i]",
    }
    source = SOURCE
    for mark, text in parts.items():
        source = source.replace(mark, text)
    return mx.fast.metal_kernel(
        name="_".join(["fastvlm_depthwise", *names[2:], *["gelu"] * gelu]),
        input_names=names,
        output_names=["y"],
        source=source,
        header=HEADER + (rational.METAL if gelu else ""),
    )
