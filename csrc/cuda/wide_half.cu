// wide.cuh for float16, which takes half of the time that compiling it takes.
#include "wide.cuh"

namespace vptq {

cudaError_t multiply_wide_half(Kind only, const Layer& layer, const Tokens& tokens, const Tokens& prepared, int slots,
                               const Launch& work) {
  return multiply_wide_of<__half>(only, layer, tokens, prepared, slots, work);
}

}  // namespace vptq
