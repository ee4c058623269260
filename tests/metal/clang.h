// The Metal shading language as C++ for OpenCL, for clang to check, not to run.
//
// Address spaces are real ones here: no pointer may lose or change its own, and threadgroup memory
// exists in kernels only. Vectors are clang's, as Metal's are, and convert only where it is written.

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private

typedef unsigned int uint;
typedef half float16_t;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;

namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// float4(...) and vec<T, N>(...), which clang knows for one argument of the same type only.
template <typename T, int N>
vec<T, N> make(T every) {
  return vec<T, N>(every);
}
template <typename T, int N, typename U>
vec<T, N> make(vec<U, N> v) {
  return __builtin_convertvector(v, vec<T, N>);
}
template <typename T, int N>
vec<T, N> make(T x, T y, T z, T w) {
  return vec<T, N>{x, y, z, w};
}
}  // namespace metal

typedef metal::vec<float, 4> float4;
typedef metal::vec<int, 4> int4;
typedef metal::vec<uint, 3> uint3;

namespace metal {
float4 fma(float4, float4, float4);
float4 select(float4, float4, int4);
int min(int, int);
int max(int, int);
float min(float, float);
float max(float, float);
namespace fast {
float exp2(float);
float4 divide(float4, float4);
}  // namespace fast

enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags);

template <typename T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  vec<T, 2> elements;
  thread vec<T, 2>& thread_elements() thread { return elements; }
};
template <typename T>
void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<T, 8, 8>&, thread simdgroup_matrix<T, 8, 8>&,
    thread simdgroup_matrix<T, 8, 8>&, thread simdgroup_matrix<T, 8, 8>&);
}  // namespace metal

using namespace metal;
