"""The network's first convolution on Metal, with bias and GELU: 3x3, stride 2, three channels.

A group of threads first copies the weights, as the layer stores them, into threadgroup memory in
tap order. A thread then computes PX x PY outputs for four channels, summing in float: 864
multiply-adds for 27 weight vectors and 135 pixel values, which its neighbours read with it.
"""

import functools
from typing import Any

import mlx.core as mx

from . import rational

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
TILE = (4, 2)  # (PX, PY): 32 floats of sums; not yet measured on a Mac
MAX_CHANNELS = 256  # 27 KB of threadgroup memory, of 32 KB
THREADS = 192

SOURCE = """
  threadgroup float4 taps[27 * CG];
  const int H = x_shape[1], W = x_shape[2];
  const int HO = (H + 1) / 2, WO = (W + 1) / 2;
  const int NX = (WO + PX - 1) / PX, NY = (HO + PY - 1) / PY;
  const int cg = int(thread_position_in_threadgroup.x);
  const int tile = int(thread_position_in_grid.y);

  for (int e = int(thread_index_in_threadgroup); e < 27 * CG; e += CG * TILES) {
    const int at = (e % CG) * 4 * 27 + e / CG;
    taps[e] = float4(float(w[at]), float(w[at + 27]), float(w[at + 54]), float(w[at + 81]));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tile >= x_shape[0] * NY * NX) {
    return;
  }

  const int ox = tile % NX * PX, oy = tile / NX % NY * PY, image = tile / (NX * NY);
  const device T* pixels = x + image * H * W * 3;
  const float4 bias = float4(((const device vec<T, 4>*)b)[cg]);
  float4 acc[PY][PX];
  UNROLL
  for (int t = 0; t < PY; ++t) {
    UNROLL
    for (int i = 0; i < PX; ++i) {
      acc[t][i] = bias;
    }
  }
  constexpr int SPAN = 2 * PX + 1;
  UNROLL
  for (int r = 0; r < 2 * PY + 1; ++r) {
    const int iy = oy * 2 - 1 + r;
    if (iy < 0 || iy >= H) {
      continue;
    }
    float row[SPAN * 3];
    UNROLL
    for (int j = 0; j < SPAN; ++j) {
      const int ix = ox * 2 - 1 + j;
      const bool inside = ix >= 0 && ix < W;
      UNROLL
      for (int c = 0; c < 3; ++c) {
        row[j * 3 + c] = inside ? float(pixels[(iy * W + ix) * 3 + c]) : 0.0f;
      }
    }
    UNROLL
    for (int t = 0; t < PY; ++t) {
      const int kh = r - 2 * t;
      if (kh < 0 || kh >= 3) {
        continue;
      }
      UNROLL
      for (int q = 0; q < 9; ++q) {
        const float4 tap = taps[(kh * 9 + q) * CG + cg];
        UNROLL
        for (int i = 0; i < PX; ++i) {
          acc[t][i] = fma(float4(row[i * 6 + q]), tap, acc[t][i]);
        }
      }
    }
  }
  device vec<T, 4>* out = (device vec<T, 4>*)y + image * HO * WO * CG + cg;
  UNROLL
  for (int t = 0; t < PY; ++t) {
    UNROLL
    for (int i = 0; i < PX; ++i) {
      if (oy + t < HO && ox + i < WO) {
        out[((oy + t) * WO + ox + i) * CG] = vec<T, 4>(fastvlm_gelu(acc[t][i]));
      }
    }
  }
"""

HEADER = """
#define UNROLL _Pragma("clang loop unroll(full)")
"""


def fits(x: mx.array, weight: mx.array, bias: mx.array) -> bool:
    """Whether the kernel takes these arrays; under 8 elements MLX passes `constant` memory."""
    channels = weight.shape[0]
    batch, height, width = x.shape[:3]
    outputs = batch * -(-height // 2) * -(-width // 2) * channels
    return (
        x.dtype in DTYPES
        and weight.dtype == bias.dtype == x.dtype
        and weight.shape[1:] == (3, 3, 3)
        and channels % 4 == 0
        and 8 <= channels <= MAX_CHANNELS
        and 8 <= x.size < 2**31
        and outputs // 4 < 2**31
    )


def run(x: mx.array, weight: mx.array, bias: mx.array, **options: Any) -> mx.array:
    """What `stem_conv` computes, for arrays that `fits`."""
    batch, height, width, _ = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    channels = weight.shape[0]
    groups = channels // 4
    px, py = TILE
    per_group = max(1, THREADS // groups)
    tiles = batch * -(-columns // px) * -(-rows // py)
    (y,) = _metal_kernel()(
        inputs=[x, weight, bias],
        template=[
            ("T", x.dtype),
            ("CG", groups),
            ("PX", px),
            ("PY", py),
            ("TILES", per_group),
        ],
        output_shapes=[(batch, rows, columns, channels)],
        output_dtypes=[x.dtype],
        # Whole groups: all of a group's threads load weights, and its barrier waits for them.
        grid=(groups, -(-tiles // per_group) * per_group, 1),
        threadgroup=(groups, per_group, 1),
        **options,
    )
    result: mx.array = y
    return result


@functools.cache
def _metal_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="fastvlm_stem",
        input_names=["x", "w", "b"],
        output_names=["y"],
        source=SOURCE,
        header=HEADER + rational.METAL,
    )
