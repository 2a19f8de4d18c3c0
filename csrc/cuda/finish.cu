// The sums of all jobs -> outputs: splits are added in a fixed order, so results do not depend on who came first.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"

namespace vptq {
namespace {

constexpr int kFinishThreads = 128;
constexpr int kFinishBlocks = 16;  // on a multiprocessor: 32 registers a thread

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

// `Share` neighbouring threads share a number: each adds its share of the splits. A thread has `Each` tokens' numbers
// of an output. Registers are few, that blocks may wait beside those of the kernel whose sums they want.
template <typename T, int Share, int Each, typename Records>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks)
    finish_kernel(const __grid_constant__ Records records, int module_count, const int32_t* __restrict__ work,
                  const float* __restrict__ workspace, int64_t stride, const float* __restrict__ norm,
                  const T* __restrict__ bias, T* __restrict__ y, int out_features, int tokens) {
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
  const float* sums[Each];
  float products[Each] = {};
#pragma unroll
  for (int i = 0; i < Each; i++) sums[i] = workspace + min(int(blockIdx.y) * Each + i, tokens - 1) * stride;
  for (int p = module.part_begin; p < module.part_end; p++) {
    const Part& part = records.parts[p];
    const int vector_row = (n + part.skip) / part.vector_len, element = (n + part.skip) % part.vector_len;
    const int within = element - part.plane * 8;
    if (within < 0 || within >= part.width) continue;
    const int at = part.out + vector_row * part.width + within;
    const int splits = part.counts < 0 ? part.splits : __ldg(work + part.counts + vector_row * part.width / kWideRows);
#pragma unroll(8 / Each)
    for (int s = mine; s < splits; s += Share) {
#pragma unroll
      for (int i = 0; i < Each; i++) products[i] += __ldcg(sums[i] + at + int64_t(s) * part.stride);
    }
  }
#pragma unroll
  for (int i = 0; i < Each; i++) {
#pragma unroll
    for (int o = 1; o < Share; o *= 2) products[i] += __shfl_xor_sync(together, products[i], o);
    const int token = blockIdx.y * Each + i;
    float dot = 0.f;
#pragma unroll 4
    for (int d = 0; d < module.dots; d++) dot += __ldcg(sums[i] + module.dot + d);
    if (mine == 0 && token < tokens)
      y[int64_t(token) * out_features + output] = Number<T>::narrow(products[i] * factor + dot * offset + added);
  }
}

}  // namespace

cudaError_t finish(Type type, const Module* modules, int module_count, const Part* parts, int part_count,
                   const Module* device_modules, const Part* device_parts, const int32_t* work, const float* workspace,
                   int64_t stride, const float* norm, const void* bias, void* y, int out_features, int tokens,
                   cudaStream_t stream) {
  auto run = [&](auto number, const auto& records) {
    using T = decltype(number);
    using Records = std::decay_t<decltype(records)>;
    auto go = [&](auto kernel, int share, int each) {
      const dim3 grid((out_features * share + kFinishThreads - 1) / kFinishThreads, (tokens + each - 1) / each);
      return launch(kernel, grid, kFinishThreads, 0, stream, true, records, module_count, work, workspace, stride, norm,
                    static_cast<const T*>(bias), static_cast<T*>(y), out_features, tokens);
    };
    int splits = 0;
    for (int p = 0; p < part_count; p++) splits = std::max(splits, parts[p].splits);
    // Few numbers of many splits would leave the GPU idle; of many numbers of few splits, several are had as fast as
    // one.
    if (tokens <= 2 && splits >= 8) return go(finish_kernel<T, 4, 1, Records>, 4, 1);
    if (tokens > 8 && splits <= 4 && (tokens <= 32 || out_features >= 8192))
      return go(finish_kernel<T, 1, 4, Records>, 1, 4);
    return go(finish_kernel<T, 1, 1, Records>, 1, 1);
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
