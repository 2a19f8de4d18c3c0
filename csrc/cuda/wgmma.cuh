// Hopper's asynchronous tensor-core instruction: 64 rows a warp group, A from registers, B from shared memory.
#pragma once

#include "device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VPTQ_HAS_WGMMA 1
#endif

namespace vptq {

// Before the first product of a batch: registers written until here are ready.
__device__ __forceinline__ void wgmma_fence() {
#if VPTQ_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if VPTQ_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all but the last `Pending` committed batches are done.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
#if VPTQ_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}

// A matrix [n, kRowBytes / 2] of 16-bit numbers as the copy engine swizzles it (tiles.cuh); it starts at a multiple of
// 8 rows. Columns 16 s .. are found at address + 32 s.
template <int kRowBytes>
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(8 * kRowBytes / 16) << 32 |
         uint64_t(kRowBytes == 128 ? 1 : 2) << 62;
}

#define VPTQ_WGMMA(SHAPE, TYPE, REGISTERS, A, B, ...)                                                    \
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
               ", 1, 1, 1, 0;"                                                                           \
               : __VA_ARGS__                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define VPTQ_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VPTQ_D16(i) VPTQ_D4(i), VPTQ_D4(i + 4), VPTQ_D4(i + 8), VPTQ_D4(i + 12)
#define VPTQ_N8(TYPE) VPTQ_WGMMA("m64n8k16", TYPE, "%0,%1,%2,%3", "{%4,%5,%6,%7}", "%8", VPTQ_D4(0))
#define VPTQ_N16(TYPE) \
  VPTQ_WGMMA("m64n16k16", TYPE, "%0,%1,%2,%3,%4,%5,%6,%7", "{%8,%9,%10,%11}", "%12", VPTQ_D4(0), VPTQ_D4(4))
#define VPTQ_N32(TYPE)                                                                                               \
  VPTQ_WGMMA("m64n32k16", TYPE, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "{%16,%17,%18,%19}", "%20", \
             VPTQ_D16(0))
#define VPTQ_N64(TYPE)                                                                                        \
  VPTQ_WGMMA("m64n64k16", TYPE,                                                                               \
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
             "%26,%27,%28,%29,%30,%31",                                                                       \
             "{%32,%33,%34,%35}", "%36", VPTQ_D16(0), VPTQ_D16(16))
#define VPTQ_N128(TYPE)                                             \
  VPTQ_WGMMA("m64n128k16", TYPE,                                    \
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,"           \
             "%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
             "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38," \
             "%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
             "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",     \
             "{%64,%65,%66,%67}", "%68", VPTQ_D16(0), VPTQ_D16(16), VPTQ_D16(32), VPTQ_D16(48))

// D[64 x N] += A[64 x 16] B[16 x N] in fp32, begun but not awaited. A lane holds of D, for every 8 columns, rows
// lane/4 and lane/4 + 8 of the 16 of its warp, columns lane%4 * 2 and the next.
template <typename T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const unsigned (&a)[4], uint64_t b) {
#if VPTQ_HAS_WGMMA
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (N == 8) {
    if constexpr (kHalf)
      VPTQ_N8("f16");
    else
      VPTQ_N8("bf16");
  } else if constexpr (N == 16) {
    if constexpr (kHalf)
      VPTQ_N16("f16");
    else
      VPTQ_N16("bf16");
  } else if constexpr (N == 32) {
    if constexpr (kHalf)
      VPTQ_N32("f16");
    else
      VPTQ_N32("bf16");
  } else if constexpr (N == 64) {
    if constexpr (kHalf)
      VPTQ_N64("f16");
    else
      VPTQ_N64("bf16");
  } else {
    static_assert(N == 128);
    if constexpr (kHalf)
      VPTQ_N128("f16");
    else
      VPTQ_N128("bf16");
  }
#endif
}

#undef VPTQ_N128
#undef VPTQ_N64
#undef VPTQ_N32
#undef VPTQ_N16
#undef VPTQ_N8
#undef VPTQ_D16
#undef VPTQ_D4
#undef VPTQ_WGMMA

}  // namespace vptq
