// A coded layer in training (quantize/coded.py): its weight from indices, books and column norm, and the gradients of
// those from that of the weight. torch takes a dozen passes over a float for every weight; this takes the dense weight
// once each way, and once the vectors' gradients.
//
// Sums are taken in an order that does not depend on the launch, so that a run repeats itself bit for bit: rows of a
// book's entry one after another in pieces of limited length, then pieces likewise (quantize/sums.py).
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "lengths.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kRows = 8;  // rows of vectors that a thread goes through: columns are summed up by as many

// Columns of a layer with books of their own. Indices [rows, columns] into book [., v] and residual [., v]; column j is
// column where[j] of the weight, or j if there is no `where`. scale and shift, if any, by the weight's columns.
struct Segment {
  const int* index;
  const int* residual_index;
  const float* book;
  const float* residual;
  const int* where;
  const float* scale;
  const float* shift;
  int64_t rows, columns;
};

// Floats that are read and written together.
template <int V>
struct alignas(V % 4 ? V % 2 ? 4 : 8 : 16) Vector {
  float at[V];
};

template <typename T>
__device__ inline float to_float(T value) {
  if constexpr (std::is_same_v<T, float>)
    return value;
  else
    return __uint_as_float(unsigned(value) << 16);
}

// bfloat16 rounds to the nearest, ties to even, as torch does.
template <typename T>
__device__ inline T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return T(bits >> 16 | 0x40u);  // NaN stays one
    return T((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

// Entry i of a book. As what nobody writes meanwhile, so that the next is read before the last one's weights are there.
template <int V>
__device__ inline Vector<V> entry(const float* book, int i) {
  using Part = std::conditional_t<V % 4 == 0, float4, std::conditional_t<V % 2 == 0, float2, float>>;
  Vector<V> found;
  const Part* const from = reinterpret_cast<const Part*>(book + int64_t(i) * V);
#pragma unroll
  for (int p = 0; p < int(sizeof(found) / sizeof(Part)); p++) reinterpret_cast<Part*>(&found)[p] = __ldg(from + p);
  return found;
}

template <int V>
__device__ inline Vector<V> looked_up(const Segment& s, int64_t at) {
  Vector<V> found = entry<V>(s.book, __ldg(s.index + at));
  if (s.residual_index) {
    const Vector<V> more = entry<V>(s.residual, __ldg(s.residual_index + at));
#pragma unroll
    for (int d = 0; d < V; d++) found.at[d] += more.at[d];
  }
  return found;
}

// Writes the segment's columns of weight [out, width]. Threads have columns, blockIdx.y the rows.
template <int V, typename T>
__global__ void __launch_bounds__(kThreads)
    decode(const Segment s, T* __restrict__ weight, int64_t out, int64_t width) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= s.columns) return;
  const int64_t to = s.where ? s.where[column] : column;
  const float scale = s.scale ? s.scale[to] : 1.0f, shift = s.scale ? s.shift[to] : 0.0f;
#pragma unroll 4
  for (int i = 0; i < kRows; i++) {
    const int64_t row = int64_t(blockIdx.y) * kRows + i;
    if (row >= s.rows) return;
    const Vector<V> vector = looked_up<V>(s, row * s.columns + column);
#pragma unroll
    for (int d = 0; d < V; d++)
      if (row * V + d < out) weight[(row * V + d) * width + to] = from_float<T>(fmaf(vector.at[d], scale, shift));
  }
}

// From the weight's gradient [out, width] those of the segment's vectors [rows, columns, v], and for each kRows of
// their rows the sums that make those of scale and shift: sums [., 2, columns], if there is a norm.
template <int V, typename T>
__global__ void __launch_bounds__(kThreads)
    pull(const Segment s, const T* __restrict__ gradient, int64_t out, int64_t width, Vector<V>* __restrict__ vectors,
         float* __restrict__ sums) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= s.columns) return;
  const int64_t from = s.where ? s.where[column] : column;
  const float scale = s.scale ? s.scale[from] : 1.0f;
  float of_scale = 0.0f, of_shift = 0.0f;
#pragma unroll 4
  for (int i = 0; i < kRows; i++) {
    const int64_t row = int64_t(blockIdx.y) * kRows + i;
    if (row >= s.rows) break;
    const int64_t at = row * s.columns + column;
    Vector<V> pulled;
#pragma unroll
    for (int d = 0; d < V; d++)
      pulled.at[d] = row * V + d < out ? to_float(gradient[(row * V + d) * width + from]) : 0.0f;
    if (sums) {
      const Vector<V> vector = looked_up<V>(s, at);
#pragma unroll
      for (int d = 0; d < V; d++) {
        of_scale = fmaf(pulled.at[d], vector.at[d], of_scale);
        of_shift += pulled.at[d];
      }
    }
#pragma unroll
    for (int d = 0; d < V; d++) pulled.at[d] *= scale;
    vectors[at] = pulled;
  }
  if (sums) {
    sums[(int64_t(blockIdx.y) * 2) * s.columns + column] = of_scale;
    sums[(int64_t(blockIdx.y) * 2 + 1) * s.columns + column] = of_shift;
  }
}

// Row p of sums [pieces, width] is that of rows [., width] from bounds[p] to bounds[p + 1], taken in `order` if given.
__global__ void __launch_bounds__(kThreads)
    sum_pieces(const float* __restrict__ rows, int width, const int* __restrict__ order, const int* __restrict__ bounds,
               int64_t pieces, float* __restrict__ sums) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, piece = thread / width;
  if (piece >= pieces) return;
  const int d = int(thread - piece * width), end = bounds[piece + 1];
  float sum = 0.0f;
#pragma unroll 8
  for (int i = bounds[piece]; i < end; i++) sum += rows[int64_t(order ? order[i] : i) * width + d];
  sums[thread] = sum;
}

dim3 grid_of(const Segment& s) {
  return dim3(unsigned((s.columns + kThreads - 1) / kThreads), unsigned((s.rows + kRows - 1) / kRows));
}

// Calls f with the vector length as a constant and a value of the weight's type; returns as with_vector_length does.
template <typename F>
int with_kind(int64_t v, int64_t bfloat16, F&& f) {
  return with_vector_length(v, [&](auto length) { bfloat16 ? f(length, uint16_t()) : f(length, float()); });
}

}  // namespace

// All are asynchronous on a stream of a device. index [rows, columns] and residual_index, or null, int32; books float32
// [., v]; where int32 [columns] or null; scale and shift float32 [width] or null. bfloat16 says which of that and
// float32 the weight or its gradient [out, width] is in.

extern "C" int vptq_decode(int64_t v, const int* index, const int* residual_index, int64_t rows, int64_t columns,
                           const float* book, const float* residual, const int* where, const float* scale,
                           const float* shift, int64_t bfloat16, int64_t out, int64_t width, void* weight,
                           int64_t device, cudaStream_t stream) {
  const Segment s{index, residual_index, book, residual, where, scale, shift, rows, columns};
  if (const int error = cudaSetDevice(int(device))) return error;
  return with_kind(v, bfloat16, [&](auto length, auto value) {
    using T = decltype(value);
    T* const to = static_cast<T*>(weight);
    decode<decltype(length)::value, T><<<grid_of(s), kThreads, 0, stream>>>(s, to, out, width);
  });
}

// Writes vectors [rows, columns, v] and, with a scale, sums [ceil(rows / 8), 2, columns].
extern "C" int vptq_pull(int64_t v, const int* index, const int* residual_index, int64_t rows, int64_t columns,
                         const float* book, const float* residual, const int* where, const float* scale,
                         const float* shift, int64_t bfloat16, int64_t out, int64_t width, const void* gradient,
                         float* vectors, float* sums, int64_t device, cudaStream_t stream) {
  const Segment s{index, residual_index, book, residual, where, scale, shift, rows, columns};
  if (const int error = cudaSetDevice(int(device))) return error;
  return with_kind(v, bfloat16, [&](auto length, auto value) {
    constexpr int V = decltype(length)::value;
    using T = decltype(value);
    const T* const from = static_cast<const T*>(gradient);
    Vector<V>* const to = reinterpret_cast<Vector<V>*>(vectors);
    pull<V, T><<<grid_of(s), kThreads, 0, stream>>>(s, from, out, width, to, sums);
  });
}

// rows float32 [., width]; order int32 or null, bounds int32 [pieces + 1]; writes sums [pieces, width].
extern "C" int vptq_sum_pieces(const float* rows, int64_t width, const int* order, const int* bounds, int64_t pieces,
                               float* sums, int64_t device, cudaStream_t stream) {
  if (const int error = cudaSetDevice(int(device))) return error;
  const int64_t blocks = (pieces * width + kThreads - 1) / kThreads;
  if (blocks) sum_pieces<<<unsigned(blocks), kThreads, 0, stream>>>(rows, int(width), order, bounds, pieces, sums);
  return cudaGetLastError();
}
