// y = x W^T of a whole layer in the compact layout (vllm_vptq/layouts/compact.py), straight from the index streams.
//
// The outputs are cut into tasks of a few vector rows, each computed whole by one thread: neither barriers between
// segments nor sums across threads, and a result that does not depend on how many there are. A few tokens multiply the
// vectors as they are looked up; more share a panel of 16 outputs x 256 columns that is decoded once into the
// first-level cache. The inner loops are in linear_kernels.h.

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "instruction_sets.h"
#include "prepare.h"

namespace {

constexpr int64_t kChunk = 192;             // tokens per decoding of the weights: bounds the memory of a call
constexpr int64_t kFewTokens = 10;          // look vectors up, some once more; measured, where a panel is no faster
constexpr int64_t kTaskOutputs = 64;        // about so many outputs a task, or fewer
constexpr int64_t kNear = 256 << 10;        // bytes of a book that the second-level cache holds, even an old one
constexpr int64_t kWorthATeam = 128 << 10;  // weights of one token; for fewer, waking threads costs more than it saves

int64_t panel_rows(int64_t v) { return kStrip / v; }

// Vector rows computed together: the same for all blocks of a few tokens.
int64_t rows_together(int64_t v, int64_t tokens) {
  const int64_t in_block = std::min<int64_t>(tokens, kLookupTokens);
  return tokens > kFewTokens ? panel_rows(v) : lookup_rows(v > 8 ? 16 : 8, static_cast<int>(in_block));
}

// A run of outputs of one module.
struct Task {
  const Module* module;
  int64_t begin, end;
};

std::vector<Task> cut_tasks(const std::vector<Module>& modules, int64_t tokens, int threads) {
  std::vector<Task> tasks;
  for (const Module& m : modules) {
    const int64_t n = m.plan.out_features;
    // Along the vectors of the longest segment; those of the others that straddle two tasks are looked up in both.
    const auto longest = std::max_element(m.segments.begin(), m.segments.end(), [](const Segment& a, const Segment& b) {
      return a.plan.num_columns < b.plan.num_columns;
    });
    const bool dense = longest == m.segments.end();
    const int64_t v = dense ? kStrip : longest->plan.vector_len, skip = dense ? 0 : longest->plan.skip;
    const int64_t unit = v * rows_together(v, tokens);
    const int64_t most = std::max<int64_t>(kTaskOutputs / unit, 1);
    const int64_t step = unit * std::clamp<int64_t>(n / (unit * threads * 4), 1, most);
    for (int64_t begin = 0, end; begin < n; begin = end) {
      end = std::min(n, begin == 0 ? step - skip : begin + step);
      tasks.push_back({&m, begin, end});
    }
  }
  return tasks;
}

// A task on its way: sums [tokens][outputs], and the scratch space of its thread.
class Worker {
 public:
  Worker(const Layer& layer, const Tokens& tokens) : layer_(layer), tokens_(tokens) {}

  void run(const Task& task) {
    task_ = task;
    width_ = task.end - task.begin;
    sums_.assign(tokens_.count * width_, 0.0f);
    if (task.module->dense) dense();
    for (const Segment& segment : task.module->segments) {
      if (tokens_.count <= kFewTokens) {
        few_tokens(segment);
      } else {
        many_tokens(segment);
      }
    }
    finish(tokens_, *task.module, task.begin, task.end, sums_.data());
  }

 private:
  void few_tokens(const Segment& s) {
    const int64_t v = s.plan.vector_len, step = rows_together(v, tokens_.count);
    for (int64_t column = 0; column < s.plan.num_columns; column += kBlock) {
      const int columns = static_cast<int>(std::min<int64_t>(kBlock, s.plan.num_columns - column));
      for (int64_t row = first_row(s); row < end_row(s); row += step) {
        const int64_t rows = std::min(step, end_row(s) - row);
        // A short group looks up its last row again, and does not add it.
        for (int64_t r = 0; r < step; ++r) unpack(s, row + std::min(r, rows - 1), column, columns, r);
        for (int64_t b = 0; b < tokens_.blocks(); ++b) {
          const int64_t begin = tokens_.begin(b), count = tokens_.begin(b + 1) - begin;
          const float* x = s.x + begin * s.plan.num_columns + column * count;
          kernels(s).lookup[count - 1](s.books, offsets_, x, columns, strip_);
          for (int64_t t = 0; t < count; ++t)
            for (int64_t r = 0; r < rows; ++r)
              add(begin + t, strip_ + (t * step + r) * kStrip, v, (row + r) * v - s.plan.skip);
        }
      }
    }
  }

  void many_tokens(const Segment& s) {
    const int64_t v = s.plan.vector_len, step = rows_together(v, tokens_.count);
    Decode* decode = kernels(s).decode;
    for (int64_t column = 0; column < s.plan.num_columns; column += kBlock) {
      const int columns = static_cast<int>(std::min<int64_t>(kBlock, s.plan.num_columns - column));
      for (int64_t row = first_row(s); row < end_row(s); row += step) {
        const int64_t rows = std::min(step, end_row(s) - row);
        for (int64_t r = 0; r < rows; ++r) unpack(s, row + r, column, columns, r);
        decode(s.books, offsets_, static_cast<int>(rows), static_cast<int>(v), columns, panel_);
        multiply(s.x, s.plan.num_columns, column, columns, static_cast<int>(rows * v), row * v - s.plan.skip);
      }
    }
  }

  void dense() {
    const int64_t k = layer_.in_features;
    for (int64_t column = 0; column < k; column += kBlock) {
      const int columns = static_cast<int>(std::min<int64_t>(kBlock, k - column));
      for (int64_t n = task_.begin; n < task_.end; n += kStrip) {
        const int rows = static_cast<int>(std::min<int64_t>(kStrip, task_.end - n));
        for (int r = 0; r < rows; ++r) {
          float row[kBlock];
          widen_all(layer_.dtype, task_.module->dense, (n + r) * k + column, columns, row);
          for (int j = 0; j < columns; ++j) panel_[j * kStrip + r] = row[j];
        }
        multiply(task_.module->x, k, column, columns, rows, n);
      }
    }
  }

  // Multiplies the panel, whose `outputs` lanes begin at output `first` of the module, by all tokens.
  void multiply(const float* x, int64_t all_columns, int64_t column, int columns, int outputs, int64_t first) {
    for (int64_t b = 0; b < tokens_.blocks(); ++b) {
      const int64_t begin = tokens_.begin(b);
      const int count = static_cast<int>(tokens_.begin(b + 1) - begin);
      layer_.kernels.multiply(panel_, x + begin * all_columns + column * count, columns, count, strip_);
      for (int t = 0; t < count; ++t) add(begin + t, strip_ + t * kStrip, outputs, first);
    }
  }

  // Adds `outputs` sums that begin at output `first` of the module, which need not all belong to the task.
  void add(int64_t token, const float* sums, int64_t outputs, int64_t first) {
    const int64_t begin = std::max(first, task_.begin), end = std::min(first + outputs, task_.end);
    float* to = sums_.data() + token * width_ - task_.begin;
    for (int64_t n = begin; n < end; ++n) to[n] += sums[n - first];
  }

  // A block of row `row` into row `to` of the offsets.
  void unpack(const Segment& s, int64_t row, int64_t column, int columns, int64_t to) {
    const int64_t first = column * s.stream.bits / 32;  // a block begins on a word
    const int64_t needed = (static_cast<int64_t>(columns) * s.stream.bits + 31) / 32;
    const uint32_t* words = s.words + row * s.plan.row_words + first;
    if (first + needed + kStreamSlack > s.plan.row_words) {
      std::copy_n(words, needed, words_);
      words = words_;
    }
    layer_.kernels.unpack(s.stream, words, columns, offsets_.main[to], offsets_.residual[to]);
  }

  const SegmentKernels& kernels(const Segment& s) const {
    const int64_t v = s.plan.vector_len, book = (v << s.plan.index_bits) * item_size(layer_.dtype);
    return layer_.kernels.width[layer_.dtype][v > 8].segment[s.plan.res_bits != 0][book > kNear];
  }

  int64_t first_row(const Segment& s) const { return (task_.begin + s.plan.skip) / s.plan.vector_len; }
  int64_t end_row(const Segment& s) const {
    return (task_.end + s.plan.skip + s.plan.vector_len - 1) / s.plan.vector_len;
  }

  const Layer& layer_;
  const Tokens& tokens_;
  Task task_;
  int64_t width_;
  std::vector<float> sums_;
  Offsets offsets_;
  alignas(64) float panel_[(kBlock + 1) * kStrip];
  alignas(64) float strip_[kStrip * kStrip];
  uint32_t words_[kBlock + kStreamSlack];
};

void run(Layer& layer, const Call& call, int threads) {
  for (int64_t first = 0; first < call.tokens; first += kChunk) {
    const int64_t count = std::min(kChunk, call.tokens - first);
    const Tokens tokens(call, first, count, count <= kFewTokens ? kLookupTokens : layer.kernels.max_tokens);
    // All threads or one: libgomp ends those that a smaller team leaves over, and starting them again is slow.
    const int team = layer.weights * (count + 3) / 4 < kWorthATeam ? 1 : threads;
    prepare(layer, tokens, team);
    const std::vector<Task> tasks = cut_tasks(layer.modules, count, team);
#pragma omp parallel num_threads(team) if (team > 1)
    {
      const auto worker = std::make_unique<Worker>(layer, tokens);
#pragma omp for schedule(dynamic) nowait
      for (size_t i = 0; i < tasks.size(); ++i) worker->run(tasks[i]);
    }
  }
}

}  // namespace

// The widest instruction set that the processor has: an InstructionSet.
extern "C" int64_t vptq_widest() { return widest(); }

// One call of the op. x [tokens, in_features] and y [tokens, out_features] of type x_dtype, contiguous; bias of
// bias_dtype or null; books and dense of type dtype. Returns 0, or 1 when out of memory.
extern "C" int vptq_linear(const int64_t* plan, int64_t plan_size, const void* x, int64_t x_dtype, int64_t tokens,
                           int64_t in_features, const uint32_t* qweight, const void* codebooks, int64_t codebooks_size,
                           int64_t dtype, const float* norm, const int32_t* columns, const void* dense,
                           const void* bias, int64_t bias_dtype, void* y, int64_t out_features, int64_t instruction_set,
                           int64_t threads) {
  try {
    Layer layer(kernels(static_cast<InstructionSet>(instruction_set)), read_plan(plan, plan_size), in_features, dtype);
    layer.place(qweight, codebooks, codebooks_size, norm, columns, dense);
    const Call call{x, y, bias, x_dtype, bias_dtype, tokens, in_features, out_features};
    run(layer, call, static_cast<int>(threads));
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
