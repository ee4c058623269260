// SIMD groups of 32 threads and their 8x8 matrices; included by msl.h, inside namespace emulator.
//
// A lane that has handed in its part of a product waits until all 32 have. Other SIMD groups run
// on meanwhile, so a product is no barrier for them.

struct SimdGroup {
  int64_t arrived = 0, turn[32] = {};
  float a[2][8][8], b[2][8][8];  // of two turns, because a lane may be one ahead of the slowest
};

inline std::vector<SimdGroup> simd_groups;
inline bool lanes_in_order;  // whether all SIMD groups are whole
inline int64_t arrivals;

// Runs the lanes that wait for their group until all threads are at a barrier or at their end. One
// group after the other, so that a group runs as far ahead of the rest as the barriers let it.
inline bool finish_simd_groups(const std::vector<Fiber*>& order) {
  for (Fiber* first : order) {
    while (first->waits) {
      const int64_t before = arrivals;
      int waiting = 0, waiting_still = 0;
      for (Fiber* f : order) {
        if (f->waits && f->thread.simdgroup_index_in_threadgroup ==
                            first->thread.simdgroup_index_in_threadgroup) {
          ++waiting;
          running = f;
          swapcontext(&scheduler, &f->context);
          waiting_still += f->waits;
        }
      }
      if (arrivals == before && waiting_still == waiting) {
        fail("lanes of a SIMD group disagree about a matrix product");
        return false;
      }
    }
  }
  return true;
}

// Where a lane's two elements of a matrix lie: as in MLX's steel/gemm/mma.h.
struct Position {
  int row, column;
  explicit Position(int lane) {
    const int quad = lane / 4;
    row = (quad & 4) + lane / 2 % 4;
    column = (quad & 2) * 2 + lane % 2 * 2;
  }
};

struct Matrix {
  float elements[2];
  Matrix() { std::memset(elements, 0xff, sizeof(elements)); }
  float* thread_elements() { return elements; }
};

inline void multiply(Matrix& d, const Matrix& a, const Matrix& b, const Matrix& c) {
  if (!lanes_in_order) {
    return fail("a matrix in a SIMD group of fewer than 32 threads");
  }
  Fiber* fiber = running;
  SimdGroup& group = simd_groups[fiber->thread.simdgroup_index_in_threadgroup];
  const int lane = fiber->thread.thread_index_in_simdgroup;
  const Position at(lane);
  const int slot = group.turn[lane]++ % 2;
  for (int e = 0; e < 2; ++e) {
    group.a[slot][at.row][at.column + e] = a.elements[e];
    group.b[slot][at.row][at.column + e] = b.elements[e];
  }
  ++group.arrived;
  ++arrivals;
  fiber->waits = true;
  while (group.arrived < 32 * group.turn[lane]) {
    swapcontext(&fiber->context, &scheduler);
  }
  fiber->waits = false;
  for (int e = 0; e < 2; ++e) {
    float sum = c.elements[e];
    for (int k = 0; k < 8; ++k) {
      sum = std::fma(group.a[slot][at.row][k], group.b[slot][k][at.column + e], sum);
    }
    d.elements[e] = sum;
  }
}
