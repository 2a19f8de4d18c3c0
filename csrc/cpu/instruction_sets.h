// Compiles the inner loops once per instruction set, whatever the compiler's target: one library serves every
// processor of an architecture. Included by linear.cpp alone.
#pragma once

#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace portable {
#include "simd_portable.h"
#include "linear_kernels.h"
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#include "simd_avx2.h"
#include "unpack_avx2.h"
#include "linear_kernels.h"
}  // namespace avx2

namespace avx512 {
#include "simd_avx512.h"
#include "unpack_avx2.h"
#include "linear_kernels.h"
}  // namespace avx512

inline InstructionSet widest() {
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx2 && has_avx512 ? kAvx512 : has_avx2 ? kAvx2 : kPortable;
}

inline const Kernels& kernels(InstructionSet set) {
  return set == kAvx512 ? avx512::kKernels : set == kAvx2 ? avx2::kKernels : portable::kKernels;
}
#else
inline InstructionSet widest() { return kPortable; }

inline const Kernels& kernels(InstructionSet) { return portable::kKernels; }
#endif
