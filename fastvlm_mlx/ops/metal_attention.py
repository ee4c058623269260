"""Attention with 32-wide heads on Metal, straight from the packed projection.

One thread owns one query row: its query and its output live in registers. Keys and values pass
through threadgroup memory in tiles of KEYS rows; all lanes read the same row at the same time.
The softmax is the online one, in float, in base 2.
"""

import functools
from typing import Any

import mlx.core as mx

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
HEAD_DIM = 32
QUERIES = 64  # threads in a group: two SIMD groups, for enough groups at 256 positions

# A row of 32 is 8 vectors. -1e30 stands for minus infinity, whose differences would be NaN.
SOURCE = """
  constexpr int VECTORS = 8, KEYS = 32, CHUNK = 16;
  threadgroup float4 keys[KEYS * VECTORS];
  threadgroup float4 values[KEYS * VECTORS];

  const int N = qkv_shape[1], ROW = qkv_shape[2] / 4, HEADS = ROW / (3 * VECTORS);
  const int head = int(threadgroup_position_in_grid.y);
  const int image = int(threadgroup_position_in_grid.z);
  const int lane = int(thread_position_in_threadgroup.x);
  const int row = int(thread_position_in_grid.x);
  const device vec<T, 4>* rows = (const device vec<T, 4>*)qkv + image * N * ROW + head * VECTORS;

  float4 query[VECTORS], sum[VECTORS];
  UNROLL
  for (int d = 0; d < VECTORS; ++d) {
    query[d] = float4(rows[min(row, N - 1) * ROW + d]) * SCALE;
    sum[d] = float4(0.0f);
  }
  float peak = -1e30f, total = 0.0f;

  for (int base = 0; base < N; base += KEYS) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < KEYS * VECTORS; e += QUERIES) {
      const int key = base + e / VECTORS;
      const int at = key * ROW + HEADS * VECTORS + e % VECTORS;
      keys[e] = key < N ? float4(rows[at]) : float4(0.0f);
      values[e] = key < N ? float4(rows[at + HEADS * VECTORS]) : float4(0.0f);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (int first = 0; first < KEYS && base + first < N; first += CHUNK) {
      float score[CHUNK];
      float highest = peak;
      UNROLL
      for (int j = 0; j < CHUNK; ++j) {
        float4 products = float4(0.0f);
        UNROLL
        for (int d = 0; d < VECTORS; ++d) {
          products = fma(query[d], keys[(first + j) * VECTORS + d], products);
        }
        score[j] = products.x + products.y + products.z + products.w;
        score[j] = base + first + j < N ? score[j] : -1e30f;
        highest = max(highest, score[j]);
      }
      const float shrink = metal::fast::exp2(peak - highest);
      peak = highest;
      total *= shrink;
      UNROLL
      for (int d = 0; d < VECTORS; ++d) {
        sum[d] *= shrink;
      }
      UNROLL
      for (int j = 0; j < CHUNK; ++j) {
        const float p = metal::fast::exp2(score[j] - peak);
        total += p;
        UNROLL
        for (int d = 0; d < VECTORS; ++d) {
          sum[d] = fma(float4(p), values[(first + j) * VECTORS + d], sum[d]);
        }
      }
    }
  }

  if (row < N) {
    device vec<T, 4>* out = (device vec<T, 4>*)y + (image * N + row) * HEADS * VECTORS;
    UNROLL
    for (int d = 0; d < VECTORS; ++d) {
      out[head * VECTORS + d] = vec<T, 4>(sum[d] / total);
    }
  }
"""

# log2(e) / sqrt(32): the softmax's scale for base 2.
HEADER = f"""
#define UNROLL _Pragma("clang loop unroll(full)")
constant constexpr float SCALE = {1.4426950408889634 / HEAD_DIM**0.5!r}f;
constant constexpr int QUERIES = {QUERIES};
"""


def fits(qkv: mx.array, heads: int) -> bool:
    """Whether the kernel takes this projection."""
    return qkv.shape[2] == 3 * HEAD_DIM * heads and qkv.dtype in DTYPES and 0 < qkv.size < 2**31


def run(qkv: mx.array, heads: int, **options: Any) -> mx.array:
    """What `attention` computes, for a projection that `fits`."""
    batch, length, width = qkv.shape
    (y,) = _metal_kernel()(
        inputs=[qkv],
        template=[("T", qkv.dtype)],
        output_shapes=[(batch, length, width // 3)],
        output_dtypes=[qkv.dtype],
        grid=(-(-length // QUERIES) * QUERIES, heads, batch),  # whole groups: all threads load
        threadgroup=(QUERIES, 1, 1),
        **options,
    )
    result: mx.array = y
    return result


@functools.cache
def _metal_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="fastvlm_attention",
        input_names=["qkv"],
        output_names=["y"],
        source=SOURCE,
        header=HEADER,
    )
