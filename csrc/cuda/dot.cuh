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
  constexpr int kTokens = 8, kColumns = 4, kSteps = 2;  // a thread's loads, of kColumns each, are all under way at once
  const int warps = blockDim.x / 32;
  const T* x = static_cast<const T*>(tokens.x);
  const bool has_shift = job.shift >= 0;
  const float* shift = layer.norm + job.shift;
  const bool aligned = (tokens.row_stride | job.column_begin | job.column_end | (has_shift ? job.shift : 0)) % 4 == 0;
  for (int first = job.row_begin; first < min(job.row_end, tokens.count); first += kTokens) {
    float sums[kTokens] = {};
    const int step = aligned ? blockDim.x * kColumns : blockDim.x;
    for (int begin = job.column_begin + int(threadIdx.x) * (aligned ? kColumns : 1); begin < job.column_end;
         begin += step * (aligned ? kSteps : 1)) {
      if (!aligned) {
        wait_for_previous();
        const float factor = has_shift ? __ldg(shift + begin) : 1.f;
#pragma unroll
        for (int t = 0; t < kTokens; t++)
          if (first + t < tokens.count) sums[t] += Number<T>::wide(x[(first + t) * tokens.row_stride + begin]) * factor;
        continue;
      }
      float4 factors[kSteps];
      uint2 values[kSteps][kTokens];
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        factors[s] = make_float4(1.f, 1.f, 1.f, 1.f);
        if (has_shift && begin + s * step < job.column_end)
          factors[s] = load_ahead(reinterpret_cast<const float4*>(shift + begin + s * step));
      }
      wait_for_previous();
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        const bool there = begin + s * step < job.column_end;
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
          values[s][t] = make_uint2(0, 0);
          if (there && first + t < tokens.count)
            values[s][t] = *reinterpret_cast<const uint2*>(x + (first + t) * tokens.row_stride + begin + s * step);
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; s++)
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
          const float2 low = unpack<T>(values[s][t].x), high = unpack<T>(values[s][t].y);
          const float4 f = factors[s];
          sums[t] += low.x * f.x + low.y * f.y + high.x * f.z + high.y * f.w;
        }
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
