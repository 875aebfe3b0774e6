// The operations on a slot cache as XLA custom calls: keys and values written in place, and attended to.
#include "ffi.h"

namespace realm {
namespace {

// A cache's [S, K, C, H].
struct CacheShape {
  int64_t S, K, C, H;

  bool operator==(const CacheShape& other) const { return S == other.S && K == other.K && C == other.C && H == other.H; }
};

// False where the cache has another form.
bool read_shape(const ffi::AnyBuffer& cache, bool is_keys, CacheShape* shape) {
  auto d = cache.dimensions();
  if (cache.element_type() == ffi::S8 && d.size() == 4) {
    *shape = {d[0], d[1], d[2], d[3]};
  } else if (cache.element_type() == ffi::U32 && d.size() == 5) {
    const int64_t H = is_keys ? 2 * d[3] : d[4];
    if ((is_keys ? d[4] : 2 * d[3]) != SPAN || H % LANES != 0) return false;
    *shape = {d[0], d[1], d[2] * SPAN, H};
  } else {
    return false;
  }
  return shape->K > 0 && shape->C % SPAN == 0 && shape->H > 0;
}

// One layer's keys and values, and the scales of int8.
struct Cache {
  ffi::AnyBuffer k, v;
  ffi::Buffer<ffi::F32> k_scale, v_scale;

  bool is_int8() const { return k.element_type() == ffi::S8; }
  float* k_scales() const { return is_int8() ? k_scale.typed_data() : nullptr; }
  float* v_scales() const { return is_int8() ? v_scale.typed_data() : nullptr; }

  // What is wrong with it; null where its shape is read.
  const char* read(CacheShape* shape) const {
    CacheShape values;
    if (!read_shape(k, true, shape) || !read_shape(v, false, &values) || k.element_type() != v.element_type() || !(*shape == values))
      return "keys and values are no cache of whole blocks of 64 positions";
    for (const auto* each : {&k_scale, &v_scale})
      if (!(is_int8() ? has_shape(*each, {shape->S, shape->K, shape->C}) : is_empty(*each)))
        return "int8 has a scale for each position, bf16 none";
    return nullptr;
  }
};

// Which slots and positions a call's [B, T] tokens belong to.
struct Places {
  ffi::Buffer<ffi::S32> slots, positions;

  bool fit(int64_t B, int64_t T, int64_t S) const {
    return has_shape(positions, {B, T}) && (is_empty(slots) ? B <= S : has_shape(slots, {B}));
  }
  const int32_t* slots_or_null() const { return is_empty(slots) ? nullptr : slots.typed_data(); }
};

// How scores are made.
struct Scoring {
  ffi::Buffer<ffi::F32> sinks;
  float scale, softcap;
  int64_t window;

  bool fits(int64_t N) const { return is_empty(sinks) || has_shape(sinks, {N}); }
};

// Queries [B, T, N, H], `stride` numbers from one token to the next.
void attend_to(ffi::ThreadPool& pool, const float* q, int64_t B, int64_t T, int64_t N, int64_t stride, const Cache& cache,
               const CacheShape& kept, const Places& places, const Scoring& how, float* out) {
  Attention a;
  a.B = B, a.T = T, a.N = N, a.H = kept.H, a.stride = stride;
  a.S = kept.S, a.K = kept.K, a.C = kept.C;
  a.q = q, a.k = cache.k.untyped_data(), a.v = cache.v.untyped_data();
  a.k_scale = cache.k_scales(), a.v_scale = cache.v_scales();
  a.slots = places.slots_or_null(), a.positions = places.positions.typed_data(), a.out = out;
  a.sinks = is_empty(how.sinks) ? nullptr : how.sinks.typed_data();
  a.scale = how.scale, a.softcap = how.softcap, a.window = how.window;
  a.tokens = std::clamp<int64_t>(T, 1, 16);
  const int64_t items = B * a.K * ((T + a.tokens - 1) / a.tokens);
  parallel_for(pool, items, 1, [&](int64_t first, int64_t last) { kernels->attend(a, first, last); });
}

ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::F32> k_scale,
                  ffi::Buffer<ffi::F32> v_scale, ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::S32> slots,
                  ffi::Buffer<ffi::S32> positions, ffi::ResultBuffer<ffi::F32> out, float scale, float softcap, int64_t window) {
  const Cache cache{k, v, k_scale, v_scale};
  const Places places{slots, positions};
  const Scoring how{sinks, scale, softcap, window};
  CacheShape kept;
  if (const char* what = cache.read(&kept)) return failed("realm_attention", what);
  auto shape = q.dimensions();
  if (shape.size() != 4 || shape[3] != kept.H || shape[2] % kept.K != 0 || !has_shape(*out, {shape[0], shape[1], shape[2], shape[3]}))
    return invalid("realm_attention: heads do not fit the cache");
  if (!places.fit(shape[0], shape[1], kept.S)) return invalid("realm_attention: positions or slots do not fit the queries");
  if (!how.fits(shape[2])) return invalid("realm_attention: sinks do not fit the queries");
  attend_to(pool, q.typed_data(), shape[0], shape[1], shape[2], shape[2] * shape[3], cache, kept, places, how, out->typed_data());
  return ffi::Error::Success();
}

// Keys or values written in place: the results are the operands' memory.
ffi::Error write(ffi::ThreadPool pool, const ffi::Buffer<ffi::F32>& x, const Places& places, const ffi::AnyBuffer& operand,
                 void* cache, float* scales, bool is_keys) {
  CacheShape kept;
  auto shape = x.dimensions();
  if (!read_shape(operand, is_keys, &kept) || operand.untyped_data() != cache)
    return invalid("realm_cache_write: this is no cache of whole blocks of 64 positions, or not written in place");
  if (shape.size() != 4 || shape[2] != kept.K || shape[3] != kept.H) return invalid("realm_cache_write: heads do not fit the cache");
  if (!places.fit(shape[0], shape[1], kept.S)) return invalid("realm_cache_write: positions or slots do not fit the rows");
  CacheWrite c{x.typed_data(), places.slots_or_null(), places.positions.typed_data(), cache, scales,
               shape[1], kept.K, kept.S, kept.C, kept.H, kept.K * kept.H, is_keys};
  const int64_t tokens = shape[0] * shape[1];
  parallel_for(pool, tokens, grain_of(tokens, c.K * c.H), [&](int64_t first, int64_t last) { kernels->write(c, first, last); });
  return ffi::Error::Success();
}

ffi::Error write_half(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> positions,
                      ffi::AnyBuffer cache, ffi::Result<ffi::AnyBuffer> written, bool is_keys) {
  if (cache.element_type() != ffi::U32) return invalid("realm_cache_write: bf16 is kept in pairs");
  return write(pool, x, {slots, positions}, cache, written->untyped_data(), nullptr, is_keys);
}

ffi::Error write_codes(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> positions,
                       ffi::AnyBuffer cache, ffi::Buffer<ffi::F32> scales, ffi::Result<ffi::AnyBuffer> written,
                       ffi::ResultBuffer<ffi::F32> written_scales) {
  auto kept = cache.dimensions();
  if (cache.element_type() != ffi::S8 || kept.size() != 4 || !has_shape(scales, {kept[0], kept[1], kept[2]}))
    return invalid("realm_cache_write: int8 has a scale for each position");
  if (scales.typed_data() != written_scales->typed_data()) return invalid("realm_cache_write: scales are not written in place");
  return write(pool, x, {slots, positions}, cache, written->untyped_data(), written_scales->typed_data(), true);
}

// Whether the results are the operands' memory, array by array.
bool is_in_place(const Cache& cache, ffi::RemainingRets& written) {
  const void* kept[] = {cache.k.untyped_data(), cache.v.untyped_data(), cache.k_scale.untyped_data(), cache.v_scale.untyped_data()};
  if (written.size() != (cache.is_int8() ? 4 : 2)) return false;
  for (size_t i = 0; i < written.size(); i++) {
    auto each = written.get<ffi::AnyBuffer>(i);
    if (!each.has_value() || (*each)->untyped_data() != kept[i]) return false;
  }
  return true;
}

// The heads [B, T, N + 2 K, H] of new tokens: queries and keys turned, keys and values written in place, then
// attended to. One call and not seven: at one token a sequence, what lies between calls takes as long as they.
ffi::Error extend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> heads, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                  ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> positions, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale, ffi::Buffer<ffi::F32> sinks,
                  ffi::ResultBuffer<ffi::F32> out, ffi::RemainingRets written, bool interleaved, float scale, float softcap,
                  int64_t window) {
  const Cache cache{k, v, k_scale, v_scale};
  const Places places{slots, positions};
  const Scoring how{sinks, scale, softcap, window};
  CacheShape kept;
  if (const char* what = cache.read(&kept)) return failed("realm_extend", what);
  if (!is_in_place(cache, written)) return invalid("realm_extend: the cache is not written in place");
  auto shape = heads.dimensions();
  const int64_t K = kept.K, H = kept.H;
  if (shape.size() != 4 || shape[3] != H || shape[2] <= 2 * K || shape[2] % K != 0 || !has_shape(*out, {shape[0], shape[1], shape[2] - 2 * K, H}))
    return invalid("realm_extend: heads do not fit the cache");
  const int64_t B = shape[0], T = shape[1], N = shape[2] - 2 * K, tokens = B * T;
  if (!places.fit(B, T, kept.S)) return invalid("realm_extend: positions or slots do not fit the heads");
  if (!how.fits(N)) return invalid("realm_extend: sinks do not fit the heads");
  const int64_t pairs = cos.dimensions().size() == 3 ? cos.dimensions()[2] : 0;
  if (2 * pairs > H || !has_shape(cos, {B, T, pairs}) || !has_shape(sin, {B, T, pairs}))
    return invalid("realm_extend: the turns do not fit the heads");
  const int64_t stride = (N + 2 * K) * H, turned_stride = (N + K) * H;
  auto* turned = static_cast<float*>(shared_scratch(static_cast<size_t>(4 * tokens * turned_stride)));
  const float* x = heads.typed_data();
  const int32_t *rows = places.slots_or_null(), *at = positions.typed_data();
  const Rope turn{x, cos.typed_data(), sin.typed_data(), turned, stride, N + K, H, pairs, interleaved};
  const CacheWrite keys{turned + N * H, rows, at, k.untyped_data(), cache.k_scales(), T, K, kept.S, kept.C, H, turned_stride, true};
  const CacheWrite values{x + turned_stride, rows, at, v.untyped_data(), cache.v_scales(), T, K, kept.S, kept.C, H, stride, false};
  parallel_for(pool, tokens, grain_of(tokens, stride), [&](int64_t first, int64_t last) {
    kernels->rotate(turn, first, last);
    kernels->write(keys, first, last);
    kernels->write(values, first, last);
  });
  attend_to(pool, turned, B, T, N, turned_stride, cache, kept, places, how, out->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace realm

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_attention, realm::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_cache_write, realm::write_half,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("is_keys"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_cache_write_int8, realm::write_codes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_extend, realm::extend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets()
                                  .Attr<bool>("interleaved")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
