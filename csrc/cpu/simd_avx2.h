// Vectors of 8 and 16 floats in one and two AVX2 registers. Included inside a namespace, once.

#define VPTQ_TARGET __attribute__((target("avx2,fma,f16c")))

constexpr int kMaxTokens = 6;  // 12 accumulators, two registers of weights, one of a broadcast token: 15 of 16

template <int W>
struct Lanes;
template <>
struct Lanes<8> {
  __m256 value;
};
template <>
struct Lanes<16> {
  __m256 low, high;
};

template <int W>
VPTQ_TARGET inline Lanes<W> zero();
template <>
VPTQ_TARGET inline Lanes<8> zero<8>() {
  return {_mm256_setzero_ps()};
}
template <>
VPTQ_TARGET inline Lanes<16> zero<16>() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}

VPTQ_TARGET inline __m256 load8(const float* from) { return _mm256_loadu_ps(from); }
VPTQ_TARGET inline __m256 load8(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
// One shuffle moves each element into the upper half of its lane: widening and shifting would take two instructions.
VPTQ_TARGET inline __m256 load8(const BFloat* from) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i place = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(narrow), place));
}

template <int W, class E>
VPTQ_TARGET inline Lanes<W> load(const E* from) {
  if constexpr (W == 8) {
    return {load8(from)};
  } else {
    return {load8(from), load8(from + 8)};
  }
}

VPTQ_TARGET inline void store(float* to, Lanes<8> a) { _mm256_storeu_ps(to, a.value); }
VPTQ_TARGET inline void store(float* to, Lanes<16> a) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}

VPTQ_TARGET inline Lanes<8> add(Lanes<8> a, Lanes<8> b) { return {_mm256_add_ps(a.value, b.value)}; }
VPTQ_TARGET inline Lanes<16> add(Lanes<16> a, Lanes<16> b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

// c + a * b, rounded once.
VPTQ_TARGET inline Lanes<8> multiply_add(float a, Lanes<8> b, Lanes<8> c) {
  return {_mm256_fmadd_ps(_mm256_set1_ps(a), b.value, c.value)};
}
VPTQ_TARGET inline Lanes<16> multiply_add(float a, Lanes<16> b, Lanes<16> c) {
  const __m256 wide = _mm256_set1_ps(a);
  return {_mm256_fmadd_ps(wide, b.low, c.low), _mm256_fmadd_ps(wide, b.high, c.high)};
}
