// Nearest centroids of short vectors, main and residual index chosen together (quantize/kmeans.py).
//
// One point at a time against a transposed book [v][k], so that the compiler vectorises over centroids; the scores of
// a point stay in the first-level cache. Minima are kept for every chunk of 64 centroids, so that the best few are
// found without sorting. Points are independent: the result does not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int kChunk = 64;
constexpr float kInfinity = std::numeric_limits<float>::max();

// A book, transposed, padded to whole chunks, with half the squared norm of every centroid.
struct Book {
  int padded;
  std::vector<float> columns, half_norm;

  Book(const float* book, int count, int v) : padded((count + kChunk - 1) / kChunk * kChunk) {
    columns.assign(static_cast<size_t>(padded) * v, 0.0f);
    half_norm.assign(padded, kInfinity);
    for (int c = 0; c < count; ++c) {
      float norm = 0;
      for (int d = 0; d < v; ++d) {
        columns[static_cast<size_t>(d) * padded + c] = book[c * v + d];
        norm += book[c * v + d] * book[c * v + d];
      }
      half_norm[c] = norm / 2;
    }
  }
};

// score[c] = |centroid|^2 / 2 - x . centroid: half the squared distance, less what does not depend on c.
template <int V>
void score_all(const Book& book, const float* x, float* score, float* chunk_min) {
  for (int base = 0; base < book.padded; base += kChunk) {
    float* s = score + base;
    std::copy_n(book.half_norm.data() + base, kChunk, s);
    for (int d = 0; d < V; ++d) {
      const float* column = book.columns.data() + static_cast<size_t>(d) * book.padded + base;
      for (int c = 0; c < kChunk; ++c) s[c] -= x[d] * column[c];
    }
    float lowest = s[0];
    for (int c = 1; c < kChunk; ++c) lowest = s[c] < lowest ? s[c] : lowest;
    chunk_min[base / kChunk] = lowest;
  }
}

int best(const Book& book, const float* score, const float* chunk_min) {
  const int chunks = book.padded / kChunk;
  const int chunk = static_cast<int>(std::min_element(chunk_min, chunk_min + chunks) - chunk_min);
  const float* s = score + chunk * kChunk;
  int c = 0;
  while (s[c] != chunk_min[chunk]) ++c;
  return chunk * kChunk + c;
}

void exclude(int c, float* score, float* chunk_min) {
  score[c] = kInfinity;
  const float* s = score + c / kChunk * kChunk;
  chunk_min[c / kChunk] = *std::min_element(s, s + kChunk);
}

template <int V>
void assign(const float* points, int64_t n, const float* main, int k, const float* residual, int r, int candidates,
            int64_t* index, int64_t* residual_index) {
  const Book main_book(main, k, V);
  const Book residual_book(residual ? residual : main, residual ? r : 0, V);
#pragma omp parallel
  {
    std::vector<float> score(main_book.padded), chunk_min(main_book.padded / kChunk);
    std::vector<float> second(residual_book.padded), second_min(residual_book.padded / kChunk);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const float* x = points + i * V;
      score_all<V>(main_book, x, score.data(), chunk_min.data());
      if (!residual) {
        index[i] = best(main_book, score.data(), chunk_min.data());
        continue;
      }
      float lowest = kInfinity;
      for (int t = 0; t < candidates; ++t) {
        const int c = best(main_book, score.data(), chunk_min.data());
        float left[V], norm = 0;
        for (int d = 0; d < V; ++d) {
          left[d] = x[d] - main[c * V + d];
          norm += left[d] * left[d];
        }
        score_all<V>(residual_book, left, second.data(), second_min.data());
        const int e = best(residual_book, second.data(), second_min.data());
        const float error = norm / 2 + second[e];
        if (t == 0 || error < lowest) {
          lowest = error;
          index[i] = c;
          residual_index[i] = e;
        }
        exclude(c, score.data(), chunk_min.data());
      }
    }
  }
}

}  // namespace

// points [n, v], main [k, v], residual [r, v] or null; candidates <= k. Writes index [n] and, with a residual book,
// residual_index [n]. Returns 0, or 1 for a vector length the format does not have.
extern "C" int vptq_assign(const float* points, int64_t n, int v, const float* main, int k, const float* residual,
                           int r, int candidates, int64_t* index, int64_t* residual_index) {
  switch (v) {
#define CASE(V) \
  case V:       \
    assign<V>(points, n, main, k, residual, r, candidates, index, residual_index); \
    return 0;
    CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
    CASE(15) CASE(16)
#undef CASE
  }
  return 1;
}
