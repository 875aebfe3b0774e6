// Vectors of 16 lanes as two of 256 bits.

struct Vector {
  struct F {
    __m256 low, high;
  };
  struct I {
    __m256i low, high;
  };

  static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static inline F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static inline void store(float* p, F x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
  static inline F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static inline F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static inline F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static inline F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
  static inline F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static inline F swap_pairs(F x) { return {_mm256_permute_ps(x.low, 0xb1), _mm256_permute_ps(x.high, 0xb1)}; }
  static inline float greatest(F x) {
    __m256 y = _mm256_max_ps(x.low, x.high);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
  }
  static inline float sum(F x) {  // by halving
    __m256 y = _mm256_add_ps(x.low, x.high);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
  }
  static inline F round(F x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, nearest), _mm256_round_ps(x.high, nearest)};
  }

  static inline I all_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static inline I load_int(const void* p) {
    const __m256i* from = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
  }
  static inline void store_int(void* p, I x) {
    __m256i* to = static_cast<__m256i*>(p);
    _mm256_storeu_si256(to, x.low), _mm256_storeu_si256(to + 1, x.high);
  }
  static inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
  static inline I to_int(F x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
  static inline I bits(F x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
  static inline F number(I x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
  static inline I add_int(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static inline I max_int(I a, I b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
  static inline I and_int(I a, I b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
  static inline I shift_left(I x, int n) {
    const __m128i count = _mm_cvtsi32_si128(n);
    return {_mm256_sll_epi32(x.low, count), _mm256_sll_epi32(x.high, count)};
  }

  // a + the four products of unsigned bytes w and signed bytes x, in each lane; in 16 bits, as the
  // instruction for bytes saturates
  static inline __m256i dot(__m256i a, __m256i w, __m256i x) {
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(a, _mm256_add_epi32(even, odd));
  }
  static inline I dot(I a, I w, I x) { return {dot(a.low, w.low, x.low), dot(a.high, w.high, x.high)}; }
  static inline I low_nibbles(I x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
  }
  static inline I high_nibbles(I x) { return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)}); }
  static inline I table(const uint8_t* p) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {both, both};
  }
  static inline I look_up(I table, I indices) {
    return {_mm256_shuffle_epi8(table.low, indices.low), _mm256_shuffle_epi8(table.high, indices.high)};
  }

  static inline F load_half(const uint16_t* p) {
    const __m128i* from = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
  }
  static inline F load_bytes(const int8_t* p) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return to_float({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
  }
  static inline void store_bytes(int8_t* p, I x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }

  // a + the two products of bf16 in each lane
  static inline __m256 dot_pairs(__m256 a, __m256i w, __m256i x) {
    const __m256i upper = _mm256_set1_epi32(INT32_MIN >> 15);
    a = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), a);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, upper)), _mm256_castsi256_ps(_mm256_and_si256(x, upper)), a);
  }
  static inline F dot_pairs(F a, I w, I x) { return {dot_pairs(a.low, w.low, x.low), dot_pairs(a.high, w.high, x.high)}; }
  static inline __m256i to_bf16(__m256 x) {  // in the lower halves; to nearest, ties to even
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
  }
  // 16 floats rounded to bf16, in order
  static inline void store_bf16(uint16_t* p, F x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bf16(x.low), to_bf16(x.high)), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
  }
  // lane i holds (a[i], b[i]) as bf16 bits
  static inline I interleave(const uint16_t* a, const uint16_t* b) {
    const __m128i *from = reinterpret_cast<const __m128i*>(a), *other = reinterpret_cast<const __m128i*>(b);
    __m256i low = _mm256_or_si256(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(other)), 16));
    __m256i high = _mm256_or_si256(_mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1)), _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(other + 1)), 16));
    return {low, high};
  }

  // x[i] where first + i lies in [low, high], else `other`
  static inline __m256 where_within(__m256i at, int32_t low, int32_t high, __m256 x, float other) {
    __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), at), _mm256_cmpgt_epi32(at, _mm256_set1_epi32(high)));
    return _mm256_blendv_ps(x, _mm256_set1_ps(other), _mm256_castsi256_ps(outside));
  }
  static inline F where_within(int32_t first, int32_t low, int32_t high, F x, float other) {
    __m256i at = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return {where_within(at, low, high, x.low, other), where_within(_mm256_add_epi32(at, _mm256_set1_epi32(8)), low, high, x.high, other)};
  }
  static inline F magnitude(F x) { return number(and_int(bits(x), all_int(INT32_MAX))); }
  static inline F keep_below(F x, int32_t limit) {  // x where its magnitude's bits are below the limit, else 0
    const I size = bits(magnitude(x));
    const __m256i bound = _mm256_set1_epi32(limit);
    return {_mm256_and_ps(x.low, _mm256_castsi256_ps(_mm256_cmpgt_epi32(bound, size.low))),
            _mm256_and_ps(x.high, _mm256_castsi256_ps(_mm256_cmpgt_epi32(bound, size.high)))};
  }
  static inline F zero_below(F x, float limit, F y) {  // y where x >= limit, else 0
    const __m256 bound = _mm256_set1_ps(limit);
    return {_mm256_and_ps(_mm256_cmp_ps(x.low, bound, _CMP_NLT_UQ), y.low), _mm256_and_ps(_mm256_cmp_ps(x.high, bound, _CMP_NLT_UQ), y.high)};
  }

  // 16 rows of 16 numbers of 32 bits, a row every `stride` numbers, become the columns of `out`
  static inline void transpose(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
    for (int64_t i = 0; i < LANES; i++)
      for (int64_t j = 0; j < LANES; j++) out[j * out_stride + i] = in[i * stride + j];
  }
};
