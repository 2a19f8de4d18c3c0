// Products and decoding straight from the bit streams: every format, every GPU since sm_80, the least memory.
//
// A warp takes a vector row, its lanes the columns; centroids come from wherever the caches have them. Bound by
// gathers from the L2 cache when the book is large, which is what the stationary layout exists to avoid.
#include "dot.cuh"
#include "stream.cuh"

namespace vptq {
namespace {

constexpr int kCompactThreads = 256;
constexpr int kCompactTokens = 8;

// Elements of a book's entry that belong to a plane, as fp32; missing ones stay as they are.
template <typename T>
struct Entry {
  const T* book;
  int vector_len, first, count;

  __device__ Entry(const T* book_, int vector_len_, int plane)
      : book(book_), vector_len(vector_len_), first(plane * 8), count(min(8, vector_len_ - plane * 8)) {}

  __device__ __forceinline__ void add(unsigned index, float (&to)[8]) const {
    const T* from = book + size_t(index) * vector_len + first;
    if (vector_len % 8 == 0) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
      const T* v = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int e = 0; e < 8; e++) to[e] += Number<T>::wide(v[e]);
    } else if (vector_len % 2 == 0) {
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        if (e >= count) break;
        const unsigned raw = __ldg(reinterpret_cast<const unsigned*>(from + e));
        const T* v = reinterpret_cast<const T*>(&raw);
        to[e] += Number<T>::wide(v[0]);
        to[e + 1] += Number<T>::wide(v[1]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < 8; e++)
        if (e < count) to[e] += Number<T>::wide(from[e]);
    }
  }
};

template <typename T>
__device__ __forceinline__ void look_up(const Entry<T>& book, const Entry<T>& residual, const Job& job, unsigned merged,
                                        float (&weights)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e++) weights[e] = 0.f;
  book.add(job.index_bits == 32 ? merged : merged & ((1u << job.index_bits) - 1), weights);
  if (job.res_book >= 0) residual.add(merged >> job.index_bits, weights);
}

template <typename T, int Count>
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(const Layer layer, const Tokens tokens, const Job* __restrict__ jobs, float* __restrict__ workspace,
                   int64_t stride) {
  const Job job = jobs[blockIdx.x];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(tokens.x);
  let_next_start();
  wait_for_previous();
  if (Kind(job.kind) == Kind::kDot) {
    __shared__ float sums[8 * kCompactThreads / 32];
    multiply_dot<T>(layer, tokens, job, workspace, stride, sums);
    return;
  }
  const T* books = static_cast<const T*>(layer.books);
  const Entry<T> book(books + job.book, job.vector_len, job.plane);
  const Entry<T> residual(books + max(job.res_book, 0), job.vector_len, job.plane);
  const bool has_scale = job.scale >= 0, has_list = job.column_list >= 0;  // rather than null: see prepare.cu
  const float* scale = layer.norm + job.scale;
  const int32_t* list = layer.columns + job.column_list;
  const int bits = job.index_bits + job.res_bits;
  for (int row = job.row_begin + warp; row < job.row_end; row += kCompactThreads / 32) {
    const int32_t* words = layer.codes + job.codes + size_t(row) * job.row_words;
    float sums[Count][8] = {};
#pragma unroll 4
    for (int c = job.column_begin + lane; c < job.column_end; c += 32) {
      float weights[8];
      look_up(book, residual, job, merged_index(words, bits, c), weights);
      const int source = has_list ? __ldg(list + c) : c;
      const float factor = has_scale ? __ldg(scale + source) : 1.f;
#pragma unroll
      for (int t = 0; t < Count; t++) {
        if (t >= tokens.count) break;
        const float value = Number<T>::wide(x[t * tokens.row_stride + source]) * factor;
#pragma unroll
        for (int e = 0; e < 8; e++) sums[t][e] += value * weights[e];
      }
    }
#pragma unroll
    for (int t = 0; t < Count; t++) {
      if (t >= tokens.count) break;
      float mine = 0.f;
#pragma unroll
      for (int e = 0; e < 8; e++) {
#pragma unroll
        for (int o = 16; o; o /= 2) sums[t][e] += __shfl_xor_sync(kAllLanes, sums[t][e], o);
        if (lane == e) mine = sums[t][e];
      }
      if (lane < 8) workspace[t * stride + job.out + row * 8 + lane] = mine;
    }
  }
}

// Weights [outputs, stride]: a block takes a plane of a vector row, its lanes pairs of columns.
template <typename T>
__global__ void __launch_bounds__(kCompactThreads)
    decode_compact_kernel(const Layer layer, const Job job, const Module module, const Part part,
                          T* __restrict__ weight, int64_t stride, const Window window, int first_row) {
  const int planes = (job.vector_len + 7) / 8;
  const int row = first_row + blockIdx.x / planes, plane = blockIdx.x % planes;
  const T* books = static_cast<const T*>(layer.books);
  const Entry<T> book(books + job.book, job.vector_len, plane);
  const Entry<T> residual(books + max(job.res_book, 0), job.vector_len, plane);
  const bool has_scale = job.scale >= 0, has_list = job.column_list >= 0;  // rather than null: see prepare.cu
  const float *scale = layer.norm + job.scale, *shift = layer.norm + job.shift;
  const int32_t* list = layer.columns + job.column_list;
  const int32_t* words = layer.codes + job.codes + size_t(row) * job.row_words;
  const int first = row * job.vector_len - part.skip + plane * 8;  // output of the plane's first element
  const int bits = job.index_bits + job.res_bits;
  const bool whole = !has_list && stride % 2 == 0;
  for (int c = threadIdx.x * 2; c < job.column_end; c += kCompactThreads * 2) {
    float weights[2][8];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int column = min(c + i, job.column_end - 1);
      look_up(book, residual, job, merged_index(words, bits, column), weights[i]);
      const int source = has_list ? __ldg(list + column) : column;
      const float factor = has_scale ? __ldg(scale + source) : 1.f, offset = has_scale ? __ldg(shift + source) : 0.f;
#pragma unroll
      for (int e = 0; e < 8; e++) weights[i][e] = weights[i][e] * factor + offset;
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int output = first + e;
      if (e >= book.count || output < window.begin || output >= window.end) continue;
      const float factor = module.scale < 0 ? 1.f : layer.norm[module.scale + output];
      const float offset = module.scale < 0 ? 0.f : layer.norm[module.shift + output];
      const T low = Number<T>::narrow(weights[0][e] * factor + offset);
      const T high = Number<T>::narrow(weights[1][e] * factor + offset);
      T* to = weight + int64_t(output - window.begin) * stride;
      if (whole && c + 1 < job.column_end) {
        *reinterpret_cast<unsigned*>(to + c) = pack(low, high);
      } else {
        to[has_list ? list[c] : c] = low;
        if (c + 1 < job.column_end) to[has_list ? list[c + 1] : c + 1] = high;
      }
    }
  }
}

}  // namespace

cudaError_t multiply_compact(Type type, const Layer& layer, const Tokens& tokens, const Launch& work) {
  auto go = [&](auto kernel) {
    return launch(kernel, dim3(work.thread_blocks), kCompactThreads, 0, work.stream, true, layer, tokens, work.jobs,
                  work.workspace, work.stride);
  };
  auto count = [&](auto one, auto two, auto four, auto eight) {
    return tokens.count == 1 ? go(one) : tokens.count == 2 ? go(two) : tokens.count <= 4 ? go(four) : go(eight);
  };
  if (tokens.count > kCompactTokens) return cudaErrorInvalidValue;
  if (type == Type::kHalf)
    return count(compact_kernel<__half, 1>, compact_kernel<__half, 2>, compact_kernel<__half, 4>,
                 compact_kernel<__half, 8>);
  return count(compact_kernel<__nv_bfloat16, 1>, compact_kernel<__nv_bfloat16, 2>, compact_kernel<__nv_bfloat16, 4>,
               compact_kernel<__nv_bfloat16, 8>);
}

cudaError_t decode_compact(Type type, const Layer& layer, const Job& job, const Module& module, const Part& part,
                           void* weight, int64_t stride, const Window& window, cudaStream_t stream) {
  const int v = part.vector_len, planes = (v + 7) / 8;
  const int first = (window.begin + part.skip) / v, last = (window.end + part.skip + v - 1) / v;
  auto go = [&](auto kernel, auto number) {
    return launch(kernel, dim3((last - first) * planes), kCompactThreads, 0, stream, false, layer, job, module, part,
                  static_cast<decltype(number)*>(weight), stride, window, first);
  };
  return type == Type::kHalf ? go(decode_compact_kernel<__half>, __half())
                             : go(decode_compact_kernel<__nv_bfloat16>, __nv_bfloat16());
}

}  // namespace vptq
