// The GPU's twin of ../cpu/assign.cpp: nearest centroids of short vectors, main and residual index chosen together
// (quantize/kmeans.py), alone and inside the column walk and coordinate descent (quantize/columns.py).
//
// Scores are computed and compared in registers, never stored: a matrix product would write and read 4 bytes for every
// pair of vector and centroid, and there are 5e13 of those in one pass over the layers of an 8B model at 65536
// centroids. They are float32 sums in a fixed order, and the least is found by score, then by index: the result does
// not depend on the launch, nor on the order in which thread blocks finish. Only minima are taken atomically.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lengths.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPoints = 4;               // of a thread
constexpr int kTile = 32 * kPoints;      // of a block
constexpr int kChunk = kThreads;         // centroids in shared memory
constexpr float kFar = 3.402823466e38f;  // the largest float: of padding
constexpr int kSpread = 8;               // columns that a thread of `spread` changes
constexpr int kHeld = 4;                 // columns that a lane of `code_rows` holds
constexpr int kRowWarps = 8;             // of a block of `code_rows`, at most: it has a row of vectors
constexpr int kBusy = 16;                // of its warps a multiprocessor holds about so many
constexpr int kCandidates = 8;           // main centroids that one pass finds
constexpr int kFewCentroids = 8192;      // of both books, that the threads of a block look through

using Key = unsigned long long;  // a score, made to sort as an integer, above the index

__host__ __device__ constexpr int padded(int v) { return (v + 3) / 4 * 4; }

__device__ inline Key key_of(float score, unsigned index) {
  const unsigned bits = __float_as_uint(score + 0.0f);  // no negative zero, which would sort below zero
  return Key(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | index;
}

__device__ inline float score_of(Key key) {
  const unsigned bits = unsigned(key >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Half the squared distance less |x|^2 / 2: half_norm - x . centroid, with x negated.
template <int V>
__device__ inline float score(const float (&minus)[V], const float* centroid, float half_norm) {
  float s = half_norm;
#pragma unroll
  for (int d = 0; d < V; d++) s = fmaf(minus[d], centroid[d], s);
  return s;
}

// Lowers nearest[n] to the key of the best centroid of the book, or of those behind `after[n]` in the order of keys.
// Lanes hold points; warps share the centroids of a chunk, blockIdx.y the chunks.
template <int V, bool After>
__global__ void __launch_bounds__(kThreads)
    search(const float* __restrict__ points, int64_t n, const float* __restrict__ book, int k, int per_block,
           const Key* __restrict__ after, Key* __restrict__ nearest) {
  constexpr int kGroup = V <= 8 ? 4 : 2;  // centroids whose minimum is kept before it is known which it was
  __shared__ __align__(16) float entries[kChunk][padded(V)];
  __shared__ __align__(16) float half_norms[kChunk];
  __shared__ Key found[kWarps][kTile];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = blockIdx.y * per_block, end = min(begin + per_block, k);
  float minus[kPoints][V], best[kPoints], least[kPoints];
  int at[kPoints];
  unsigned least_index[kPoints];
#pragma unroll
  for (int p = 0; p < kPoints; p++) {
    const int64_t i = int64_t(blockIdx.x) * kTile + p * 32 + lane;
#pragma unroll
    for (int d = 0; d < V; d++) minus[p][d] = i < n ? -points[i * V + d] : 0.0f;
    best[p] = kFar;
    at[p] = begin;
    if (After) {
      const Key key = i < n ? after[i] : 0;
      least[p] = score_of(key);
      least_index[p] = unsigned(key);
    }
  }
  for (int base = begin; base < end; base += kChunk) {
    __syncthreads();
    const int c = base + threadIdx.x;
    float norm = 0.0f;
#pragma unroll
    for (int d = 0; d < V; d++) {
      const float value = c < end ? book[size_t(c) * V + d] : 0.0f;
      entries[threadIdx.x][d] = value;
      norm = fmaf(value, value, norm);
    }
    half_norms[threadIdx.x] = c < end ? norm / 2 : kFar;
    __syncthreads();
    const int first = warp * (kChunk / kWarps);
    if (base + first >= end) continue;
#pragma unroll 1
    for (int g = first; g < first + kChunk / kWarps; g += kGroup) {
      float centroid[kGroup][V], half_norm[kGroup];
#pragma unroll
      for (int e = 0; e < kGroup; e++) {
        half_norm[e] = half_norms[g + e];
#pragma unroll
        for (int d = 0; d < V; d++) centroid[e][d] = entries[g + e][d];
      }
#pragma unroll
      for (int p = 0; p < kPoints; p++) {
        float lowest = kFar;
#pragma unroll
        for (int e = 0; e < kGroup; e++) {
          float s = score(minus[p], centroid[e], half_norm[e]);
          if (After) s = s > least[p] || (s == least[p] && unsigned(base + g + e) > least_index[p]) ? s : kFar;
          lowest = fminf(lowest, s);
        }
        if (lowest < best[p]) {
          best[p] = lowest;
          at[p] = base + g;
        }
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kPoints; p++) {
    // Which of its group it was: the same sums again.
    int chosen = at[p];
#pragma unroll 1
    for (int e = 0; e < kGroup && at[p] + e < end; e++) {
      float centroid[V], norm = 0.0f;
#pragma unroll
      for (int d = 0; d < V; d++) {
        centroid[d] = book[size_t(at[p] + e) * V + d];
        norm = fmaf(centroid[d], centroid[d], norm);
      }
      const float s = score(minus[p], centroid, norm / 2);
      const bool allowed = !After || s > least[p] || (s == least[p] && unsigned(at[p] + e) > least_index[p]);
      if (allowed && s == best[p]) {
        chosen = at[p] + e;
        break;
      }
    }
    found[warp][p * 32 + lane] = key_of(best[p], unsigned(chosen));
  }
  __syncthreads();
  const int64_t i = int64_t(blockIdx.x) * kTile + threadIdx.x;
  if (threadIdx.x >= kTile || i >= n) return;
  Key lowest = found[0][threadIdx.x];
  for (int w = 1; w < kWarps; w++) lowest = min(lowest, found[w][threadIdx.x]);
  atomicMin(nearest + i, lowest);
}

// What each of `candidates` main centroids leaves of each point: left [candidates, n, v].
template <int V>
__global__ void leave(const float* __restrict__ points, int64_t n, int candidates, const float* __restrict__ book,
                      const Key* __restrict__ nearest, float* __restrict__ left) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n * candidates) return;
  const float* centroid = book + size_t(unsigned(nearest[i])) * V;
#pragma unroll
  for (int d = 0; d < V; d++) left[i * V + d] = points[i % n * V + d] - centroid[d];
}

// What is done with the choice: kept; kept, and its error over `diagonal` written; kept if it is nearer than what was
// chosen before, and the move from there written.
enum class Use { kAssign, kCode, kSweep };

template <int V, Use How>
__global__ void choose(const float* __restrict__ points, int64_t n, int candidates, const float* __restrict__ main,
                       const float* __restrict__ residual, const Key* __restrict__ nearest,
                       const Key* __restrict__ nearest_residual, const float* __restrict__ left,
                       const float* __restrict__ diagonal, int64_t* __restrict__ index,
                       int64_t* __restrict__ residual_index, float* __restrict__ result) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned chosen = unsigned(nearest[i]), chosen_residual = 0;
  if (residual) {
    float lowest = kFar;
    for (int t = 0; t < candidates; t++) {
      const int64_t j = t * n + i;
      float norm = 0.0f;
#pragma unroll
      for (int d = 0; d < V; d++) norm = fmaf(left[j * V + d], left[j * V + d], norm);
      const float error = norm / 2 + score_of(nearest_residual[j]);
      if (t == 0 || error < lowest) {
        lowest = error;
        chosen = unsigned(nearest[j]);
        chosen_residual = unsigned(nearest_residual[j]);
      }
    }
  }
  if constexpr (How == Use::kAssign) {
    index[i] = chosen;
    if (residual) residual_index[i] = chosen_residual;
  } else {
    float after[V], change[V];
    bool taken = true;
#pragma unroll
    for (int d = 0; d < V; d++) {
      after[d] = main[size_t(chosen) * V + d];
      if (residual) after[d] += residual[size_t(chosen_residual) * V + d];
    }
    if constexpr (How == Use::kCode) {
#pragma unroll
      for (int d = 0; d < V; d++) change[d] = (points[i * V + d] - after[d]) / *diagonal;
    } else {
      float gain = 0.0f;
#pragma unroll
      for (int d = 0; d < V; d++) {
        float before = main[size_t(index[i]) * V + d];
        if (residual) before += residual[size_t(residual_index[i]) * V + d];
        const float x = points[i * V + d];
        gain += (x - before) * (x - before) - (x - after[d]) * (x - after[d]);
        change[d] = after[d] - before;
      }
      taken = gain > 0.0f;
    }
#pragma unroll
    for (int d = 0; d < V; d++) result[i * V + d] = taken ? change[d] : 0.0f;
    if (!taken) return;
    index[i] = chosen;
    if (residual) residual_index[i] = chosen_residual;
  }
}

// block[c] -= weights[c] * change, for the columns behind the one just chosen; all [size].
__global__ void spread(const float* __restrict__ change, int64_t size, const float* __restrict__ weights, int columns,
                       float* __restrict__ block) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const float by = change[i];
  const int first = blockIdx.y * kSpread;
#pragma unroll
  for (int c = first; c < first + kSpread; c++)
    if (c < columns) block[c * size + i] -= weights[c] * by;
}

// An entry of a book that lies on 16 bytes, in as few loads as its length allows.
template <int V>
__device__ inline void load(const float* from, float (&to)[V]) {
  constexpr int kAtOnce = V % 4 == 0 ? 4 : V % 2 == 0 ? 2 : 1;
  struct alignas(4 * kAtOnce) Part {
    float value[kAtOnce];
  };
#pragma unroll
  for (int d = 0; d < V; d += kAtOnce) {
    const Part part = *reinterpret_cast<const Part*>(from + d);
#pragma unroll
    for (int e = 0; e < kAtOnce; e++) to[d + e] = part.value[e];
  }
}

__device__ inline Key least_of_warp(Key key) {
  const unsigned high = unsigned(key >> 32), least = __reduce_min_sync(~0u, high);
  return Key(least) << 32 | __reduce_min_sync(~0u, high == least ? unsigned(key) : ~0u);
}

// The least scores that a lane has seen, in order; of equal ones those that came first.
template <int T>
struct Least {
  float score[T];
  unsigned index[T];

  __device__ inline Least() {
#pragma unroll
    for (int t = 0; t < T; t++) {
      score[t] = kFar;
      index[t] = 0;
    }
  }

  __device__ inline void offer(float s, unsigned i) {
    if (!(s < score[T - 1])) return;
    score[T - 1] = s;
    index[T - 1] = i;
#pragma unroll
    for (int t = T - 1; t > 0; t--) {
      const bool lower = score[t] < score[t - 1];
      const float low = lower ? score[t] : score[t - 1], high = lower ? score[t - 1] : score[t];
      const unsigned first = lower ? index[t] : index[t - 1], second = lower ? index[t - 1] : index[t];
      score[t - 1] = low, score[t] = high;
      index[t - 1] = first, index[t] = second;
    }
  }

  // Takes the least of all lanes of a warp out.
  __device__ inline Key take() {
    const Key own = key_of(score[0], index[0]), least = least_of_warp(own);
    const bool mine = own == least;
#pragma unroll
    for (int t = 0; t + 1 < T; t++) {
      score[t] = mine ? score[t + 1] : score[t];
      index[t] = mine ? index[t + 1] : index[t];
    }
    if (mine) score[T - 1] = kFar, index[T - 1] = 0;
    return least;
  }
};

// A whole block of columns in one launch, where books are small: what a column leaves to the columns behind it stays in
// its row of vectors, so that rows go their own ways. A thread block has a row: threads share the centroids, and the
// first warp's lanes hold the row's columns, kHeld of every 32. Up to T candidates are found in one pass over the main
// book, and each pass over the residual one is for several of them. Computes what `search`, `leave`, `choose` and
// `spread` do, in the same order.
template <int V, int T>
__global__ void __launch_bounds__(32 * kRowWarps)
    code_rows(const float* __restrict__ block, int columns, int64_t rows, const float* __restrict__ matrix,
              int64_t matrix_stride, const float* __restrict__ main, int k, const float* __restrict__ residual, int r,
              int candidates, bool sweep, int64_t* __restrict__ index, int64_t* __restrict__ residual_index,
              float* __restrict__ result) {
  static_assert(kRowWarps * T <= 64, "a lane merges two entries of the lists");
  constexpr int kBatch = V > 8 ? (T < 2 ? T : 2) : (T < 4 ? T : 4);  // candidates of a pass over the residual book
  __shared__ float point[V];
  __shared__ Key found[kRowWarps * T], found_residual[kRowWarps * T];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x, listed = threads / 32 * T;
  const int64_t row = blockIdx.x, size = rows * V;
  float held[kHeld][V];
#pragma unroll
  for (int t = 0; t < kHeld; t++)
#pragma unroll
    for (int d = 0; d < V; d++)
      held[t][d] = warp == 0 && t * 32 + lane < columns ? block[(t * 32 + lane) * size + row * V + d] : 0.0f;
#pragma unroll 1
  for (int j = 0; j < columns; j++) {
    if (warp == 0) {
      if (j && j % 32 == 0) {  // the next 32 columns come first: registers have no index
#pragma unroll
        for (int t = 0; t + 1 < kHeld; t++)
#pragma unroll
          for (int d = 0; d < V; d++) held[t][d] = held[t + 1][d];
      }
      if (lane == j % 32) {
#pragma unroll
        for (int d = 0; d < V; d++) point[d] = held[0][d];
      }
    }
    __syncthreads();
    float x[V], minus[V];
#pragma unroll
    for (int d = 0; d < V; d++) {
      x[d] = point[d];
      minus[d] = -x[d];
    }
    Least<T> nearby;
    for (int c = threadIdx.x; c < k; c += threads) {
      float centroid[V], norm = 0.0f;
      load<V>(main + size_t(c) * V, centroid);
#pragma unroll
      for (int d = 0; d < V; d++) norm = fmaf(centroid[d], centroid[d], norm);
      nearby.offer(score(minus, centroid, norm / 2), unsigned(c));
    }
    Key nearest[T];
#pragma unroll
    for (int t = 0; t < T; t++) {
      nearest[t] = nearby.take();
      if (lane == 0) found[warp * T + t] = nearest[t];
    }
    __syncthreads();
    if (threads > 32) {  // every warp puts the lists of all together for itself
      Key one = lane < listed ? found[lane] : ~Key(0), two = lane + 32 < listed ? found[lane + 32] : ~Key(0);
#pragma unroll
      for (int t = 0; t < T; t++) {
        nearest[t] = least_of_warp(min(one, two));
        if (one == nearest[t]) one = ~Key(0);
        if (two == nearest[t]) two = ~Key(0);
        if (t && nearest[t] == ~Key(0)) nearest[t] = nearest[t - 1];  // of points that are no numbers
      }
    }
    float norms[T];
    if (residual) {
#pragma unroll
      for (int first = 0; first < T; first += kBatch) {
        float left[kBatch][V], lowest[kBatch];
        unsigned at[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
          load<V>(main + size_t(unsigned(nearest[first + b])) * V, left[b]);
          norms[first + b] = 0.0f;
#pragma unroll
          for (int d = 0; d < V; d++) {
            left[b][d] -= x[d];
            norms[first + b] = fmaf(left[b][d], left[b][d], norms[first + b]);
          }
          lowest[b] = kFar;
          at[b] = 0;
        }
        if (first < candidates) {
          for (int c = threadIdx.x; c < r; c += threads) {
            float centroid[V], norm = 0.0f;
            load<V>(residual + size_t(c) * V, centroid);
#pragma unroll
            for (int d = 0; d < V; d++) norm = fmaf(centroid[d], centroid[d], norm);
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
              const float s = score(left[b], centroid, norm / 2);
              if (s < lowest[b]) lowest[b] = s, at[b] = unsigned(c);
            }
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
          const Key least = least_of_warp(key_of(lowest[b], at[b]));
          if (lane == 0) found_residual[warp * T + first + b] = least;
        }
      }
      __syncthreads();
    }
    if (warp) continue;
    const int64_t i = j * rows + row;
    float after[V], change[V], lowest = kFar;
    unsigned chosen = unsigned(nearest[0]), chosen_residual = 0;
    if (residual) {
      Key least = ~Key(0);
      for (int w = 0; w < threads / 32 && lane < T; w++) least = min(least, found_residual[w * T + lane]);
#pragma unroll
      for (int t = 0; t < T; t++) {
        const Key second = __shfl_sync(~0u, least, t);
        const float error = norms[t] / 2 + score_of(second);
        if (t == 0 || (t < candidates && error < lowest)) {
          lowest = error;
          chosen = unsigned(nearest[t]);
          chosen_residual = unsigned(second);
        }
      }
    }
    bool taken = true;
#pragma unroll
    for (int d = 0; d < V; d++) {
      after[d] = main[size_t(chosen) * V + d];
      if (residual) after[d] += residual[size_t(chosen_residual) * V + d];
    }
    const float* weights = matrix + j * matrix_stride;
    if (!sweep) {
#pragma unroll
      for (int d = 0; d < V; d++) change[d] = (x[d] - after[d]) / weights[j];
    } else {
      const int64_t old = index[i], old_residual = residual ? residual_index[i] : 0;
      float gain = 0.0f;
#pragma unroll
      for (int d = 0; d < V; d++) {
        float before = main[size_t(old) * V + d];
        if (residual) before += residual[size_t(old_residual) * V + d];
        gain += (x[d] - before) * (x[d] - before) - (x[d] - after[d]) * (x[d] - after[d]);
        change[d] = after[d] - before;
      }
      taken = gain > 0.0f;
    }
    __syncwarp();  // every lane has read the old index
    if (lane == 0) {
#pragma unroll
      for (int d = 0; d < V; d++) result[i * V + d] = taken ? change[d] : 0.0f;
      if (taken) index[i] = chosen;
      if (taken && residual) residual_index[i] = chosen_residual;
    }
    if (!taken) continue;
#pragma unroll
    for (int t = 0; t < kHeld; t++) {
      const int column = j / 32 * 32 + t * 32 + lane;
      if (column <= j || column >= columns) continue;
#pragma unroll
      for (int d = 0; d < V; d++) held[t][d] -= weights[column] * change[d];
    }
  }
}

unsigned blocks_for(int64_t size, int threads) { return unsigned((size + threads - 1) / threads); }

struct Books {
  const float *main, *residual;  // residual may be null
  int k, r, candidates;          // candidates: of main centroids; 1 without a residual
};

// Of n points: keys [2, candidates, n], left [candidates, n, v].
struct Scratch {
  Key* keys;
  float* left;
};

template <int V>
void launch_search(const float* points, int64_t n, const float* book, int k, const Key* after, Key* nearest,
                   int processors, cudaStream_t stream) {
  // Few points are too little work for all multiprocessors, unless several blocks share the book.
  const int64_t tiles = blocks_for(n, kTile);
  const int chunks = (k + kChunk - 1) / kChunk;
  const int wanted = int(std::min<int64_t>(chunks, std::max<int64_t>(1, 6 * processors / tiles)));
  const int per_block = (chunks + wanted - 1) / wanted * kChunk;
  const dim3 grid(unsigned(tiles), blocks_for(k, per_block));
  if (after)
    search<V, true><<<grid, kThreads, 0, stream>>>(points, n, book, k, per_block, after, nearest);
  else
    search<V, false><<<grid, kThreads, 0, stream>>>(points, n, book, k, per_block, nullptr, nearest);
}

template <int V, Use How>
void launch_choice(const float* points, int64_t n, const Books& books, const Scratch& scratch, const float* diagonal,
                   int64_t* index, int64_t* residual_index, float* result, int processors, cudaStream_t stream) {
  const int candidates = books.candidates;
  Key *nearest = scratch.keys, *nearest_residual = scratch.keys + candidates * n;
  cudaMemsetAsync(scratch.keys, 0xff, sizeof(Key) * n * candidates * (books.residual ? 2 : 1), stream);
  for (int t = 0; t < candidates; t++)
    launch_search<V>(points, n, books.main, books.k, t ? nearest + (t - 1) * n : nullptr, nearest + t * n, processors,
                     stream);
  if (books.residual) {
    leave<V>
        <<<blocks_for(n * candidates, 128), 128, 0, stream>>>(points, n, candidates, books.main, nearest, scratch.left);
    launch_search<V>(scratch.left, n * candidates, books.residual, books.r, nullptr, nearest_residual, processors,
                     stream);
  }
  choose<V, How><<<blocks_for(n, 128), 128, 0, stream>>>(points, n, candidates, books.main, books.residual, nearest,
                                                         nearest_residual, scratch.left, diagonal, index,
                                                         residual_index, result);
}

template <int V, Use How>
void launch_block(float* block, int columns, int64_t rows, const float* matrix, int64_t matrix_stride,
                  const Books& books, const Scratch& scratch, int64_t* index, int64_t* residual_index, float* result,
                  int processors, cudaStream_t stream) {
  const int64_t size = rows * V;
  const auto loadable = [](const float* book) { return reinterpret_cast<uintptr_t>(book) % 16 == 0; };
  if (columns <= 32 * kHeld && books.k + books.r <= kFewCentroids && books.candidates <= kCandidates &&
      loadable(books.main) && loadable(books.residual)) {
    int warps = kRowWarps;
    // A warp costs as much as it saves where its lanes have fewer centroids than candidates.
    const int most = std::max(books.k, books.r);
    while (warps > 1 && (rows * warps > kBusy * processors || 32 * warps * books.candidates > most)) warps /= 2;
    const auto launch = [&](auto slots) {
      code_rows<V, decltype(slots)::value><<<unsigned(rows), 32 * warps, 0, stream>>>(
          block, columns, rows, matrix, matrix_stride, books.main, books.k, books.residual, books.r, books.candidates,
          How == Use::kSweep, index, residual_index, result);
    };
    if (books.candidates == 1)
      launch(std::integral_constant<int, 1>());
    else if (books.candidates <= 4)
      launch(std::integral_constant<int, 4>());
    else
      launch(std::integral_constant<int, kCandidates>());
    return;
  }
  for (int j = 0; j < columns; j++) {
    const float* weights = matrix + j * matrix_stride + j;
    launch_choice<V, How>(block + j * size, rows, books, scratch, weights, index + j * rows,
                          residual_index ? residual_index + j * rows : nullptr, result + j * size, processors, stream);
    const int behind = columns - j - 1;
    if (!behind) return;
    const dim3 grid(blocks_for(size, 256), (behind + kSpread - 1) / kSpread);
    spread<<<grid, 256, 0, stream>>>(result + j * size, size, weights + 1, behind, block + (j + 1) * size);
  }
}

}  // namespace

// All are asynchronous on a stream of a device. main [k, v]; residual [r, v] or null, and with it residual_index and
// left; 1 <= candidates <= k, 1 without a residual; keys int64 [2, candidates, n], left [candidates, n, v]: scratch, n
// being the points of a column. `processors`: the multiprocessors of the device.

// points [n, v]; writes index [n].
extern "C" int vptq_assign(const float* points, int64_t n, int64_t v, const float* main, int64_t k,
                           const float* residual, int64_t r, int64_t candidates, int64_t* index,
                           int64_t* residual_index, Key* keys, float* left, int64_t processors, int64_t device,
                           cudaStream_t stream) {
  const Books books{main, residual, int(k), int(r), int(candidates)};
  if (const int error = cudaSetDevice(int(device))) return error;
  return with_vector_length(v, [&](auto length) {
    launch_choice<decltype(length)::value, Use::kAssign>(points, n, books, {keys, left}, nullptr, index, residual_index,
                                                         nullptr, int(processors), stream);
  });
}

// A block of columns [columns, rows, v], coded from left to right with error feedback inside the block, which changes
// it. factor [columns, columns], rows factor_stride apart; writes index [columns, rows] and errors [columns, rows, v],
// each divided by its diagonal element, for the caller to carry to the columns behind the block.
extern "C" int vptq_code_block(float* block, int64_t columns, int64_t rows, int64_t v, const float* factor,
                               int64_t factor_stride, const float* main, int64_t k, const float* residual, int64_t r,
                               int64_t candidates, int64_t* index, int64_t* residual_index, float* errors, Key* keys,
                               float* left, int64_t processors, int64_t device, cudaStream_t stream) {
  const Books books{main, residual, int(k), int(r), int(candidates)};
  if (const int error = cudaSetDevice(int(device))) return error;
  return with_vector_length(v, [&](auto length) {
    launch_block<decltype(length)::value, Use::kCode>(block, int(columns), rows, factor, factor_stride, books,
                                                      {keys, left}, index, residual_index, errors, int(processors),
                                                      stream);
  });
}

// A block of aims [columns, rows, v], which it changes; each column moves in turn to the choice nearest to its aim,
// given all others. pull [columns, columns], rows pull_stride apart: how far a column's move shifts another's aim.
// Reads and writes index and residual_index [columns, rows]; writes the moves [columns, rows, v].
extern "C" int vptq_sweep_block(float* aim, int64_t columns, int64_t rows, int64_t v, const float* pull,
                                int64_t pull_stride, const float* main, int64_t k, const float* residual, int64_t r,
                                int64_t candidates, int64_t* index, int64_t* residual_index, float* moves, Key* keys,
                                float* left, int64_t processors, int64_t device, cudaStream_t stream) {
  const Books books{main, residual, int(k), int(r), int(candidates)};
  if (const int error = cudaSetDevice(int(device))) return error;
  return with_vector_length(v, [&](auto length) {
    launch_block<decltype(length)::value, Use::kSweep>(aim, int(columns), rows, pull, pull_stride, books, {keys, left},
                                                       index, residual_index, moves, int(processors), stream);
  });
}
