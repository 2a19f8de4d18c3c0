// The sums of all jobs -> outputs: splits are added in a fixed order, so results do not depend on who came first.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"

namespace vptq {
namespace {

constexpr int kFinishThreads = 128;

// The records of an ordinary layer travel as arguments of the kernel: reading them from memory, cold as it is by now,
// took longer than the sums.
struct Few {
  static constexpr int kModules = 4, kParts = 24;
  Module modules[kModules];
  Part parts[kParts];
};
struct Many {
  const Module* modules;
  const Part* parts;
};

// `Share` neighbouring threads share a number: each adds its share of the splits.
template <typename T, int Share, typename Records>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ Records records, int module_count, const int32_t* __restrict__ work,
                  const float* __restrict__ workspace, int64_t stride, const float* __restrict__ norm, const T* __restrict__ bias, T* __restrict__ y,
                  int out_features) {
  const int output = (blockIdx.x * kFinishThreads + threadIdx.x) / Share, mine = threadIdx.x % Share;
  let_next_start();
  if (output >= out_features) return;
  const unsigned together = ((1u << Share) - 1) << (threadIdx.x % 32 / Share * Share);
  int m = 0;
  while (m + 1 < module_count && output >= records.modules[m].out_end) m++;
  const Module& module = records.modules[m];
  if (module.dense) return;
  const int n = output - module.out_begin;
  const float added = bias ? Number<T>::wide(bias[output]) : 0.f;
  const float factor = module.scale < 0 ? 1.f : norm[module.scale + n];
  const float offset = module.scale < 0 ? 1.f : norm[module.shift + n];
  wait_for_previous();
  const float* sums = workspace + blockIdx.y * stride;
  const float dot = module.dot < 0 ? 0.f : __ldcg(sums + module.dot);
  float product = 0.f;
  for (int p = module.part_begin; p < module.part_end; p++) {
    const Part& part = records.parts[p];
    const int vector_row = (n + part.skip) / part.vector_len, element = (n + part.skip) % part.vector_len;
    const int within = element - part.plane * 8;
    if (within < 0 || within >= part.width) continue;
    const float* at = sums + part.out + vector_row * part.width + within;
    const int splits = part.counts < 0 ? part.splits : __ldg(work + part.counts + vector_row * part.width / kWideRows);
#pragma unroll 8
    for (int s = mine; s < splits; s += Share) product += __ldcg(at + int64_t(s) * part.stride);
  }
#pragma unroll
  for (int o = 1; o < Share; o *= 2) product += __shfl_xor_sync(together, product, o);
  if (mine == 0)
    y[int64_t(blockIdx.y) * out_features + output] = Number<T>::narrow(product * factor + dot * offset + added);
}

}  // namespace

cudaError_t finish(Type type, const Module* modules, int module_count, const Part* parts, int part_count,
                   const Module* device_modules, const Part* device_parts, const int32_t* work, const float* workspace,
                   int64_t stride, const float* norm, const void* bias, void* y, int out_features, int tokens, cudaStream_t stream) {
  // Few numbers of many splits would leave the GPU idle.
  const bool shared = tokens <= 2 && std::any_of(parts, parts + part_count, [](const Part& p) { return p.splits >= 8; });
  const dim3 grid((out_features * (shared ? 4 : 1) + kFinishThreads - 1) / kFinishThreads, tokens);
  auto go = [&](auto kernel, auto number, const auto& records) {
    using T = decltype(number);
    return launch(kernel, grid, kFinishThreads, 0, stream, true, records, module_count, work, workspace, stride, norm,
                  static_cast<const T*>(bias), static_cast<T*>(y), out_features);
  };
  auto run = [&](auto number, const auto& records) {
    using T = decltype(number);
    using Records = std::decay_t<decltype(records)>;
    return shared ? go(finish_kernel<T, 4, Records>, number, records) : go(finish_kernel<T, 1, Records>, number, records);
  };
  if (module_count <= Few::kModules && part_count <= Few::kParts) {
    Few few = {};
    std::copy(modules, modules + module_count, few.modules);
    std::copy(parts, parts + part_count, few.parts);
    return type == Type::kHalf ? run(__half(), few) : run(__nv_bfloat16(), few);
  }
  const Many many{device_modules, device_parts};
  return type == Type::kHalf ? run(__half(), many) : run(__nv_bfloat16(), many);
}

}  // namespace vptq
