// wide.cuh for float16, which takes half of the time that compiling it takes.
#include "wide.cuh"

namespace vptq {

cudaError_t multiply_wide_half(Kind only, const Layer& layer, const Tokens& tokens, int slots, const Job* jobs,
                               const int32_t* starts, int thread_blocks, float* workspace, int64_t stride,
                               int shared_bytes, cudaStream_t stream) {
  return multiply_wide_of<__half>(only, layer, tokens, slots, jobs, starts, thread_blocks, workspace, stride,
                                  shared_bytes, stream);
}

}  // namespace vptq
