// One launch for a fused layer: every block takes its jobs, whatever their kinds, one after the other.
#include "resident.cuh"
#include "single.cuh"
#include "sliced.cuh"

namespace vptq {
namespace {

template <typename T, int Slots, int Planes>
__device__ __forceinline__ void multiply_lists(const Layer& layer, const Tokens& tokens, const Job& job,
                                               SliceCopy& copy, Dots& dots, float* workspace, int64_t stride,
                                               uint4* shared) {
  if constexpr (Slots == 1)
    multiply_single<T, Planes>(layer, tokens, job, copy, dots, workspace, shared);
  else
    multiply_sliced<T, Slots / 8, Planes>(layer, tokens, job, copy, dots, workspace, stride, shared);
}

// For one token, or up to 8 or 16. 112 registers a thread leave room for blocks of `finish_kernel`: those of the
// layer before would otherwise keep this kernel's from starting.
template <typename T, int Slots>
__global__ void __maxnreg__(112)
    multiply_kernel(const Layer layer, const Tokens tokens, const Tokens prepared, const Job* __restrict__ jobs,
                    const int32_t* __restrict__ starts, float* __restrict__ workspace, int64_t stride) {
  constexpr int Octets = Slots <= 8 ? 1 : 2;
  extern __shared__ uint4 shared[];
  // Here rather than in registers, which the products need, or on a stack: 512 threads' stacks do not fit the L1 cache
  // that 200 KiB of shared memory leave, and cost 4 us at the start of a kernel of 12. (The end of the jobs is looked
  // up for each of them for the same reason.)
  __shared__ Job job;
  __shared__ Layer own_layer;
  __shared__ Tokens own_tokens;
  __shared__ SliceCopy copy;
  __shared__ Dots dots;
  __shared__ Exchange exchange;
  let_next_start();
  const int first = starts[blockIdx.x];
  if (threadIdx.x == 0) {
    copy.initialise();
    exchange.initialise();
  }
  for (int j = first; j < starts[blockIdx.x + 1]; j++) {
    __syncthreads();
    if (threadIdx.x < sizeof(Job) / 4)
      reinterpret_cast<int*>(&job)[threadIdx.x] = reinterpret_cast<const int*>(jobs + j)[threadIdx.x];
    if (threadIdx.x == kThreads - 1) {
      const int source = jobs[j].source;
      own_layer = layer;
      own_tokens = tokens;
      if (source >= 0) own_tokens = {static_cast<const T*>(prepared.x) + source, prepared.row_stride, tokens.count};
    }
    __syncthreads();
    if (threadIdx.x == 0 && Kind(job.kind) != Kind::kSliced) copy.held = -1;
    switch (Kind(job.kind)) {
      case Kind::kSliced:
        if (job.width == 16)
          multiply_lists<T, Slots, 2>(own_layer, own_tokens, job, copy, dots, workspace, stride, shared);
        else
          multiply_lists<T, Slots, 1>(own_layer, own_tokens, job, copy, dots, workspace, stride, shared);
        break;
      case Kind::kBytes:
        multiply_resident<T, Octets, Kind::kBytes>(own_layer, own_tokens, job, exchange, workspace, stride, shared);
        break;
      case Kind::kBytePairs:
        multiply_resident<T, Octets, Kind::kBytePairs>(own_layer, own_tokens, job, exchange, workspace, stride, shared);
        break;
      default:
        multiply_resident<T, Octets, Kind::kShorts>(own_layer, own_tokens, job, exchange, workspace, stride, shared);
    }
  }
}

template <typename T, int Slots>
cudaError_t run(const Layer& layer, const Tokens& tokens, const Tokens& prepared, const Launch& work) {
  auto kernel = multiply_kernel<T, Slots>;
  // Cheap, and the attribute belongs to the current device: setting it at every launch spares a table of devices.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, work.shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(work.thread_blocks), kThreads, work.shared_bytes, work.stream, true, layer, tokens,
                prepared, work.jobs, work.starts, work.workspace, work.stride);
}

template <typename T>
cudaError_t run_for(const Layer& layer, const Tokens& tokens, const Tokens& prepared, const Launch& work) {
  if (tokens.count == 1) return run<T, 1>(layer, tokens, prepared, work);
  return tokens.count <= 8 ? run<T, 8>(layer, tokens, prepared, work) : run<T, 16>(layer, tokens, prepared, work);
}

}  // namespace

cudaError_t multiply(Type type, const Layer& layer, const Tokens& tokens, const Tokens& prepared, const Launch& work) {
  if (tokens.count > 16) return cudaErrorInvalidValue;
  return type == Type::kHalf ? run_for<__half>(layer, tokens, prepared, work)
                             : run_for<__nv_bfloat16>(layer, tokens, prepared, work);
}

}  // namespace vptq
