// Tiles of activations by Hopper's copy engine: described by the host, asked for by one thread, and swizzled as wgmma
// wants them. What lies outside of the matrix comes as zeros.
#pragma once

#include <cuda.h>

#include "device.cuh"
#include "kernels.h"

namespace vptq {

// A map for tiles of `rows` tokens of as many columns as `row_bytes` hold, 64 or 128.
inline cudaError_t describe_tiles(Type type, const Tokens& tokens, int rows, int row_bytes, CUtensorMap& map) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {cuuint64_t(tokens.row_stride), cuuint64_t(tokens.count)};
  const cuuint64_t strides[1] = {cuuint64_t(tokens.row_stride) * 2};
  const cuuint32_t box[2] = {cuuint32_t(row_bytes) / 2, cuuint32_t(rows)}, steps[2] = {1, 1};
  const CUresult made =
      encode(&map, type == Type::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
             const_cast<void*>(tokens.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Begins to copy the tile at a column; `barrier` has been told how many bytes to expect.
__device__ __forceinline__ void copy_tile(uint32_t shared, const CUtensorMap* map, int column, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared),
      "l"(map), "r"(column), "r"(0), "r"(barrier)
      : "memory");
#endif
}

}  // namespace vptq
