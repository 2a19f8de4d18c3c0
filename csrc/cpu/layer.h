// A call as the kernels see it: the plan resolved to addresses, and the tokens it computes together.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"
#include "linear_plan.h"

// x [tokens, in_features], y [tokens, out_features], bias [out_features] or null.
struct Call {
  const void* x;
  void* y;
  const void* bias;
  int64_t x_dtype, bias_dtype, tokens, in_features, out_features;
};

// The part of a call's tokens computed together, in blocks of nearly equal size.
struct Tokens {
  const Call& call;
  const int64_t first, count;

  Tokens(const Call& call, int64_t first, int64_t count, int most_in_block)
      : call(call), first(first), count(count), blocks_((count + most_in_block - 1) / most_in_block) {}

  int64_t blocks() const { return blocks_; }
  int64_t begin(int64_t block) const { return count * block / blocks_; }

 private:
  const int64_t blocks_;
};

struct Segment {
  const SegmentPlan& plan;
  Stream stream;
  const uint32_t* words;
  Books books;
  const int32_t* columns;  // null: all
  float* x;                // set by prepare(): [block][column][token of the block]
};

struct Module {
  const ModulePlan& plan;
  std::vector<Segment> segments;
  const void* dense;           // [out_features, in_features], or null
  const float *scale, *shift;  // null without a norm
  float* x;                    // as in Segment, for a dense module
  std::vector<float> sums;     // set by prepare(): for every token what the norm multiplies by its shift, or adds
};

class Layer {
 public:
  const Kernels& kernels;
  const int64_t in_features, dtype;
  std::vector<Module> modules;
  int64_t weights = 0;
  std::vector<float> packed;  // every Segment::x and Module::x

  Layer(const Kernels& kernels, std::vector<ModulePlan> plan, int64_t in_features, int64_t dtype)
      : kernels(kernels), in_features(in_features), dtype(dtype), plan_(std::move(plan)) {}

  // Resolves the plan's offsets into the layer's tensors; `codebooks_size` counts elements.
  void place(const uint32_t* qweight, const void* codebooks, int64_t codebooks_size, const float* norm,
             const int32_t* columns, const void* dense) {
    for (const ModulePlan& m : plan_) {
      const int64_t norm_size = m.norm_kind == kNormColumns ? in_features : m.out_features;
      const float* scale = m.norm_kind == kNormNone ? nullptr : norm + m.norm_offset;
      const void* rows = m.dense_offset == kAbsent ? nullptr : element(dense, m.dense_offset);
      modules.push_back({m, {}, rows, scale, scale ? scale + norm_size : nullptr, nullptr, {}});
      if (rows) weights += m.out_features * in_features;
      for (int64_t i = 0; i < m.num_segments; ++i) {
        const SegmentPlan& s = m.segments[i];
        const int v = static_cast<int>(s.vector_len);
        const Stream stream(static_cast<int>(s.index_bits), static_cast<int>(s.res_bits), v);
        const void* main = book(codebooks, codebooks_size, s.book_offset, s.index_bits, v);
        const void* residual = s.res_bits ? book(codebooks, codebooks_size, s.res_book_offset, s.res_bits, v) : nullptr;
        const int32_t* gather = s.column_offset == kAbsent ? nullptr : columns + s.column_offset;
        modules.back().segments.push_back({s, stream, qweight + s.word_offset, {main, residual}, gather, nullptr});
        weights += m.out_features * s.num_columns;
      }
    }
  }

  const void* element(const void* tensor, int64_t index) const {
    return static_cast<const char*>(tensor) + index * item_size(dtype);
  }

 private:
  // A load takes 8 or 16 elements, whatever the vector length. Behind most books lies another; the last is copied.
  const void* book(const void* codebooks, int64_t size, int64_t offset, int64_t bits, int64_t v) {
    const int64_t used = std::min(v << bits, (size - offset) / v * v), lanes = v > 8 ? 16 : 8;
    const void* start = element(codebooks, offset);
    if (offset + used - v + lanes <= size) return start;
    std::vector<char> copy((used + lanes) * item_size(dtype));
    std::copy_n(static_cast<const char*>(start), used * item_size(dtype), copy.data());
    copies_.push_back(std::move(copy));
    return copies_.back().data();
  }

  const std::vector<ModulePlan> plan_;
  std::vector<std::vector<char>> copies_;
};
