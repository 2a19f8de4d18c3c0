// What a norm adds to every output of a module: one number per token.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vptq {

// Tokens [row_begin, row_end) of the job: the product with the shift of a norm over columns, or, for one over rows, the
// sum. By all threads of a block; `shared` is of at least eight floats per warp.
template <typename T>
__device__ __forceinline__ void multiply_dot(const Layer& layer, const Tokens& tokens, const Job& job, float* workspace,
                                             int64_t stride, float* shared) {
  constexpr int kTokens = 8, kColumns = 4;  // of a thread: so many loads are under way
  const int warps = blockDim.x / 32;
  const T* x = static_cast<const T*>(tokens.x);
  const bool has_shift = job.shift >= 0;  // a flag rather than null: see prepare.cu
  const float* shift = layer.norm + job.shift;
  for (int first = job.row_begin; first < min(job.row_end, tokens.count); first += kTokens) {
    float sums[kTokens] = {};
    for (int begin = job.column_begin + threadIdx.x; begin < job.column_end; begin += blockDim.x * kColumns) {
      float factors[kColumns];
      T values[kColumns][kTokens];
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        const int there = min(begin + c * int(blockDim.x), job.column_end - 1);
        factors[c] = has_shift ? __ldg(shift + there) : 1.f;
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
          values[c][t] = Number<T>::narrow(0.f);
          if (first + t < tokens.count) values[c][t] = x[(first + t) * tokens.row_stride + there];
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; c++)
#pragma unroll
        for (int t = 0; t < kTokens; t++)
          if (begin + c * int(blockDim.x) < job.column_end) sums[t] += Number<T>::wide(values[c][t]) * factors[c];
    }
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
      for (int o = 16; o; o /= 2) sums[t] += __shfl_xor_sync(kAllLanes, sums[t], o);
      if (threadIdx.x % 32 == 0) shared[t * warps + threadIdx.x / 32] = sums[t];
    }
    __syncthreads();
    const int token = first + threadIdx.x;
    if (threadIdx.x < kTokens && token < min(job.row_end, tokens.count)) {
      float total = 0.f;
      for (int w = 0; w < warps; w++) total += shared[threadIdx.x * warps + w];
      workspace[token * stride + job.out] = total;
    }
    __syncthreads();
  }
}

}  // namespace vptq
