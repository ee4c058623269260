"""A matrix product with bias and GELU on Metal: the sums never reach memory before the GELU.

Four SIMD groups, two by two, share a tile of BM x BN outputs as 8x8 matrices in float; tiles of
both factors pass through threadgroup memory, BK columns at a time.
"""

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import rational

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
TILES = ((64, 64), (64, 32))  # (BM, BN), the likelier first; not yet measured on a Mac
THREADS = 128

# A lane holds two neighbours of a matrix's row. Output columns are dealt to matrices in pairs, so
# that a lane's two pairs make four neighbours: one vector for the GELU and for the store.
SOURCE = """
  constexpr int TM = BM / 16, TN = BN / 16, VECTORS = BK / 4;
  // Rows padded apart, so that the lanes of one load fall into different banks.
  constexpr int LX = BK + 8, LW = BK + 4;
  threadgroup vec<T, 4> xs[BM * LX / 4];
  threadgroup vec<T, 4> ws[BN * LW / 4];
  const threadgroup vec<T, 2>* pairs = (const threadgroup vec<T, 2>*)xs;
  const threadgroup T* scalars = (const threadgroup T*)ws;

  const int M = x_shape[0], K = x_shape[1], N = w_shape[0];
  const uint3 tile = threadgroup_position_in_grid;
  const bool wide = M < N;
  const int m0 = int(wide ? tile.x : tile.y) * BM, n0 = int(wide ? tile.y : tile.x) * BN;
  const int thread_index = int(thread_index_in_threadgroup);
  const int simd = int(simdgroup_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
  const int quad = lane / 4;
  const int row = (quad & 4) + (lane / 2) % 4, column = (quad & 2) * 2 + (lane % 2) * 2;
  const int sm = (simd / 2) * (BM / 2), sn = (simd % 2) * (BN / 2);

  const device vec<T, 4>* left = (const device vec<T, 4>*)x;
  const device vec<T, 4>* right = (const device vec<T, 4>*)w;

  metal::simdgroup_matrix<float, 8, 8> sums[TM][TN];
  UNROLL
  for (int i = 0; i < TM; ++i) {
    UNROLL
    for (int j = 0; j < TN; ++j) {
      sums[i][j].thread_elements()[0] = 0.0f;
      sums[i][j].thread_elements()[1] = 0.0f;
    }
  }

  // Past the last row of either factor, the last one again: computed, but not stored.
  for (int k0 = 0; k0 < K; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int i = 0; i < BM * VECTORS / THREADS; ++i) {
      const int e = i * THREADS + thread_index, r = e / VECTORS, v = e % VECTORS;
      xs[r * (LX / 4) + v] = left[(min(m0 + r, M - 1) * K + k0) / 4 + v];
    }
    UNROLL
    for (int i = 0; i < BN * VECTORS / THREADS; ++i) {
      const int e = i * THREADS + thread_index, r = e / VECTORS, v = e % VECTORS;
      ws[r * (LW / 4) + v] = right[(min(n0 + r, N - 1) * K + k0) / 4 + v];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    UNROLL
    for (int k = 0; k < BK; k += 8) {
      metal::simdgroup_matrix<float, 8, 8> down[TM], across[TN];
      UNROLL
      for (int i = 0; i < TM; ++i) {
        const vec<T, 2> v = pairs[((sm + i * 8 + row) * LX + k + column) / 2];
        down[i].thread_elements()[0] = float(v.x);
        down[i].thread_elements()[1] = float(v.y);
      }
      UNROLL
      for (int j = 0; j < TN; ++j) {
        const int n = sn + (j / 2) * 16 + (j % 2) * 2 + column * 2;
        across[j].thread_elements()[0] = float(scalars[n * LW + k + row]);
        across[j].thread_elements()[1] = float(scalars[(n + 1) * LW + k + row]);
      }
      UNROLL
      for (int i = 0; i < TM; ++i) {
        UNROLL
        for (int j = 0; j < TN; ++j) {
          simdgroup_multiply_accumulate(sums[i][j], down[i], across[j], sums[i][j]);
        }
      }
    }
  }

  const device vec<T, 4>* addend = (const device vec<T, 4>*)b;
  device vec<T, 4>* out = (device vec<T, 4>*)y;
  UNROLL
  for (int j = 0; j < TN; j += 2) {
    const int n = n0 + sn + j * 8 + column * 2;
    if (n >= N) {
      continue;
    }
    const float4 bias = float4(addend[n / 4]);
    UNROLL
    for (int i = 0; i < TM; ++i) {
      const int m = m0 + sm + i * 8 + row;
      if (m < M) {
        const float4 sum = float4(
            sums[i][j].thread_elements()[0], sums[i][j].thread_elements()[1],
            sums[i][j + 1].thread_elements()[0], sums[i][j + 1].thread_elements()[1]);
        out[(m * N + n) / 4] = vec<T, 4>(fastvlm_gelu(sum + bias));
      }
    }
  }
"""

HEADER = f"""
#include <metal_simdgroup_matrix>
#define UNROLL _Pragma("clang loop unroll(full)")
constant constexpr int THREADS = {THREADS};
"""


@dataclass(frozen=True)
class Spec:
    """What distinguishes one compiled kernel from another; sizes are read at run time."""

    dtype: mx.Dtype
    tile: tuple[int, int]
    depth: int

    def __str__(self) -> str:
        return f"tile {self.tile[0]}x{self.tile[1]}x{self.depth} {self.dtype}"


def spec(x: mx.array, tile: tuple[int, int] = TILES[0]) -> Spec:
    """The kernel for rows as long as those of x. Deeper tiles mean fewer barriers."""
    deep = x.dtype != mx.float32 and x.shape[-1] % 32 == 0
    return Spec(x.dtype, tile, 32 if deep else 16)


def fits(x: mx.array, weight: mx.array, bias: mx.array) -> bool:
    """Whether the kernel takes these arrays; under 8 elements MLX passes `constant` memory."""
    outputs, inputs = weight.shape
    return (
        x.dtype in DTYPES
        and weight.dtype == bias.dtype == x.dtype
        and inputs % 16 == 0
        and outputs % 4 == 0
        and outputs >= 8
        and 0 < x.size < 2**31
        and weight.size < 2**31
        and x.size // inputs * outputs < 2**31
    )


def run(
    x: mx.array, weight: mx.array, bias: mx.array, kernel: Spec | None = None, **options: Any
) -> mx.array:
    """What `linear_gelu` computes, for arrays that `fits`."""
    kernel = kernel or spec(x)
    rows = x.reshape(-1, x.shape[-1])
    m, n = rows.shape[0], weight.shape[0]
    # Neighbouring groups share the larger factor's rows; the smaller one is swept from the cache.
    wide = m < n  # as the kernel says
    tiles = [-(-m // kernel.tile[0]), -(-n // kernel.tile[1])]
    fast, slow = tiles if wide else reversed(tiles)
    (y,) = _metal_kernel()(
        inputs=[rows, weight, bias],
        template=[
            ("T", x.dtype),
            ("BM", kernel.tile[0]),
            ("BN", kernel.tile[1]),
            ("BK", kernel.depth),
        ],
        output_shapes=[(m, n)],
        output_dtypes=[x.dtype],
        grid=(fast * THREADS, slow, 1),
        threadgroup=(THREADS, 1, 1),
        **options,
    )
    result: mx.array = y.reshape(*x.shape[:-1], n)
    return result


@functools.cache
def _metal_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="fastvlm_linear_gelu",
        input_names=["x", "w", "b"],
        output_names=["y"],
        source=SOURCE,
        header=HEADER + rational.METAL,
    )
