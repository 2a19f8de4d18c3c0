// What is done to activations before a product of many outputs, once for all of them.
#include "device.cuh"
#include "kernels.h"

namespace vptq {
namespace {

constexpr int kEach = 8;  // columns a thread: 16 bytes are stored
constexpr int kPrepareThreads = kPrepareColumns / kEach;

// A block takes kPrepareColumns of a record, for a token.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const Layer layer, const Tokens tokens, const Preparation* __restrict__ records,
                   T* __restrict__ prepared, int64_t prepared_stride, float* __restrict__ workspace, int64_t stride) {
  __shared__ float shared[kPrepareThreads / 32];
  let_next_start();
  int chunk = blockIdx.x;
  for (; chunk * kPrepareColumns >= records->columns; records++)
    chunk -= (records->columns + kPrepareColumns - 1) / kPrepareColumns;
  const Preparation record = *records;
  const int column = chunk * kPrepareColumns + threadIdx.x * kEach, token = blockIdx.y;
  const float* scale = record.scale < 0 ? nullptr : layer.norm + record.scale;
  const float* shift = record.shift < 0 ? nullptr : layer.norm + record.shift;
  const int32_t* list = record.column_list < 0 ? nullptr : layer.columns + record.column_list;
  int sources[kEach];
  float factors[kEach], shifts[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const int there = min(column + e, record.columns - 1);
    sources[e] = list ? __ldg(list + there) : there;
    factors[e] = scale ? __ldg(scale + sources[e]) : 1.f;
    shifts[e] = record.dot < 0 ? 0.f : shift ? __ldg(shift + sources[e]) : 1.f;
  }
  wait_for_previous();
  const T* x = static_cast<const T*>(tokens.x) + token * tokens.row_stride;
  T values[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e++) values[e] = x[sources[e]];
  float dot = 0.f;
  T out[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const bool there = column + e < record.columns;
    out[e] = Number<T>::narrow(there ? Number<T>::wide(values[e]) * factors[e] : 0.f);
    if (there && record.dot >= 0) dot += Number<T>::wide(values[e]) * shifts[e];
  }
  if (record.at >= 0 && column < (record.columns + kGranule - 1) / kGranule * kGranule)
    *reinterpret_cast<uint4*>(prepared + token * prepared_stride + record.at + column) =
        make_uint4(pack(out[0], out[1]), pack(out[2], out[3]), pack(out[4], out[5]), pack(out[6], out[7]));
  if (record.dot < 0) return;
#pragma unroll
  for (int o = 16; o; o /= 2) dot += __shfl_xor_sync(kAllLanes, dot, o);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = dot;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float total = 0.f;
  for (int w = 0; w < kPrepareThreads / 32; w++) total += shared[w];
  workspace[token * stride + record.dot + chunk] = total;
}

}  // namespace

cudaError_t prepare(Type type, const Layer& layer, const Tokens& tokens, const Preparation* records, int chunks,
                    void* prepared, int64_t prepared_stride, float* workspace, int64_t stride, cudaStream_t stream) {
  auto go = [&](auto number) {
    using T = decltype(number);
    return launch(prepare_kernel<T>, dim3(chunks, tokens.count), kPrepareThreads, 0, stream, true, layer, tokens,
                  records, static_cast<T*>(prepared), prepared_stride, workspace, stride);
  };
  return type == Type::kHalf ? go(__half()) : go(__nv_bfloat16());
}

}  // namespace vptq
