// What is done to activations before a product of many outputs, once for all of them.
#include "device.cuh"
#include "kernels.h"

namespace vptq {
namespace {

constexpr int kEach = 8;  // columns a thread: 16 bytes are stored
constexpr int kPrepareThreads = kPrepareColumns / kEach;

// A block takes a record, for a token.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const Layer layer, const Tokens tokens, const Preparation* __restrict__ records,
                   T* __restrict__ prepared, int64_t prepared_stride, float* __restrict__ workspace, int64_t stride) {
  __shared__ float shared[kPrepareThreads / 32];
  let_next_start();
  const Preparation record = records[blockIdx.x];
  const int column = record.column_begin + int(threadIdx.x) * kEach, token = blockIdx.y;
  // (Flags rather than null: for `if (pointer)` after a choice between null and an offset, ptxas 13.0 let the
  // comparison read the register before the zero was in it, and lists were read that are not there.)
  const bool has_scale = record.scale >= 0, has_list = record.column_list >= 0;
  const bool has_dot = record.dot >= 0, has_shift = has_dot && record.shift >= 0;
  const bool whole = !has_list && tokens.row_stride % kEach == 0 && column + kEach <= record.column_end;
  int sources[kEach];
  float factors[kEach], shifts[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    sources[e] = min(column + e, record.column_end - 1);
    factors[e] = shifts[e] = 1.f;
  }
  if (whole) {
    auto load = [&](float (&to)[kEach], int at) {
#pragma unroll
      for (int e = 0; e < kEach; e += 4) {
        const float4 four = load_ahead(reinterpret_cast<const float4*>(layer.norm + at + column + e));
        to[e] = four.x, to[e + 1] = four.y, to[e + 2] = four.z, to[e + 3] = four.w;
      }
    };
    if (has_scale) load(factors, record.scale);
    if (has_shift) load(shifts, record.shift);
  } else {
#pragma unroll
    for (int e = 0; e < kEach; e++)
      if (has_list) sources[e] = load_ahead(layer.columns + record.column_list + sources[e]);
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      if (has_scale) factors[e] = load_ahead(layer.norm + record.scale + sources[e]);
      if (has_shift) shifts[e] = load_ahead(layer.norm + record.shift + sources[e]);
    }
  }
  wait_for_previous();
  const T* x = static_cast<const T*>(tokens.x) + token * tokens.row_stride;
  alignas(16) T values[kEach];
  if (whole) {
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(x + column);
  } else {
#pragma unroll
    for (int e = 0; e < kEach; e++) values[e] = x[sources[e]];
  }
  float dot = 0.f;
  T out[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const bool there = column + e < record.column_end;
    out[e] = Number<T>::narrow(there ? Number<T>::wide(values[e]) * factors[e] : 0.f);
    if (there) dot += Number<T>::wide(values[e]) * shifts[e];
  }
  if (record.at >= 0 && column < (record.column_end + kGranule - 1) / kGranule * kGranule)
    *reinterpret_cast<uint4*>(prepared + token * prepared_stride + record.at + threadIdx.x * kEach) =
        make_uint4(pack(out[0], out[1]), pack(out[2], out[3]), pack(out[4], out[5]), pack(out[6], out[7]));
  if (!has_dot) return;
#pragma unroll
  for (int o = 16; o; o /= 2) dot += __shfl_xor_sync(kAllLanes, dot, o);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = dot;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float total = 0.f;
  for (int w = 0; w < kPrepareThreads / 32; w++) total += shared[w];
  workspace[token * stride + record.dot] = total;
}

}  // namespace

cudaError_t prepare(Type type, const Layer& layer, const Tokens& tokens, const Preparation* records, int count,
                    void* prepared, int64_t prepared_stride, float* workspace, int64_t stride, cudaStream_t stream) {
  auto go = [&](auto number) {
    using T = decltype(number);
    return launch(prepare_kernel<T>, dim3(count, tokens.count), kPrepareThreads, 0, stream, true, layer, tokens,
                  records, static_cast<T*>(prepared), prepared_stride, workspace, stride);
  };
  return type == Type::kHalf ? go(__half()) : go(__nv_bfloat16());
}

}  // namespace vptq
