// wide.cuh for bfloat16, which takes the other half of the time that compiling it takes.
#include "wide.cuh"

namespace vptq {

cudaError_t multiply_wide_bfloat16(Kind only, const Layer& layer, const Tokens& tokens, int slots, const Job* jobs,
                                   const int32_t* starts, int thread_blocks, float* workspace, int64_t stride,
                                   int shared_bytes, cudaStream_t stream) {
  return multiply_wide_of<__nv_bfloat16>(only, layer, tokens, slots, jobs, starts, thread_blocks, workspace, stride,
                                         shared_bytes, stream);
}

}  // namespace vptq
