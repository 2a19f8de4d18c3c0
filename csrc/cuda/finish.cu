// The sums of all jobs -> outputs: splits are added in a fixed order, so results do not depend on who came first.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"

namespace vptq {
namespace {

constexpr int kFinishThreads = 128;
constexpr int kFinishBlocks = 16;  // on a multiprocessor: 32 registers a thread
constexpr int kBeside = 132;       // blocks: one on each of Hopper's multiprocessors

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

// The sums of one output in a part of its module.
struct Sums {
  int at, splits;  // none: the output is in another part
};
__device__ __forceinline__ Sums sums_of(const Part& part, int n, const int32_t* work) {
  const int vector_row = (n + part.skip) / part.vector_len, element = (n + part.skip) % part.vector_len;
  const int within = element - part.plane * 8, at = vector_row * part.width + within;
  if (within < 0 || within >= part.width) return {0, 0};
  return {part.out + at,
          part.counts < 0 ? part.splits : __ldg(work + part.counts + vector_row * part.width / kCountedSums)};
}

template <typename Records>
__device__ __forceinline__ const Module& module_of(const Records& records, int module_count, int output) {
  int m = 0;
  while (m + 1 < module_count && output >= records.modules[m].out_end) m++;
  return records.modules[m];
}

// Up to N numbers on their way, all at once: in a loop, those of its last turns wait for those before them.
template <int N>
struct Loads {
  float values[N];

  __device__ __forceinline__ Loads(const float* from, int step, int count) {
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = i < count ? __ldcg(from + i * step) : 0.f;
  }
  __device__ __forceinline__ float added_to(float sum) const {
#pragma unroll
    for (int i = 0; i < N; i++) sum += values[i];
    return sum;
  }
};

// `Share` neighbouring threads share a number: each adds its share of the splits. Registers are few, that blocks may
// wait beside those of the kernel whose sums they want.
template <typename T, int Share, typename Records>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks)
    finish_kernel(const __grid_constant__ Records records, int module_count, const int32_t* __restrict__ work,
                  const float* __restrict__ workspace, int64_t stride, const float* __restrict__ norm,
                  const T* __restrict__ bias, T* __restrict__ y, int out_features, int tokens) {
  const int output = (blockIdx.x * kFinishThreads + threadIdx.x) / Share, mine = threadIdx.x % Share;
  let_next_start();
  if (output >= out_features) return;
  const unsigned together = ((1u << Share) - 1) << (threadIdx.x % 32 / Share * Share);
  const Module& module = module_of(records, module_count, output);
  if (module.dense) return;
  const int n = output - module.out_begin, token = blockIdx.y;
  const float added = bias ? Number<T>::wide(bias[output]) : 0.f;
  const float factor = module.scale < 0 ? 1.f : norm[module.scale + n];
  const float offset = module.scale < 0 ? 1.f : norm[module.shift + n];
  wait_for_previous();
  const float* sums = workspace + token * stride;
  float product = 0.f, dot = 0.f;
  auto add_up = [&](auto&& add) {
    for (int p = module.part_begin; p < module.part_end; p++) {
      const Part& part = records.parts[p];
      const Sums mine_of = sums_of(part, n, work);
      add(sums + mine_of.at + mine * part.stride, Share * part.stride, (mine_of.splits - mine + Share - 1) / Share);
    }
  };
  if constexpr (Share == 1) {
    add_up([&](const float* from, int step, int count) {
#pragma unroll 8
      for (int s = 0; s < count; s++) product += __ldcg(from + s * step);
    });
#pragma unroll 4
    for (int d = 0; d < module.dots; d++) dot += __ldcg(sums + module.dot + d);
  } else {
    constexpr int kAtOnce = 6, kDotsAtOnce = 2;
    const Loads<kDotsAtOnce> dots(sums + module.dot + mine, Share, (module.dots - mine + Share - 1) / Share);
    add_up([&](const float* from, int step, int count) {
      for (int s = 0; s < count; s += kAtOnce)
        product = Loads<kAtOnce>(from + s * step, step, count - s).added_to(product);
    });
    dot = dots.added_to(0.f);
    for (int d = mine + kDotsAtOnce * Share; d < module.dots; d += Share) dot += __ldcg(sums + module.dot + d);
#pragma unroll
    for (int o = 1; o < Share; o *= 2) {
      product += __shfl_xor_sync(together, product, o);
      dot += __shfl_xor_sync(together, dot, o);
    }
  }
  if (mine == 0) y[int64_t(token) * out_features + output] = Number<T>::narrow(product * factor + dot * offset + added);
}

// Two or four floats at once.
template <int N>
struct alignas(N * 4) Floats {
  float values[N];
};
template <int N>
__device__ __forceinline__ Floats<N> load_floats(const float* from) {
  using Word = std::conditional_t<N == 4, float4, float2>;
  const Word word = __ldcg(reinterpret_cast<const Word*>(from));
  return *reinterpret_cast<const Floats<N>*>(&word);
}

// The same for many tokens, of which a thread has `Each`, and of each of those `Near` neighbouring outputs, which are
// neighbours in the workspace too.
template <typename T, int Near, int Each, typename Records>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks / 2)
    finish_many_kernel(const __grid_constant__ Records records, int module_count, const int32_t* __restrict__ work,
                       const float* __restrict__ workspace, int64_t stride, const float* __restrict__ norm,
                       const T* __restrict__ bias, T* __restrict__ y, int out_features, int tokens) {
  const int output = (blockIdx.x * kFinishThreads + threadIdx.x) * Near;
  let_next_start();
  if (output >= out_features) return;
  const Module& module = module_of(records, module_count, output);
  if (module.dense) return;
  const int n = output - module.out_begin;
  Sums mine = sums_of(records.parts[module.part_begin], n, work);
  wait_for_previous();
  const float* sums[Each];
  float products[Each][Near] = {}, dots[Each];
#pragma unroll
  for (int i = 0; i < Each; i++) {
    sums[i] = workspace + min(int(blockIdx.y) * Each + i, tokens - 1) * stride;
    dots[i] = module.dots ? __ldcg(sums[i] + module.dot) : 0.f;
  }
  for (int p = module.part_begin; p < module.part_end; p++) {
    if (p > module.part_begin) mine = sums_of(records.parts[p], n, work);
    const int64_t split = records.parts[p].stride;
#pragma unroll(Each == 4 ? 2 : 4)
    for (int s = 0; s < mine.splits; s++) {
#pragma unroll
      for (int i = 0; i < Each; i++) {
        const Floats<Near> more = load_floats<Near>(sums[i] + mine.at + s * split);
#pragma unroll
        for (int e = 0; e < Near; e++) products[i][e] += more.values[e];
      }
    }
  }
  for (int d = 1; d < module.dots; d++) {
#pragma unroll
    for (int i = 0; i < Each; i++) dots[i] += __ldcg(sums[i] + module.dot + d);
  }
  float added[Near], factors[Near], offsets[Near];
#pragma unroll
  for (int e = 0; e < Near; e++) {
    added[e] = bias ? Number<T>::wide(bias[output + e]) : 0.f;
    factors[e] = module.scale < 0 ? 1.f : norm[module.scale + n + e];
    offsets[e] = module.scale < 0 ? 1.f : norm[module.shift + n + e];
  }
#pragma unroll
  for (int i = 0; i < Each; i++) {
    const int token = blockIdx.y * Each + i;
    if (token >= tokens) break;
    T* to = y + int64_t(token) * out_features + output;
    unsigned out[Near / 2];
#pragma unroll
    for (int e = 0; e < Near; e += 2)
      out[e / 2] =
          pack(Number<T>::narrow(products[i][e] * factors[e] + dots[i] * offsets[e] + added[e]),
               Number<T>::narrow(products[i][e + 1] * factors[e + 1] + dots[i] * offsets[e + 1] + added[e + 1]));
    if constexpr (Near == 4)
      *reinterpret_cast<uint2*>(to) = make_uint2(out[0], out[1]);
    else
      *reinterpret_cast<unsigned*>(to) = out[0];
  }
}

// Whether any `near` neighbouring outputs, from a multiple of that on, are neighbours in a part's sums.
bool in_groups(int near, const Module* modules, int module_count, const Part* parts, int part_count) {
  bool all = true;
  for (int m = 0; m < module_count; m++) all = all && modules[m].out_end % near == 0;
  for (int p = 0; p < part_count; p++) all = all && parts[p].vector_len % near == 0 && parts[p].skip % near == 0;
  return all;
}

}  // namespace

cudaError_t finish(Type type, const Module* modules, int module_count, const Part* parts, int part_count,
                   const Module* device_modules, const Part* device_parts, const int32_t* work, const float* workspace,
                   int64_t stride, const float* norm, const void* bias, void* y, int out_features, int tokens,
                   cudaStream_t stream) {
  auto run = [&](auto number, const auto& records) {
    using T = decltype(number);
    using Records = std::decay_t<decltype(records)>;
    auto go = [&](auto kernel, int threads, int each) {
      const dim3 grid((threads + kFinishThreads - 1) / kFinishThreads, (tokens + each - 1) / each);
      return launch(kernel, grid, kFinishThreads, 0, stream, true, records, module_count, work, workspace, stride, norm,
                    static_cast<const T*>(bias), static_cast<T*>(y), out_features, tokens);
    };
    int splits = 0;
    for (int p = 0; p < part_count; p++) splits = std::max(splits, parts[p].splits);
    // Few numbers of many splits would leave the GPU idle.
    if (tokens <= 2 && splits >= 8) return go(finish_kernel<T, 4, Records>, out_features * 4, 1);
    // Many numbers of few splits: no more blocks than can wait beside those of the kernel before, if it can be, for the
    // next kernel begins when all are there.
    auto many = [&](auto near) {
      constexpr int kNear = decltype(near)::value;
      const int threads = out_features / kNear, blocks = (threads + kFinishThreads - 1) / kFinishThreads;
      if (blocks * tokens <= kBeside) return go(finish_many_kernel<T, kNear, 1, Records>, threads, 1);
      if (blocks * tokens <= kBeside * 2) return go(finish_many_kernel<T, kNear, 2, Records>, threads, 2);
      return go(finish_many_kernel<T, kNear, 4, Records>, threads, 4);
    };
    if (tokens > 8 && splits <= 16) {
      if (in_groups(4, modules, module_count, parts, part_count)) return many(std::integral_constant<int, 4>());
      if (in_groups(2, modules, module_count, parts, part_count)) return many(std::integral_constant<int, 2>());
    }
    return go(finish_kernel<T, 1, Records>, out_features, 1);
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
