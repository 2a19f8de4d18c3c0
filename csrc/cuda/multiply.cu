// One launch for a fused layer: every block takes its jobs, whatever their kinds, one after the other.
#include "dot.cuh"
#include "resident.cuh"
#include "single.cuh"
#include "sliced.cuh"

namespace vptq {
namespace {

// For one token, or up to 8 or 16. 112 registers a thread leave room for blocks of `finish_kernel`: those of the
// layer before would otherwise keep this kernel's from starting.
template <typename T, int Slots>
__global__ void __maxnreg__(112)
    multiply_kernel(const Layer layer, const Tokens tokens, const Job* __restrict__ jobs,
                    const int32_t* __restrict__ starts, float* __restrict__ workspace, int64_t stride) {
  constexpr int Octets = Slots <= 8 ? 1 : 2;
  extern __shared__ uint4 shared[];
  __shared__ Job job;  // here rather than in registers, which the products need
  __shared__ SliceCopy copy;
  __shared__ Exchange exchange;
  let_next_start();
  const int first = starts[blockIdx.x], last = starts[blockIdx.x + 1];
  if (threadIdx.x == 0) {
    copy.initialise();
    exchange.initialise();
  }
  for (int j = first; j < last; j++) {
    __syncthreads();
    if (threadIdx.x < sizeof(Job) / 4)
      reinterpret_cast<int*>(&job)[threadIdx.x] = reinterpret_cast<const int*>(jobs + j)[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0 && Kind(job.kind) != Kind::kSliced) copy.held = -1;
    switch (Kind(job.kind)) {
      case Kind::kSliced:
        if constexpr (Slots == 1)
          multiply_single<T>(layer, tokens, job, copy, workspace, shared);
        else
          multiply_sliced<T, Octets>(layer, tokens, job, copy, workspace, stride, shared);
        break;
      case Kind::kBytes:
        multiply_resident<T, Octets, Kind::kBytes>(layer, tokens, job, exchange, workspace, stride, shared);
        break;
      case Kind::kBytePairs:
        multiply_resident<T, Octets, Kind::kBytePairs>(layer, tokens, job, exchange, workspace, stride, shared);
        break;
      case Kind::kShorts:
        multiply_resident<T, Octets, Kind::kShorts>(layer, tokens, job, exchange, workspace, stride, shared);
        break;
      default:
        wait_for_previous();
        multiply_dot<T>(layer, tokens, job, workspace, stride, reinterpret_cast<float*>(shared));
    }
  }
}

template <typename T, int Slots>
cudaError_t run(const Layer& layer, const Tokens& tokens, const Job* jobs, const int32_t* starts, int thread_blocks,
                float* workspace, int64_t stride, int shared_bytes, cudaStream_t stream) {
  auto kernel = multiply_kernel<T, Slots>;
  // Cheap, and the attribute belongs to the current device: setting it at every launch spares a table of devices.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(thread_blocks), kThreads, shared_bytes, stream, true, layer, tokens, jobs, starts,
                workspace, stride);
}

}  // namespace

cudaError_t multiply(Type type, const Layer& layer, const Tokens& tokens, const Job* jobs, const int32_t* starts,
                     int thread_blocks, float* workspace, int64_t stride, int shared_bytes, cudaStream_t stream) {
  auto go = [&](auto run) {
    return run(layer, tokens, jobs, starts, thread_blocks, workspace, stride, shared_bytes, stream);
  };
  auto of_type = [&](auto number) {
    using T = decltype(number);
    if (tokens.count == 1) return go(run<T, 1>);
    return tokens.count <= 8 ? go(run<T, 8>) : go(run<T, 16>);
  };
  if (tokens.count > 16) return cudaErrorInvalidValue;
  return type == Type::kHalf ? of_type(__half()) : of_type(__nv_bfloat16());
}

}  // namespace vptq
