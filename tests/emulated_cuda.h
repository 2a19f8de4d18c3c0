// As much of CUDA as csrc/quantize needs, on a CPU: thread blocks one after another, threads of a block one after
// another, or all at once where they wait for each other. tests/emulated_cuda.py rewrites launches into calls of
// `emulate`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <condition_variable>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx(0), blockIdx(0), blockDim(1);

class Barrier {
 public:
  void reset(int count) { expected_ = count, waiting_ = 0; }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++waiting_ == expected_) {
      waiting_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int expected_ = 0, waiting_ = 0, round_ = 0;
};
inline Barrier barrier;
inline void __syncthreads() { barrier.wait(); }

// Threads of a warp, which only run side by side where the kernel waits for others.
inline Barrier warps[32];
inline void __syncwarp() { warps[threadIdx.x / 32].wait(); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  static T given[32][32];
  given[threadIdx.x / 32][threadIdx.x % 32] = value;
  __syncwarp();
  const T got = given[threadIdx.x / 32][lane];
  __syncwarp();
  return got;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ other);
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  for (int step = 16; step; step /= 2) {
    const unsigned other = __shfl_xor_sync(mask, value, step);
    value = other < value ? other : value;
  }
  return value;
}

inline void emulate(dim3 grid, unsigned threads, bool waits, const std::function<void()>& kernel) {
  auto run = [&](unsigned x, unsigned y, unsigned t) {
    blockIdx = dim3(x, y), threadIdx = dim3(t), blockDim = dim3(threads);
    kernel();
  };
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      if (!waits) {
        for (unsigned t = 0; t < threads; t++) run(x, y, t);
        continue;
      }
      barrier.reset(threads);
      for (Barrier& warp : warps) warp.reset(32);
      std::vector<std::thread> all;
      for (unsigned t = 0; t < threads; t++) all.emplace_back(run, x, y, t);
      for (auto& thread : all) thread.join();
    }
}

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline void atomicMin(unsigned long long* at, unsigned long long value) { *at = min(*at, value); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

using cudaStream_t = void*;
inline void cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) { std::memset(at, value, bytes); }
inline int cudaSetDevice(int) { return 0; }
inline int cudaGetLastError() { return 0; }
