// 512-bit vectors with VNNI; bf16 products by instruction where REALM_HAS_BF16 is defined.

struct Vector {
  using F = __m512;
  using I = __m512i;

  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F all(float x) { return _mm512_set1_ps(x); }
  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F swap_pairs(F x) { return _mm512_permute_ps(x, 0xb1); }  // lanes 1 0 3 2 ...
  static inline float greatest(F x) { return _mm512_reduce_max_ps(x); }
  static inline float sum(F x) {  // by halving
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
  }
  static inline F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static inline I all_int(int32_t x) { return _mm512_set1_epi32(x); }
  static inline I load_int(const void* p) { return _mm512_loadu_si512(p); }
  static inline void store_int(void* p, I x) { _mm512_storeu_si512(p, x); }
  static inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static inline I to_int(F x) { return _mm512_cvtps_epi32(x); }
  static inline I bits(F x) { return _mm512_castps_si512(x); }
  static inline F number(I x) { return _mm512_castsi512_ps(x); }
  static inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static inline I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
  static inline I and_int(I a, I b) { return _mm512_and_si512(a, b); }
  static inline I shift_left(I x, int n) { return _mm512_sll_epi32(x, _mm_cvtsi32_si128(n)); }

  // a + the four products of unsigned bytes w and signed bytes x, in each lane
  static inline I dot(I a, I w, I x) { return _mm512_dpbusd_epi32(a, w, x); }
  static inline I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static inline I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
  static inline I table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline I look_up(I table, I indices) { return _mm512_shuffle_epi8(table, indices); }

  static inline F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline F load_bytes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static inline void store_bytes(int8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x));
  }

#ifdef REALM_HAS_BF16
  // a + the two products of bf16 in each lane
  static inline F dot_pairs(F a, I w, I x) { return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)x); }
  // 16 floats rounded to bf16, in order
  static inline void store_bf16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
#else
  static inline F dot_pairs(F a, I w, I x) {
    const __m512i upper = _mm512_set1_epi32(INT32_MIN >> 15);
    a = _mm512_fmadd_ps(number(_mm512_slli_epi32(w, 16)), number(_mm512_slli_epi32(x, 16)), a);
    return _mm512_fmadd_ps(number(and_int(w, upper)), number(and_int(x, upper)), a);
  }
  static inline void store_bf16(uint16_t* p, F x) {  // to nearest, ties to even
    __m512i odd = and_int(_mm512_srli_epi32(bits(x), 16), all_int(1));
    __m512i up = _mm512_srli_epi32(add_int(add_int(bits(x), odd), all_int(0x7fff)), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, all_int(0x7fc0))));
  }
#endif
  // lane i holds (a[i], b[i]) as bf16 bits
  static inline I interleave(const uint16_t* a, const uint16_t* b) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

  // x[i] where first + i lies in [low, high], else `other`
  static inline F where_within(int32_t first, int32_t low, int32_t high, F x, float other) {
    __m512i at = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __mmask16 seen = _mm512_cmp_epi32_mask(at, _mm512_set1_epi32(low), _MM_CMPINT_NLT) &
                     _mm512_cmp_epi32_mask(at, _mm512_set1_epi32(high), _MM_CMPINT_LE);
    return _mm512_mask_blend_ps(seen, _mm512_set1_ps(other), x);
  }
  static inline F magnitude(F x) { return _mm512_abs_ps(x); }
  static inline F keep_below(F x, int32_t limit) {  // x where its magnitude's bits are below the limit, else 0
    __mmask16 kept = _mm512_cmp_epi32_mask(bits(magnitude(x)), all_int(limit), _MM_CMPINT_LT);
    return _mm512_maskz_mov_ps(kept, x);
  }
  static inline F zero_below(F x, float limit, F y) {  // y where x >= limit, else 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), y);
  }

  // 16 rows of 16 numbers of 32 bits, a row every `stride` numbers, become the columns of `out`
  static inline void transpose(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * stride);
    for (int i = 0; i < 8; i++) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
      _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
      _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
      _mm512_storeu_si512(out + (4 + i) * out_stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
      _mm512_storeu_si512(out + (12 + i) * out_stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
    }
  }
};
