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

// Begins to copy the tile at a column and row, to the same place in every block of a cluster; `barrier`, of each of
// them, has been told how many bytes to expect.
template <int kCluster>
__device__ __forceinline__ void copy_tile(uint32_t shared, const CUtensorMap* map, int column, int row,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
#define VPTQ_COPY "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
  if constexpr (kCluster == 1)
    asm volatile(VPTQ_COPY " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
  else
    asm volatile(VPTQ_COPY ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared), "l"(map), "r"(column),
                 "r"(row), "r"(barrier), "h"(uint16_t((1 << kCluster) - 1))
                 : "memory");
#undef VPTQ_COPY
#endif
}

__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// All threads of all blocks; what they did before to barriers is visible after it.
__device__ __forceinline__ void synchronise_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// At the barrier of another block at the same place.
__device__ __forceinline__ void arrive_in_cluster(uint32_t barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
#endif
}

}  // namespace vptq
