// What surrounds the inner loops of a call: before them the tokens in float32, scaled, gathered and packed for every
// segment; after them norm, bias and the output's type.
#pragma once

#include "layer.h"

// a . b, or the sum of a without b, in 16 interleaved parts: more exact than one sum, and quick.
inline float dot(const float* a, const float* b, int64_t n) {
  float parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int p = 0; p < 16; ++p) parts[p] += a[i + p] * (b ? b[i + p] : 1.0f);
  for (int p = 0; i < n; ++i, ++p) parts[p] += a[i] * (b ? b[i] : 1.0f);
  for (int width = 8; width; width /= 2)
    for (int p = 0; p < width; ++p) parts[p] += parts[p + width];
  return parts[0];
}

// Elements [begin, begin + n) as float32.
template <class E>
void widen_all(const void* from, int64_t begin, int64_t n, float* to) {
  const E* e = static_cast<const E*>(from) + begin;
  for (int64_t i = 0; i < n; ++i) to[i] = widen(e[i]);
}

inline void widen_all(int64_t dtype, const void* from, int64_t begin, int64_t n, float* to) {
  if (dtype == kFloat32) widen_all<float>(from, begin, n, to);
  if (dtype == kFloat16) widen_all<Half>(from, begin, n, to);
  if (dtype == kBFloat16) widen_all<BFloat>(from, begin, n, to);
}

template <class E>
void narrow_all(const float* from, int64_t n, void* to, int64_t begin) {
  E* e = static_cast<E*>(to) + begin;
  for (int64_t i = 0; i < n; ++i) narrow(from[i], e + i);
}

inline void narrow_all(int64_t dtype, const float* from, int64_t n, void* to, int64_t begin) {
  if (dtype == kFloat32) narrow_all<float>(from, n, to, begin);
  if (dtype == kFloat16) narrow_all<Half>(from, n, to, begin);
  if (dtype == kBFloat16) narrow_all<BFloat>(from, n, to, begin);
}

// Column j of a token goes to to[j * count]: the tokens of a block lie beside each other.
inline void pack(const float* x, const float* scale, const int32_t* columns, int64_t n, int64_t count, float* to) {
  for (int64_t j = 0; j < n; ++j) {
    const int64_t c = columns ? columns[j] : j;
    to[j * count] = scale ? x[c] * scale[c] : x[c];
  }
}

// Sets Segment::x, Module::x and Module::sums.
inline void prepare(Layer& layer, const Tokens& tokens, int threads) {
  const int64_t k = layer.in_features;
  int64_t columns = 0;
  for (const Module& m : layer.modules) {
    if (m.dense) columns += k;
    for (const Segment& s : m.segments) columns += s.plan.num_columns;
  }
  layer.packed.resize(columns * tokens.count);
  float* next = layer.packed.data();
  for (Module& m : layer.modules) {
    m.x = next;
    if (m.dense) next += k * tokens.count;
    for (Segment& s : m.segments) {
      s.x = next;
      next += s.plan.num_columns * tokens.count;
    }
    m.sums.resize(tokens.count);
  }
#pragma omp parallel num_threads(threads) if (threads > 1 && tokens.blocks() > 1)
  {
    std::vector<float> x(k);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < tokens.blocks(); ++b) {
      const int64_t begin = tokens.begin(b), count = tokens.begin(b + 1) - begin;
      for (int64_t t = begin; t < begin + count; ++t) {
        widen_all(tokens.call.x_dtype, tokens.call.x, (tokens.first + t) * k, k, x.data());
        for (Module& m : layer.modules) {
          const bool by_column = m.plan.norm_kind == kNormColumns;
          if (m.scale) m.sums[t] = dot(x.data(), by_column ? m.shift : nullptr, k);
          if (m.dense) pack(x.data(), nullptr, nullptr, k, count, m.x + begin * k + (t - begin));
          for (Segment& s : m.segments)
            pack(x.data(), by_column ? m.scale : nullptr, s.columns, s.plan.num_columns, count,
                 s.x + begin * s.plan.num_columns + (t - begin));
        }
      }
    }
  }
}

// Norm, bias and rounding of sums [tokens][end - begin], outputs `begin` to `end` of a module, into y.
inline void finish(const Tokens& tokens, const Module& m, int64_t begin, int64_t end, float* sums) {
  const Call& call = tokens.call;
  const int64_t width = end - begin, out = m.plan.out_start + begin;
  std::vector<float> bias(width);
  if (call.bias) widen_all(call.bias_dtype, call.bias, out, width, bias.data());
  for (int64_t t = 0; t < tokens.count; ++t) {
    float* y = sums + t * width;
    for (int64_t i = 0; i < width; ++i) {
      if (m.plan.norm_kind == kNormColumns) y[i] += m.sums[t];
      if (m.plan.norm_kind == kNormRows) y[i] = y[i] * m.scale[begin + i] + m.sums[t] * m.shift[begin + i];
      if (call.bias) y[i] += bias[i];
    }
    narrow_all(call.x_dtype, y, width, call.y, (tokens.first + t) * call.out_features + out);
  }
}
