// Vectors of 8 and 16 floats out of the compiler's own vectors of 4, which nearly every processor has.
// Included inside a namespace, once.

#define VPTQ_TARGET

constexpr int kMaxTokens = 4;  // 16 accumulators of 4 floats

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Bits4 __attribute__((vector_size(16)));

template <int W>
struct Lanes {
  Float4 part[W / 4];
};

template <int W>
inline Lanes<W> zero() {
  return {};
}

inline Float4 load4(const float* from) {
  Float4 out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

inline Bits4 load_bits4(const void* from) {
  typedef uint16_t Narrow4 __attribute__((vector_size(8)));
  Narrow4 narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return __builtin_convertvector(narrow, Bits4);
}

inline Float4 load4(const BFloat* from) { return reinterpret_cast<Float4>(load_bits4(from) << 16); }

// As widen() in number.h.
inline Float4 load4(const Half* from) {
  const Bits4 bits = load_bits4(from), magnitude = (bits & 0x7fff) << 13;
  const Bits4 finite = reinterpret_cast<Bits4>(reinterpret_cast<Float4>(magnitude) * 0x1p112f);
  const Bits4 special = reinterpret_cast<Bits4>(magnitude >= 0x0f800000) & 0x7f800000;
  return reinterpret_cast<Float4>(finite | special | (bits & 0x8000) << 16);
}

template <int W, class E>
inline Lanes<W> load(const E* from) {
  Lanes<W> out;
  for (int i = 0; i < W / 4; ++i) out.part[i] = load4(from + i * 4);
  return out;
}

template <int W>
inline void store(float* to, const Lanes<W>& a) {
  std::memcpy(to, a.part, sizeof a.part);
}

template <int W>
inline Lanes<W> add(Lanes<W> a, const Lanes<W>& b) {
  for (int i = 0; i < W / 4; ++i) a.part[i] += b.part[i];
  return a;
}

// c + a * b, rounded once where the processor does that in one instruction.
template <int W>
inline Lanes<W> multiply_add(float a, const Lanes<W>& b, Lanes<W> c) {
  for (int i = 0; i < W / 4; ++i) {
#ifdef __FP_FAST_FMAF
    for (int j = 0; j < 4; ++j) c.part[i][j] = __builtin_fmaf(a, b.part[i][j], c.part[i][j]);
#else
    c.part[i] += a * b.part[i];
#endif
  }
  return c;
}

// Reads `count` merged indices; writes main[i] and residual[i], each times the vector length: offsets into the books.
// Reads up to a word behind the stream.
inline void unpack(const Stream& s, const uint32_t* words, int count, uint32_t* main, uint32_t* residual) {
  int64_t position = 0;
  for (int i = 0; i < count; ++i, position += s.bits) {
    const uint32_t* w = words + position / 32;
    const uint64_t pair = w[0] | static_cast<uint64_t>(w[1]) << 32;
    const uint32_t merged = static_cast<uint32_t>(pair >> (position % 32));
    main[i] = (merged & s.main_mask) * s.vector_len;
    if (s.res_mask) residual[i] = (merged >> s.main_bits & s.res_mask) * s.vector_len;
  }
}
