// The part of the Metal shading language that the kernels use, for a C++17 compiler.
//
// Stricter than Metal where that is cheap: device pointers know their buffer, vectors convert only
// explicitly, threadgroup memory starts as NaN. Threads of a group are fibers in shuffled order;
// each runs until a barrier.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define constant
#define device

namespace emulator {

inline const char* error;

inline void fail(const char* what) {
  if (error == nullptr) {
    error = what;
  }
}

struct Buffer {
  void* data;
  int64_t bytes;
  const int* shape;
};

}  // namespace emulator

// 16-bit floats that round once, to nearest even, when a float is converted to them.
struct half {
  _Float16 value;
  half() = default;
  explicit half(float f) : value(static_cast<_Float16>(f)) {}
  explicit operator float() const { return static_cast<float>(value); }
};

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const bool nan = (u & 0x7fffffff) > 0x7f800000;
    bits = nan ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
};

using float16_t = half;
using bfloat16_t = bfloat;
using uint = unsigned;

struct uint3 {
  uint x, y, z;
};

namespace metal {

template <typename T, int N>
struct alignas(sizeof(T) * N) vec;

template <typename T>
struct alignas(sizeof(T) * 2) vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T a, T b) : x(a), y(b) {}
};

template <typename T>
struct alignas(sizeof(T) * 4) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  explicit vec(T a) : x(a), y(a), z(a), w(a) {}
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  template <typename U, typename = std::enable_if_t<!std::is_same_v<T, U>>>
  explicit vec(vec<U, 4> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
};

using float4 = vec<float, 4>;
using bool4 = vec<bool, 4>;

#define EACH(NAME, EXPRESSION, RESULT)                                 \
  inline RESULT NAME(float4 a, float4 b) {                             \
    auto f = [](float p, float q) { return EXPRESSION; };              \
    return RESULT(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w)); \
  }
EACH(operator+, p + q, float4)
EACH(operator-, p - q, float4)
EACH(operator*, p * q, float4)
EACH(operator/, p / q, float4)
EACH(operator<, p < q, bool4)
EACH(operator>, p > q, bool4)
#undef EACH

inline float4 operator-(float4 a) { return float4(-a.x, -a.y, -a.z, -a.w); }
inline float4 operator*(float4 a, float s) { return a * float4(s); }
inline float4 operator/(float4 a, float s) { return a / float4(s); }
inline float4& operator*=(float4& a, float s) { return a = a * s; }

inline float4 fma(float4 a, float4 b, float4 c) {
  return float4(std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y), std::fma(a.z, b.z, c.z),
                std::fma(a.w, b.w, c.w));
}

inline float4 select(float4 a, float4 b, bool4 c) {
  return float4(c.x ? b.x : a.x, c.y ? b.y : a.y, c.z ? b.z : a.z, c.w ? b.w : a.w);
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }

namespace fast {
inline float4 divide(float4 a, float4 b) { return a / b; }
inline float exp2(float a) { return std::exp2(a); }
}  // namespace fast

enum class mem_flags { mem_threadgroup };

}  // namespace metal

namespace emulator {

template <typename T, int N>
struct Shared;

// A pointer that checks every access against its whole buffer.
template <typename T>
struct Ptr {
  T* at;
  const char *low, *high;

  explicit Ptr(const Buffer& b)
      : at(static_cast<T*>(b.data)),
        low(static_cast<const char*>(b.data)),
        high(low + b.bytes) {}
  template <typename U>
  explicit Ptr(const Ptr<U>& p) : at((T*)p.at), low(p.low), high(p.high) {}
  Ptr(T* a, const char* l, const char* h) : at(a), low(l), high(h) {}
  template <typename U, int N>
  explicit Ptr(Shared<U, N>& s) : at((T*)s.data), low((char*)s.data), high(low + sizeof(s.data)) {}

  Ptr operator+(int64_t n) const { return Ptr(at + n, low, high); }
  T& operator[](int64_t n) const {
    const char* p = reinterpret_cast<const char*>(at) + n * static_cast<int64_t>(sizeof(T));
    if (p < low || p + sizeof(T) > high) {
      fail("memory behind a pointer accessed out of bounds");
      static std::remove_const_t<T> nowhere;
      return nowhere;
    }
    return at[n];
  }
  T& operator*() const { return (*this)[0]; }
};

struct Region {
  void* data;
  size_t bytes;
  void poison() const { std::memset(data, 0xff, bytes); }
};

inline std::vector<Region> shared;

// A threadgroup array: NaN at the start of every group.
template <typename T, int N>
struct Shared {
  T data[N];
  Shared() {
    shared.push_back({data, sizeof(data)});
    shared.back().poison();
  }
  T& operator[](int64_t n) {
    if (n < 0 || n >= N) {
      fail("threadgroup memory accessed out of bounds");
      return data[0];
    }
    return data[n];
  }
};

struct Thread {
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Thread thread;
  bool done;
  bool waits;  // for its SIMD group, not at a barrier
};

inline ucontext_t scheduler;
inline Fiber* running;
using Body = void (*)(const Buffer*, const Thread&);
inline Body body;
inline const Buffer* buffers;

inline void enter() {
  body(buffers, running->thread);
  running->done = true;
}

#include "simdgroup.h"

// Runs the grid group by group; groups at the edge are smaller, as in dispatchThreads.
inline const char* launch(Body kernel, const Buffer* arguments, uint3 grid, uint3 size,
                          uint32_t random) {
  std::vector<Fiber> fibers(size.x * size.y * size.z);
  body = kernel;
  buffers = arguments;
  error = nullptr;
  for (uint gz = 0; gz * size.z < grid.z; ++gz)
    for (uint gy = 0; gy * size.y < grid.y; ++gy)
      for (uint gx = 0; gx * size.x < grid.x; ++gx) {
        for (const Region& region : shared) region.poison();
        std::vector<Fiber*> order;
        for (uint z = 0; z < size.z && gz * size.z + z < grid.z; ++z)
          for (uint y = 0; y < size.y && gy * size.y + y < grid.y; ++y)
            for (uint x = 0; x < size.x && gx * size.x + x < grid.x; ++x) {
              Fiber& f = fibers[order.size()];
              f.stack.resize(1 << 16);
              const uint index = order.size();
              f.thread = {{gx * size.x + x, gy * size.y + y, gz * size.z + z}, {x, y, z},
                          {gx, gy, gz}, index, index / 32, index % 32};
              f.done = f.waits = false;
              getcontext(&f.context);
              f.context.uc_stack.ss_sp = f.stack.data();
              f.context.uc_stack.ss_size = f.stack.size();
              f.context.uc_link = &scheduler;
              makecontext(&f.context, enter, 0);
              order.push_back(&f);
            }
        simd_groups.assign((order.size() + 31) / 32, SimdGroup());
        lanes_in_order = order.size() % 32 == 0;
        for (size_t finished = 0; finished < order.size();) {
          for (size_t i = order.size() - 1; i > 0; --i) {
            random = random * 1664525 + 1013904223;
            std::swap(order[i], order[(random >> 8) % (i + 1)]);
          }
          finished = 0;
          for (Fiber* f : order) {
            if (!f->done) {
              running = f;
              swapcontext(&scheduler, &f->context);
            }
          }
          if (!finish_simd_groups(order)) {
            return error;
          }
          for (Fiber* f : order) finished += f->done;
          if (finished != 0 && finished != order.size()) {
            fail("some threads ended while others wait at a barrier");
            return error;
          }
        }
      }
  return error;
}

}  // namespace emulator

namespace metal {
inline void threadgroup_barrier(mem_flags) {
  swapcontext(&emulator::running->context, &emulator::scheduler);
}

template <typename T, int ROWS, int COLUMNS>
struct simdgroup_matrix : emulator::Matrix {
  static_assert(std::is_same_v<T, float> && ROWS == 8 && COLUMNS == 8);
};

inline void simdgroup_multiply_accumulate(emulator::Matrix& d, const emulator::Matrix& a,
                                          const emulator::Matrix& b, const emulator::Matrix& c) {
  emulator::multiply(d, a, b, c);
}
}  // namespace metal

using namespace metal;
using emulator::Ptr;
using emulator::Shared;
