// The plan of a layer (vllm_vptq/layouts/plan.py) as the list of int64 it travels as, read in place.
#pragma once

#include <cstdint>
#include <vector>

constexpr int64_t kAbsent = -1;
enum NormKind : int64_t { kNormNone = 0, kNormColumns = 1, kNormRows = 2 };

// Fields in the order of the Python dataclass: the list is overlaid with it.
struct SegmentPlan {
  int64_t vector_len, index_bits, res_bits, vector_rows, skip, num_columns;
  int64_t column_offset, word_offset, row_words, book_offset, res_book_offset;
};

struct ModulePlan {
  int64_t out_start, out_features, norm_kind, norm_offset, dense_offset;
  const SegmentPlan* segments;
  int64_t num_segments;
};

inline std::vector<ModulePlan> read_plan(const int64_t* plan, int64_t size) {
  constexpr int64_t kHead = 6, kSegment = sizeof(SegmentPlan) / sizeof(int64_t);
  std::vector<ModulePlan> modules;
  for (int64_t i = 0; i < size; i += kHead + kSegment * plan[i + kHead - 1]) {
    const int64_t* m = plan + i;
    modules.push_back({m[0], m[1], m[2], m[3], m[4], reinterpret_cast<const SegmentPlan*>(m + kHead), m[5]});
  }
  return modules;
}
