// Nearest centroids of short vectors, main and residual index chosen together (quantize/kmeans.py), alone and inside
// the column walk and coordinate descent (quantize/columns.py).
//
// One point at a time against a transposed book [v][k], 16 centroids in a vector whatever the processor's registers
// hold. Where only the nearest is wanted, every lane keeps its own and no score is stored; where the best few are, the
// scores stay in the first-level cache with a minimum for every chunk of 64, so that they are found without sorting.
// Points are independent: the result does not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kChunk = 4 * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::max();

// A book, transposed, padded to whole chunks, with half the squared norm of every centroid.
struct Book {
  int count, padded;
  std::vector<float> columns, half_norm;

  Book(const float* book, int count, int v) : count(count), padded((count + kChunk - 1) / kChunk * kChunk) {
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

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

constexpr Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

template <typename T>
inline T lower(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
inline auto lowest(T values) {
  std::remove_reference_t<decltype(values[0])> lane[kLanes];  // an array, because compilers reduce those by halves
  std::memcpy(lane, &values, sizeof(values));
  auto least = lane[0];
  for (int i = 1; i < kLanes; ++i) least = lower(lane[i], least);
  return least;
}

// |centroid|^2 / 2 - x . centroid for 16 centroids: half the squared distance, less what does not depend on them.
template <int V>
inline Floats score(const Book& book, const float* x, int base) {
  Floats s = load(book.half_norm.data() + base);
  for (int d = 0; d < V; ++d) s -= x[d] * load(book.columns.data() + static_cast<size_t>(d) * book.padded + base);
  return s;
}

// The nearest centroid, the first of several as near, and its score.
template <int V>
int nearest(const Book& book, const float* x, float& best_score) {
  Floats best = score<V>(book, x, 0);
  Ints base_of_best = {};
  for (int base = kLanes; base < book.padded; base += kLanes) {
    const Floats s = score<V>(book, x, base);
    const Ints better = s < best;
    best = better ? s : best;
    base_of_best = better ? Ints{} + base : base_of_best;
  }
  best_score = lowest(best);
  const Ints none = Ints{} + (book.count - 1);  // where points are NaN, which equals nothing
  const Ints candidate = best == (Floats{} + best_score) ? base_of_best + kLane : none;
  return lowest(candidate);
}

template <int V>
void score_all(const Book& book, const float* x, float* __restrict scores, float* __restrict chunk_min) {
  for (int base = 0; base < book.padded; base += kChunk) {
    Floats least = {};
    for (int part = 0; part < kChunk; part += kLanes) {
      const Floats s = score<V>(book, x, base + part);
      std::memcpy(scores + base + part, &s, sizeof(s));
      least = part ? lower(s, least) : s;
    }
    chunk_min[base / kChunk] = lowest(least);
  }
}

int best(const Book& book, const float* score, const float* chunk_min) {
  const int chunks = book.padded / kChunk;
  const int chunk = static_cast<int>(std::min_element(chunk_min, chunk_min + chunks) - chunk_min);
  const Ints none = Ints{} + (book.count - 1);
  Ints found = none;
  for (int base = chunk * kChunk; base < (chunk + 1) * kChunk; base += kLanes)
    found = lower(found, load(score + base) == (Floats{} + chunk_min[chunk]) ? kLane + base : none);
  return lowest(found);
}

void exclude(int c, float* score, float* chunk_min) {
  score[c] = kInfinity;
  const float* s = score + c / kChunk * kChunk;
  Floats least = load(s);
  for (int part = kLanes; part < kChunk; part += kLanes) least = lower(load(s + part), least);
  chunk_min[c / kChunk] = lowest(least);
}

// Scratch space of one thread.
struct Scratch {
  std::vector<float> score, chunk_min;

  explicit Scratch(const Book& main) : score(main.padded), chunk_min(main.padded / kChunk) {}
};

// The books as the search reads them, and as given.
struct Books {
  const float *main, *residual;  // residual may be null
  Book main_book, residual_book;

  Books(const float* main, int k, const float* residual, int r, int v)
      : main(main),
        residual(residual),
        main_book(main, k, v),
        residual_book(residual ? residual : main, residual ? r : 0, v) {}
};

struct Choice {
  int main, residual;
};

template <int V>
Choice choose(const Books& books, const float* x, int candidates, Scratch& s) {
  float error;
  if (!books.residual) return {nearest<V>(books.main_book, x, error), -1};
  score_all<V>(books.main_book, x, s.score.data(), s.chunk_min.data());
  Choice chosen{best(books.main_book, s.score.data(), s.chunk_min.data()), -1};
  float least = kInfinity;
  for (int t = 0, c = chosen.main;; c = best(books.main_book, s.score.data(), s.chunk_min.data())) {
    float left[V], norm = 0;
    for (int d = 0; d < V; ++d) {
      left[d] = x[d] - books.main[c * V + d];
      norm += left[d] * left[d];
    }
    const int e = nearest<V>(books.residual_book, left, error);
    error += norm / 2;
    if (t == 0 || error < least) {
      least = error;
      chosen = {c, e};
    }
    if (++t == candidates) return chosen;
    exclude(c, s.score.data(), s.chunk_min.data());
  }
}

template <int V>
void assign(const float* points, int64_t n, const Books& books, int candidates, int64_t* index, int64_t* residual) {
#pragma omp parallel if (n >= 1024)
  {
    Scratch scratch(books.main_book);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const Choice chosen = choose<V>(books, points + i * V, candidates, scratch);
      index[i] = chosen.main;
      if (residual) residual[i] = chosen.residual;
    }
  }
}

template <int V>
void decode(const Books& books, Choice choice, float* out) {
  for (int d = 0; d < V; ++d) {
    out[d] = books.main[choice.main * V + d];
    if (books.residual) out[d] += books.residual[choice.residual * V + d];
  }
}

// A vector row of a block [columns][rows][V], as [V][columns].
template <int V>
void take_row(const float* block, int columns, int64_t rows, int64_t r, float* row) {
  for (int j = 0; j < columns; ++j)
    for (int d = 0; d < V; ++d) row[d * columns + j] = block[(j * rows + r) * V + d];
}

// Takes step[d] times share[i] off every column i from first on.
template <int V>
void push(float* __restrict row, int columns, int first, const float* __restrict share, const float* step) {
  for (int d = 0; d < V; ++d) {
    float* __restrict dimension = row + d * columns;
    for (int i = first; i < columns; ++i) dimension[i] -= share[i] * step[d];
  }
}

// Vector rows are independent of each other: a thread takes a row through all columns of the block.
template <int V>
void code_block(const float* left, int columns, int64_t rows, const float* factor, int64_t factor_stride,
                const Books& books, int candidates, int64_t* index, int64_t* residual, float* errors) {
#pragma omp parallel
  {
    Scratch scratch(books.main_book);
    std::vector<float> row(static_cast<size_t>(columns) * V);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      take_row<V>(left, columns, rows, r, row.data());
      for (int j = 0; j < columns; ++j) {
        float x[V];
        for (int d = 0; d < V; ++d) x[d] = row[d * columns + j];
        const Choice chosen = choose<V>(books, x, candidates, scratch);
        index[j * rows + r] = chosen.main;
        if (residual) residual[j * rows + r] = chosen.residual;
        const float* u = factor + j * factor_stride;
        float coded[V], error[V];
        decode<V>(books, chosen, coded);
        for (int d = 0; d < V; ++d) {
          error[d] = (x[d] - coded[d]) / u[j];
          errors[(j * rows + r) * V + d] = error[d];
        }
        push<V>(row.data(), columns, j + 1, u, error);
      }
    }
  }
}

// One pass of coordinate descent: a column moves to what is nearest to its aim while the others stay, if that is nearer
// than where it is, and the aims of the columns after it follow.
template <int V>
void sweep_block(const float* aim, int columns, int64_t rows, const float* pull, int64_t pull_stride,
                 const Books& books, int candidates, int64_t* index, int64_t* residual, float* moves) {
#pragma omp parallel
  {
    Scratch scratch(books.main_book);
    std::vector<float> row(static_cast<size_t>(columns) * V);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      take_row<V>(aim, columns, rows, r, row.data());
      for (int j = 0; j < columns; ++j) {
        float x[V];
        for (int d = 0; d < V; ++d) x[d] = row[d * columns + j];
        float* move = moves + (j * rows + r) * V;
        const int64_t at = j * rows + r;
        const Choice old{static_cast<int>(index[at]), residual ? static_cast<int>(residual[at]) : -1};
        const Choice chosen = choose<V>(books, x, candidates, scratch);
        float before[V], after[V], gain = 0;
        decode<V>(books, old, before);
        decode<V>(books, chosen, after);
        for (int d = 0; d < V; ++d)
          gain += (x[d] - before[d]) * (x[d] - before[d]) - (x[d] - after[d]) * (x[d] - after[d]);
        const bool moved = gain > 0;
        for (int d = 0; d < V; ++d) move[d] = moved ? after[d] - before[d] : 0.0f;
        if (!moved) continue;
        index[at] = chosen.main;
        if (residual) residual[at] = chosen.residual;
        const float* p = pull + j * pull_stride;
        push<V>(row.data(), columns, j + 1, p, move);
      }
    }
  }
}

// Calls f with the vector length as a constant; 1 for one that the format does not have, else 0.
template <int V = 2, typename F>
int with_vector_length(int64_t v, F&& f) {
  if constexpr (V > 16) {
    return 1;
  } else {
    if (v != V) return with_vector_length<V + 1>(v, f);
    f(std::integral_constant<int, V>());
    return 0;
  }
}

}  // namespace

// All return 0, or 1 for a vector length the format does not have. main [k, v]; residual [r, v] or null, and with it
// residual_index; candidates <= k.

// points [n, v]; writes index [n].
extern "C" int vptq_assign(const float* points, int64_t n, int64_t v, const float* main, int64_t k,
                           const float* residual, int64_t r, int64_t candidates, int64_t* index,
                           int64_t* residual_index) {
  const Books books(main, k, residual, r, v);
  return with_vector_length(
      v, [&](auto length) { assign<decltype(length)::value>(points, n, books, candidates, index, residual_index); });
}

// A block of columns, coded from left to right with error feedback inside the block. left [columns, rows, v] in;
// factor [columns, columns], rows factor_stride apart; writes index [columns, rows] and errors [columns, rows, v], each
// divided by its diagonal element, for the caller to carry to the columns behind the block.
extern "C" int vptq_code_block(const float* left, int64_t columns, int64_t rows, int64_t v, const float* factor,
                               int64_t factor_stride, const float* main, int64_t k, const float* residual, int64_t r,
                               int64_t candidates, int64_t* index, int64_t* residual_index, float* errors) {
  const Books books(main, k, residual, r, v);
  return with_vector_length(v, [&](auto length) {
    code_block<decltype(length)::value>(left, columns, rows, factor, factor_stride, books, candidates, index,
                                        residual_index, errors);
  });
}

// A block of columns [columns, rows, v], each moved in turn to the choice nearest to its aim, given all others. pull
// [columns, columns], rows pull_stride apart: how far a column's move shifts another's aim. Reads and writes index and
// residual_index [columns, rows]; writes the moves [columns, rows, v] for the caller to carry to other blocks.
extern "C" int vptq_sweep_block(const float* aim, int64_t columns, int64_t rows, int64_t v, const float* pull,
                                int64_t pull_stride, const float* main, int64_t k, const float* residual, int64_t r,
                                int64_t candidates, int64_t* index, int64_t* residual_index, float* moves) {
  const Books books(main, k, residual, r, v);
  return with_vector_length(v, [&](auto length) {
    sweep_block<decltype(length)::value>(aim, columns, rows, pull, pull_stride, books, candidates, index,
                                         residual_index, moves);
  });
}
