// Vectors of 16 lanes as four of 128 bits.

struct Vector {
  struct F {
    float32x4_t v[4];
  };
  struct I {
    int32x4_t v[4];
  };

  template <class Function>
  static inline F each(Function f) { return {{f(0), f(1), f(2), f(3)}}; }
  template <class Function>
  static inline I each_int(Function f) { return {{f(0), f(1), f(2), f(3)}}; }

  static inline F zero() { return all(0); }
  static inline F all(float x) { return each([&](int) { return vdupq_n_f32(x); }); }
  static inline F load(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
  static inline void store(float* p, F x) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
  }
  static inline F add(F a, F b) { return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
  static inline F sub(F a, F b) { return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
  static inline F mul(F a, F b) { return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
  static inline F div(F a, F b) { return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
  static inline F fma(F a, F b, F c) { return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
  static inline F max(F a, F b) { return each([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); }); }
  static inline F swap_pairs(F x) { return each([&](int i) { return vrev64q_f32(x.v[i]); }); }  // lanes 1 0 3 2 ...
  static inline float greatest(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
  static inline float sum(F x) {  // by halving
    float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static inline F round(F x) { return each([&](int i) { return vrndnq_f32(x.v[i]); }); }

  static inline I all_int(int32_t x) { return each_int([&](int) { return vdupq_n_s32(x); }); }
  static inline I load_int(const void* p) {
    return each_int([&](int i) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i)); });
  }
  static inline void store_int(void* p, I x) {
    for (int i = 0; i < 4; i++) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, vreinterpretq_u8_s32(x.v[i]));
  }
  static inline F to_float(I x) { return each([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
  static inline I to_int(F x) { return each_int([&](int i) { return vcvtnq_s32_f32(x.v[i]); }); }
  static inline I bits(F x) { return each_int([&](int i) { return vreinterpretq_s32_f32(x.v[i]); }); }
  static inline F number(I x) { return each([&](int i) { return vreinterpretq_f32_s32(x.v[i]); }); }
  static inline I add_int(I a, I b) { return each_int([&](int i) { return vaddq_s32(a.v[i], b.v[i]); }); }
  static inline I max_int(I a, I b) { return each_int([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); }); }
  static inline I and_int(I a, I b) { return each_int([&](int i) { return vandq_s32(a.v[i], b.v[i]); }); }
  static inline I shift_left(I x, int n) { return each_int([&](int i) { return vshlq_s32(x.v[i], vdupq_n_s32(n)); }); }
  static inline I shift_right(I x, int n) {  // zeros come in from the left
    return each_int([&](int i) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.v[i]), vdupq_n_s32(-n))); });
  }

  // a + the four products of unsigned bytes w and signed bytes x, in each lane; the instruction wants both
  // signed: w = (w - 128) + 127 + 1
  static inline I dot(I a, I w, I x) {
    return each_int([&](int i) {
      int8x16_t inputs = vreinterpretq_s8_s32(x.v[i]);
      int8x16_t weights = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(w.v[i]), vdupq_n_u8(128)));
      int32x4_t sum = vdotq_s32(vdotq_s32(a.v[i], vdupq_n_s8(127), inputs), vdupq_n_s8(1), inputs);
      return vdotq_s32(sum, weights, inputs);
    });
  }
  static inline I low_nibbles(I x) { return and_int(x, all_int(0x0f0f0f0f)); }
  static inline I high_nibbles(I x) { return low_nibbles(shift_right(x, 4)); }
  static inline I table(const uint8_t* p) {
    return each_int([&](int) { return vreinterpretq_s32_u8(vld1q_u8(p)); });
  }
  static inline I look_up(I table, I indices) {
    return each_int([&](int i) {
      return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table.v[i]), vreinterpretq_u8_s32(indices.v[i])));
    });
  }

  static inline F load_half(const uint16_t* p) {
    return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
  }
  static inline F load_bytes(const int8_t* p) {
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return to_float({{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}});
  }
  static inline void store_bytes(int8_t* p, I x) {
    int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1])), high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }

  // a + the two products of bf16 in each lane
  static inline F dot_pairs(F a, I w, I x) {
    const I upper = all_int(INT32_MIN >> 15);
    a = fma(number(shift_left(w, 16)), number(shift_left(x, 16)), a);
    return fma(number(and_int(w, upper)), number(and_int(x, upper)), a);
  }
  // 16 floats rounded to bf16, in order; to nearest, ties to even
  static inline void store_bf16(uint16_t* p, F x) {
    for (int i = 0; i < 4; i++) {
      uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      uint32x4_t up = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff)), 16);
      vst1_u16(p + 4 * i, vmovn_u32(vbslq_u32(vceqq_f32(x.v[i], x.v[i]), up, vdupq_n_u32(0x7fc0))));
    }
  }
  // lane i holds (a[i], b[i]) as bf16 bits
  static inline I interleave(const uint16_t* a, const uint16_t* b) {
    return each_int([&](int i) {
      return vreinterpretq_s32_u32(vorrq_u32(vmovl_u16(vld1_u16(a + 4 * i)), vshlq_n_u32(vmovl_u16(vld1_u16(b + 4 * i)), 16)));
    });
  }

  // x[i] where first + i lies in [low, high], else `other`
  static inline F where_within(int32_t first, int32_t low, int32_t high, F x, float other) {
    const int32_t steps[4] = {0, 1, 2, 3};
    return each([&](int i) {
      int32x4_t at = vaddq_s32(vld1q_s32(steps), vdupq_n_s32(first + 4 * i));
      uint32x4_t seen = vandq_u32(vcgeq_s32(at, vdupq_n_s32(low)), vcleq_s32(at, vdupq_n_s32(high)));
      return vbslq_f32(seen, x.v[i], vdupq_n_f32(other));
    });
  }
  static inline F magnitude(F x) { return each([&](int i) { return vabsq_f32(x.v[i]); }); }
  static inline F keep_below(F x, int32_t limit) {  // x where its magnitude's bits are below the limit, else 0
    I size = bits(magnitude(x));
    return each([&](int i) { return vbslq_f32(vcltq_s32(size.v[i], vdupq_n_s32(limit)), x.v[i], vdupq_n_f32(0)); });
  }
  static inline F zero_below(F x, float limit, F y) {  // y where x >= limit, else 0
    return each([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], vdupq_n_f32(limit)), vdupq_n_f32(0), y.v[i]); });
  }

  // 16 rows of 16 numbers of 32 bits, a row every `stride` numbers, become the columns of `out`
  static inline void transpose(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
    for (int64_t i = 0; i < LANES; i++)
      for (int64_t j = 0; j < LANES; j++) out[j * out_stride + i] = in[i * stride + j];
  }
};
