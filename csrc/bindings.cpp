// The torch side: checks, memory, streams, and the choice by token count. The kernels know nothing of torch.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "cuda/kernels.h"

namespace vptq {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kDecodedBytes = int64_t(1) << 29;  // of weights at a time, in products with many tokens

Type type_of(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
              "vllm-vptq's CUDA kernels take float16 or bfloat16 activations, not ", x.scalar_type());
  return x.scalar_type() == at::kHalf ? Type::kHalf : Type::kBfloat16;
}

// A layer's plan, as vllm_vptq/layouts/work.py writes it.
struct Plan {
  int64_t stationary, out_features, in_features, shared_bytes, direct_tokens;
  struct Launching {  // by wide.cuh, if `wide` is a kind; places in `work`
    int64_t wide, jobs_at, starts_at, thread_blocks;
  };
  struct Variant {  // for calls of up to max_tokens; floats of workspace per token; places in `work`
    int64_t max_tokens, stride, modules_at, parts_at;
    int64_t preparations_at, preparations, prepared_columns;  // elements of a token's prepared row
    std::vector<Launching> launches;
    std::vector<Module> modules;
    std::vector<Part> parts;
  };
  struct Source {  // of a part of a module's weights; the residual's kind is -1 if there is none
    int64_t module;
    Job job, residual;
    Part part;
  };
  struct Dense {
    int64_t out_begin, rows, offset;
  };
  std::vector<Variant> variants;
  std::vector<Source> sources;
  std::vector<Dense> dense;

  explicit Plan(at::IntArrayRef numbers) : next_(numbers.begin()), end_(numbers.end()) {
    for (int64_t* field : {&stationary, &out_features, &in_features, &shared_bytes, &direct_tokens}) *field = take();
    variants.resize(take());
    const int64_t modules = take();
    for (auto& v : variants) {
      for (int64_t* field : {&v.max_tokens, &v.stride, &v.modules_at, &v.parts_at, &v.preparations_at, &v.preparations,
                             &v.prepared_columns})
        *field = take();
      v.launches.resize(take());
      for (auto& l : v.launches) l = {take(), take(), take(), take()};
      const int64_t parts = take();
      v.modules.resize(modules);
      for (auto& m : v.modules) fill(m);
      v.parts.resize(parts);
      for (auto& p : v.parts) fill(p);
    }
    sources.resize(take());
    for (auto& d : sources) {
      d.module = take();
      fill(d.job);
      fill(d.residual);
      fill(d.part);
    }
    dense.resize(take());
    for (auto& d : dense) d = {take(), take(), take()};
    TORCH_CHECK(next_ == end_, "a plan of another version of vllm-vptq");
  }

  const std::vector<Module>& modules() const { return variants.front().modules; }

 private:
  int64_t take() {
    TORCH_CHECK(next_ != end_, "a plan of another version of vllm-vptq");
    return *next_++;
  }
  template <typename T>
  void fill(T& record) {
    int32_t* words = reinterpret_cast<int32_t*>(&record);
    for (size_t i = 0; i < sizeof(T) / 4; i++) words[i] = static_cast<int32_t>(take());
  }
  const int64_t *next_, *end_;  // while it is read
};

// Plans by the names that ops are given: a name is short, and takes no time to read (vllm_vptq/gpu.py).
class Plans {
 public:
  static Plans& all() {
    static Plans plans;
    return plans;
  }
  void keep(const std::string& name, at::IntArrayRef numbers) {
    const std::lock_guard lock(mutex_);
    plans_.try_emplace(name, numbers);
  }
  // Stays where it is: nothing is ever taken out.
  const Plan& named(c10::string_view name) {
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(std::string(name));
    TORCH_CHECK(found != plans_.end(), "no layer with this plan was laid out in this process: ", std::string(name));
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, Plan> plans_;
};

void keep_plan(c10::string_view name, at::IntArrayRef numbers) { Plans::all().keep(std::string(name), numbers); }

struct Call {
  const Plan& plan;
  const Tensor& x;  // [tokens, in]
  const Tensor& work;
  Type type;
  Layer layer;
  optional<Tensor> norm, dense, bias;
  cudaStream_t stream;

  const int32_t* at(int64_t offset) const { return work.const_data_ptr<int32_t>() + offset; }

  void few(Tensor& y) const {
    const int64_t step = plan.variants.back().max_tokens, tokens = x.size(0);
    const size_t size = x.element_size();
    Tensor workspace;
    for (int64_t first = 0; first < tokens; first += step) {
      const int count = static_cast<int>(std::min(step, tokens - first));
      const auto& v = *std::find_if(plan.variants.begin(), plan.variants.end(),
                                    [&](const Plan::Variant& variant) { return count <= variant.max_tokens; });
      if (!workspace.defined() || workspace.numel() < count * v.stride)
        workspace = at::empty({count * v.stride}, x.options().dtype(at::kFloat));
      float* sums = workspace.mutable_data_ptr<float>();
      const Tokens part{static_cast<const char*>(x.const_data_ptr()) + first * x.size(1) * size, x.size(1), count};
      const Tensor room = at::empty({count * v.prepared_columns}, x.options());
      const Tokens prepared{room.const_data_ptr(), v.prepared_columns, count};
      if (v.preparations)
        C10_CUDA_CHECK(prepare(type, layer, part, reinterpret_cast<const Preparation*>(at(v.preparations_at)),
                               v.preparations, room.mutable_data_ptr(), v.prepared_columns, sums, v.stride, stream));
      for (const auto& l : v.launches) {
        const Launch work{reinterpret_cast<const Job*>(at(l.jobs_at)),
                          at(l.starts_at),
                          int(l.thread_blocks),
                          sums,
                          v.stride,
                          int(plan.shared_bytes),
                          stream};
        if (l.wide >= 0) {
          const bool half = type == Type::kHalf, many = v.max_tokens > 32;
          const auto wide = half   ? many ? multiply_wide_half_many : multiply_wide_half_few
                            : many ? multiply_wide_bfloat16_many
                                   : multiply_wide_bfloat16_few;
          C10_CUDA_CHECK(wide(Kind(l.wide), layer, part, prepared, v.max_tokens, work));
        } else if (plan.stationary) {
          C10_CUDA_CHECK(multiply(type, layer, part, prepared, work));
        } else {
          C10_CUDA_CHECK(multiply_compact(type, layer, part, work));
        }
      }
      C10_CUDA_CHECK(finish(type, v.modules.data(), v.modules.size(), v.parts.data(), v.parts.size(),
                            reinterpret_cast<const Module*>(at(v.modules_at)),
                            reinterpret_cast<const Part*>(at(v.parts_at)), at(0), sums, v.stride, layer.norm,
                            bias ? bias->const_data_ptr() : nullptr,
                            static_cast<char*>(y.mutable_data_ptr()) + first * plan.out_features * size,
                            plan.out_features, count, stream));
    }
  }

  // Weights [count, in] of outputs `row` to row + count of the layer, those of dense modules left out.
  void decode_window(const Tensor& weight, int64_t row, int64_t count) const {
    std::vector<Decoding> decodings;
    for (const auto& d : plan.sources) {
      const Module& module = plan.modules()[d.module];
      const int64_t from = std::max<int64_t>(row, module.out_begin),
                    to = std::min<int64_t>(row + count, module.out_end);
      if (from >= to) continue;
      const Window window{static_cast<int>(from - module.out_begin), static_cast<int>(to - module.out_begin)};
      char* at =
          static_cast<char*>(weight.mutable_data_ptr()) + (from - row) * weight.stride(0) * weight.element_size();
      decodings.push_back({d.job, d.residual, module, d.part, window, at});
    }
    if (plan.stationary) {
      C10_CUDA_CHECK(decode(type, layer, decodings.data(), decodings.size(), weight.stride(0), stream));
    } else {
      for (const auto& d : decodings)
        C10_CUDA_CHECK(
            decode_compact(type, layer, d.job, d.module, d.part, d.weight, weight.stride(0), d.window, stream));
    }
  }

  void many(Tensor& y) const {
    const auto& modules = plan.modules();
    for (size_t first = 0, last; first < modules.size(); first = last) {
      last = first + 1;
      if (modules[first].dense) continue;
      while (last < modules.size() && !modules[last].dense) last++;
      many_of(y, first, last);
    }
  }

  // One product for neighbouring modules, if their weights are not too many.
  void many_of(Tensor& y, size_t first, size_t last) const {
    const int64_t begin = plan.modules()[first].out_begin, end = plan.modules()[last - 1].out_end;
    const int64_t step =
        std::min(std::max<int64_t>(kDecodedBytes / 2 / plan.in_features / 128 * 128, 128), end - begin);
    Tensor weight = at::empty({step, plan.in_features}, x.options());
    for (int64_t row = begin; row < end; row += step) {
      const int64_t count = std::min(step, end - row);
      decode_window(weight, row, count);
      product(y, row, count, weight.narrow(0, 0, count).t());
    }
  }

  void product(Tensor& y, int64_t first, int64_t count, const Tensor& weight) const {
    Tensor out = y.narrow(1, first, count);
    if (bias)
      at::addmm_out(out, bias->narrow(0, first, count), x, weight);
    else
      at::mm_out(out, x, weight);
  }

  void dense_modules(Tensor& y) const {
    for (const auto& d : plan.dense) {
      TORCH_CHECK(dense, "the plan has a dense module, but there is no weight of it");
      const Tensor weight = dense->narrow(0, d.offset, d.rows * plan.in_features).view({d.rows, plan.in_features});
      product(y, d.out_begin, d.rows, weight.t());
    }
  }
};

Tensor lookup_linear(const Tensor& x, const Tensor& codes, const Tensor& books, const optional<Tensor>& norm,
                     const optional<Tensor>& columns, const optional<Tensor>& dense, const optional<Tensor>& bias,
                     const Tensor& work, c10::string_view name) {
  const Plan& plan = Plans::all().named(name);
  // Numbers as strings: where the compiler's C++ library is another than torch's, streaming them has crashed.
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == plan.in_features, "expected ", std::to_string(plan.in_features),
              " input features, got ", std::to_string(x.dim() ? x.size(-1) : 0));
  const Type type = type_of(x);
  TORCH_CHECK(books.scalar_type() == x.scalar_type(), "activations are ", x.scalar_type(),
              ", but the layer was made for ", books.scalar_type());
  TORCH_CHECK(codes.device() == x.device(), "activations are on ", x.device().str(), ", but the layer is on ",
              codes.device().str());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == plan.out_features && bias->device() == x.device()),
              "expected a bias of ", std::to_string(plan.out_features), " numbers on the device of the activations");
  const c10::cuda::CUDAGuard guard(x.device());
  auto shape = x.sizes().vec();
  shape.back() = plan.out_features;
  Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  Tensor rows = x.reshape({-1, plan.in_features}).contiguous();
  if (reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16) rows = rows.clone();  // copied 16 bytes at a time
  Tensor out = y.view({-1, plan.out_features});
  optional<Tensor> added;
  if (bias) added = bias->to(x.scalar_type()).contiguous();
  const Layer layer{codes.const_data_ptr<int32_t>(), books.const_data_ptr(),
                    norm ? norm->const_data_ptr<float>() : nullptr,
                    columns ? columns->const_data_ptr<int32_t>() : nullptr};
  const Call call{plan, rows, work, type, layer, norm, dense, added, c10::cuda::getCurrentCUDAStream()};
  if (rows.size(0) <= plan.direct_tokens)
    call.few(out);
  else
    call.many(out);
  call.dense_modules(out);
  return y;
}

Tensor lookup_weight(const Tensor& codes, const Tensor& books, const optional<Tensor>& norm,
                     const optional<Tensor>& columns, const optional<Tensor>& dense, const Tensor& work,
                     c10::string_view name) {
  const Plan& plan = Plans::all().named(name);
  const Type type = type_of(books);
  const c10::cuda::CUDAGuard guard(books.device());
  const Layer layer{codes.const_data_ptr<int32_t>(), books.const_data_ptr(),
                    norm ? norm->const_data_ptr<float>() : nullptr,
                    columns ? columns->const_data_ptr<int32_t>() : nullptr};
  const Call call{plan, books, work, type, layer, norm, dense, {}, c10::cuda::getCurrentCUDAStream()};
  Tensor weight = at::empty({plan.out_features, plan.in_features}, books.options());
  call.decode_window(weight, 0, plan.out_features);
  for (const auto& d : plan.dense)
    weight.narrow(0, d.out_begin, d.rows)
        .copy_(dense->narrow(0, d.offset, d.rows * plan.in_features).view({d.rows, plan.in_features}));
  return weight;
}

Stream stream_of(const Tensor& words, int64_t columns, int64_t bits, int64_t shift, int64_t width) {
  TORCH_CHECK(words.dim() == 2 && words.is_contiguous());
  return {words.const_data_ptr<int32_t>(),
          int(words.size(0)),
          int(columns),
          int(words.size(1)),
          int(bits),
          int(shift),
          int(width)};
}

// Both take words [rows, row_words] that are followed in memory by at least one more word.
std::tuple<Tensor, Tensor> pack_sliced(const Tensor& words, int64_t columns, int64_t bits, int64_t shift, int64_t width,
                                       int64_t slice_bits, int64_t slices, int64_t tiles) {
  const c10::cuda::CUDAGuard guard(words.device());
  const cudaStream_t cuda_stream = c10::cuda::getCurrentCUDAStream();
  const Stream stream = stream_of(words, columns, bits, shift, width);
  Tensor counts = at::empty({slices * words.size(0) * tiles}, words.options());
  C10_CUDA_CHECK(count_entries(stream, slice_bits, slices, tiles, counts.mutable_data_ptr<int32_t>(), cuda_stream));
  Tensor offsets = at::zeros({counts.size(0) + 1}, words.options());
  offsets.narrow(0, 1, counts.size(0)).copy_(((counts + 31).bitwise_right_shift(5)).cumsum(0));
  Tensor lists = at::empty({offsets[-1].item<int64_t>() * 32}, words.options());
  C10_CUDA_CHECK(fill_lists(stream, slice_bits, slices, tiles, offsets.const_data_ptr<int32_t>(),
                            lists.mutable_data_ptr<int32_t>(), cuda_stream));
  return {lists, offsets};
}

Tensor pack_resident(const Tensor& words, int64_t columns, int64_t bits, int64_t shift, int64_t width,
                     int64_t res_shift, int64_t res_width, int64_t kind, int64_t loads, int64_t book_rows,
                     int64_t copies, int64_t vector_width) {
  const c10::cuda::CUDAGuard guard(words.device());
  const int64_t size = vector_width == 16 ? words.size(0) * 64 : (words.size(0) + 1) / 2 * 128;
  Tensor codes = at::empty({size * loads}, words.options());
  C10_CUDA_CHECK(fill_codes(Kind(kind), stream_of(words, columns, bits, shift, width),
                            stream_of(words, columns, bits, res_shift, res_width), loads, book_rows, copies,
                            vector_width, codes.mutable_data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream()));
  return codes;
}

}  // namespace
}  // namespace vptq

TORCH_LIBRARY_IMPL(vllm_vptq, CompositeExplicitAutograd, m) { m.impl("keep_plan", vptq::keep_plan); }

TORCH_LIBRARY_IMPL(vllm_vptq, CUDA, m) {
  m.impl("lookup_linear", vptq::lookup_linear);
  m.impl("lookup_weight", vptq::lookup_weight);
  m.impl("pack_sliced", vptq::pack_sliced);
  m.impl("pack_resident", vptq::pack_resident);
}
