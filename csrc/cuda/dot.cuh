// What a norm adds to every output of a module: one number per token.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vptq {

// Tokens [row_begin, row_end) of the job: the product with the shift of a norm over columns, or, for one over rows, the
// sum. By all threads of a block; `shared` is of at least two floats per warp.
template <typename T>
__device__ __forceinline__ void multiply_dot(const Layer& layer, const Tokens& tokens, const Job& job, float* workspace,
                                          int64_t stride, float* shared) {
  const int warps = blockDim.x / 32;
  const T* x = static_cast<const T*>(tokens.x);
  const float* shift = job.shift < 0 ? nullptr : layer.norm + job.shift;
  for (int token = job.row_begin; token < min(job.row_end, tokens.count); token++) {
    float sum = 0.f;
#pragma unroll 4
    for (int c = job.column_begin + threadIdx.x; c < job.column_end; c += blockDim.x)
      sum += Number<T>::wide(x[token * tokens.row_stride + c]) * (shift ? __ldg(shift + c) : 1.f);
#pragma unroll
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
    if (threadIdx.x % 32 == 0) shared[token % 2 * warps + threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.f;
      for (int w = 0; w < warps; w++) total += shared[token % 2 * warps + w];
      workspace[token * stride + job.out] = total;
    }
  }
}

}  // namespace vptq
