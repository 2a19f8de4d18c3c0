// Bit streams, eight indices at a time: bytes are shuffled so that each 32-bit lane holds the four bytes its index
// begins in, and shifted into place. An index of more than 25 bits may reach into a fifth byte, which a second shuffle
// fetches. Included inside a namespace, once per instruction set, after VPTQ_TARGET is defined.

template <bool kLong, bool kResidual>
VPTQ_TARGET void unpack_all(const Stream& s, const uint8_t* bytes, int count, uint32_t* main, uint32_t* residual) {
  const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(s.first));
  const __m256i fifth = _mm256_load_si256(reinterpret_cast<const __m256i*>(s.fifth));
  const __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(s.right));
  const __m256i left = _mm256_load_si256(reinterpret_cast<const __m256i*>(s.left));
  const __m256i main_mask = _mm256_set1_epi32(s.main_mask), res_mask = _mm256_set1_epi32(s.res_mask);
  const __m256i length = _mm256_set1_epi32(s.vector_len);
  const __m128i main_bits = _mm_cvtsi32_si128(s.main_bits);
  const int step = s.bits, upper = s.bits * 4 / 8;
  for (int i = 0; i < count; i += 8, bytes += step) {
    const __m128i low_half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i high_half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + upper));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low_half), high_half, 1);
    __m256i merged = _mm256_srlv_epi32(_mm256_shuffle_epi8(both, first), right);
    if (kLong) merged = _mm256_or_si256(merged, _mm256_sllv_epi32(_mm256_shuffle_epi8(both, fifth), left));
    const __m256i index = _mm256_and_si256(merged, main_mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(main + i), _mm256_mullo_epi32(index, length));
    if (kResidual) {
      const __m256i second = _mm256_and_si256(_mm256_srl_epi32(merged, main_bits), res_mask);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(residual + i), _mm256_mullo_epi32(second, length));
    }
  }
}

// Reads `count` merged indices; writes main[i] and residual[i], each times the vector length: offsets into the books.
// Works on eight at a time: reads up to 16 words behind the stream, and fills the outputs up to a multiple of eight.
VPTQ_TARGET inline void unpack(const Stream& s, const uint32_t* words, int count, uint32_t* main, uint32_t* residual) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(words);
  if (s.bits > 25) {
    s.res_mask ? unpack_all<true, true>(s, bytes, count, main, residual)
               : unpack_all<true, false>(s, bytes, count, main, residual);
  } else {
    s.res_mask ? unpack_all<false, true>(s, bytes, count, main, residual)
               : unpack_all<false, false>(s, bytes, count, main, residual);
  }
}
