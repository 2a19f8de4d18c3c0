// What every kernel here needs of the machine: the two 16-bit types, ldmatrix, mma, asynchronous copies, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace vptq {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
struct Number;

template <>
struct Number<__half> {
  static __device__ __forceinline__ float wide(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
};

template <>
struct Number<__nv_bfloat16> {
  static __device__ __forceinline__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};

template <typename T>
__device__ __forceinline__ unsigned pack(T low, T high) {
  return unsigned(*reinterpret_cast<uint16_t*>(&low)) | unsigned(*reinterpret_cast<uint16_t*>(&high)) << 16;
}

template <typename T>
__device__ __forceinline__ float2 unpack(unsigned pair);
template <>
__device__ __forceinline__ float2 unpack<__half>(unsigned pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Two sums of 16-bit numbers, each rounded; `volatile`, lest they move behind a product that is begun after them.
template <typename T>
__device__ __forceinline__ void add_pairs(unsigned& to, unsigned pair) {
  if constexpr (std::is_same_v<T, __half>) asm volatile("add.rn.f16x2 %0, %0, %1;" : "+r"(to) : "r"(pair));
#if __CUDA_ARCH__ >= 900
  else
    asm volatile("add.rn.bf16x2 %0, %0, %1;" : "+r"(to) : "r"(pair));
#endif
}

// A pair of activations times a norm's factors, rounded once.
template <typename T>
__device__ __forceinline__ unsigned scaled(unsigned pair, float2 factors) {
  const float2 v = unpack<T>(pair);
  return pack(Number<T>::narrow(v.x * factors.x), Number<T>::narrow(v.y * factors.y));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of 16-bit numbers, transposed; lane i names the 16-byte row i%8 of matrix i/8. Any row will do,
// which makes this instruction a gather.
__device__ __forceinline__ void ldmatrix_trans(unsigned (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// D[16x8] += A[16x16] B[16x8] in fp32.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1);

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                            unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                   unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_async16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global));
}

// The same through the L1 cache.
__device__ __forceinline__ void copy_async16_cached(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global));
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `Pending` groups of this thread's copies are there.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Copies of `bytes` (a multiple of 16) by the copy engine, begun by one thread; `barrier` has been initialised for one
// arrival, and its phase ends when the bytes that were announced are there.
__device__ __forceinline__ void announce_bulk_copy(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}

__device__ __forceinline__ void initialise_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// Until a phase of a barrier has ended, which WAIT, an instruction of mbarrier, asks for.
#define VPTQ_UNTIL_PHASE(WAIT)                                                                                \
  for (uint32_t done = 0; !done;)                                                                             \
  asm volatile("{\n.reg .pred p;\nmbarrier." WAIT ".parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" \
               : "=r"(done)                                                                                   \
               : "r"(barrier), "r"(parity)                                                                    \
               : "memory")
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) { VPTQ_UNTIL_PHASE("test_wait"); }

// The same, but the thread sleeps meanwhile and takes no turns from others. (Waking takes longer: for waits that are
// seldom long.)
__device__ __forceinline__ void sleep_until_phase(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  VPTQ_UNTIL_PHASE("try_wait");
#endif
}
#undef VPTQ_UNTIL_PHASE

// Index streams are read once: they need not push anything out of the L1 cache.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// The word `Offset` words further. (Left to itself the compiler keeps an address for each of several offsets. And a
// load from constant memory, `.nc`, it moves behind wait_for_previous, which it should run ahead of.)
template <int Offset>
__device__ __forceinline__ unsigned load_once(const unsigned* p) {
  unsigned r;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1 + %2];" : "=r"(r) : "l"(p), "n"(Offset * 4));
  return r;
}

// Weights, and what else no kernel writes, ahead of wait_for_previous: see above.
__device__ __forceinline__ float load_ahead(const float* p) {
  float r;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(r) : "l"(p));
  return r;
}
__device__ __forceinline__ int load_ahead(const int32_t* p) {
  int r;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}
__device__ __forceinline__ float4 load_ahead(const float4* p) {
  float4 r;
  asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "l"(p));
  return r;
}
__device__ __forceinline__ float2 load_ahead(const float2* p) {
  float2 r;
  asm volatile("ld.global.v2.f32 {%0,%1}, [%2];" : "=f"(r.x), "=f"(r.y) : "l"(p));
  return r;
}

// From shared memory by its own address: a generic pointer would have to be resolved first.
__device__ __forceinline__ unsigned load_shared_word(uint32_t address) {
  unsigned r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address));
  return r;
}

// f(constant 0), ... f(constant N - 1).
template <int N, int I = 0, typename F>
__device__ __forceinline__ void unrolled(F&& f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>());
    unrolled<N, I + 1>(f);
  }
}

// Programmatic dependent launch: a kernel may start while the one before it drains; what that one wrote is visible
// after wait_for_previous. Nothing written by this stream may be touched before it, except constant weights.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   bool overlap, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace vptq
