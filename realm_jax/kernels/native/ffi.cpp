// The operations as XLA custom calls: arguments checked, work divided over XLA's threads.
#include "xla/ffi/api/ffi.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "parallel.h"

namespace ffi = xla::ffi;

namespace realm {

extern const Kernels avx512bf16_kernels, avx512_kernels, avx2_kernels, neon_kernels;

namespace {

// Memory that grows and stays.
struct Memory {
  void* data = nullptr;
  size_t size = 0;
  ~Memory() { std::free(data); }

  void* at_least(size_t bytes) {
    if (size < bytes) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, size);
      if (data == nullptr) std::abort();  // a few megabytes: nothing can go on without them
    }
    return data;
  }
};

thread_local Memory own, shared;

}  // namespace

void* scratch(size_t bytes) { return own.at_least(bytes); }

const Kernels* kernels = nullptr;  // chosen by realm_select

namespace {

// Numbers that one part of the work has at least: below, a second thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 15;

// How many of `count` things, of so many numbers `each`, are a part: about 64 parts, for a thread may be slow.
int64_t grain_of(int64_t count, int64_t each) {
  const int64_t least = (GRAIN + each - 1) / each, many = count / 64;
  return least > many ? least : many;
}

// The same for weights that meet few rows: two parts a thread, as memory is fastest where it is read on and on.
int64_t stream_of(const ffi::ThreadPool& pool, int64_t count, int64_t each) {
  const int64_t least = (GRAIN + each - 1) / each, many = count / (2 * std::max<int64_t>(pool.num_threads(), 1));
  return least > many ? least : many;
}

ffi::Error invalid(const char* what) { return ffi::Error::InvalidArgument(what); }

template <class Buffer>
bool has_shape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  auto dimensions = buffer.dimensions();
  return dimensions.size() == shape.size() && std::equal(shape.begin(), shape.end(), dimensions.begin());
}

template <class Buffer>
bool is_empty(const Buffer& buffer) {
  return buffer.element_count() == 0;
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> tiles, ffi::ResultBuffer<ffi::F32> y,
                    int64_t group, int64_t super_group, int64_t bits, int64_t offset, ffi::Span<const uint8_t> table,
                    bool is_float32, bool has_bytes, bool has_minimum) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2) return invalid("realm_matmul: x and y must be matrices");
  const int64_t M = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  const int64_t count = (outputs + LANES - 1) / LANES;
  if (bits != 4 && bits != 8) return invalid("realm_matmul: codes have 4 or 8 bits");
  if (table.size() != 0 && (table.size() != 16 || bits != 4)) return invalid("realm_matmul: a table is of 16 codes, for 4-bit indices");
  if (super_group <= 0 || (group != 16 && group != 32) || super_group % group != 0 || inputs % BLOCK != 0 || inputs % super_group != 0)
    return invalid("realm_matmul: inputs are no whole groups");
  Product p;
  p.weights = {tiles.typed_data(), outputs, inputs, group, super_group, table.size() == 16 ? table.begin() : nullptr,
               bits == 4, is_float32, has_bytes, has_minimum};
  if (!has_shape(tiles, {count, p.weights.record()}) || !has_shape(*y, {M, outputs}))
    return invalid("realm_matmul: the tiles do not fit x and y");
  const int64_t scales = M * (inputs / BLOCK), sums = M * (inputs / group);
  auto* memory = static_cast<float*>(shared.at_least(static_cast<size_t>(4 * (scales + 2 * sums) + M * inputs)));
  p.rows = {x.typed_data(), reinterpret_cast<int8_t*>(memory + scales + 2 * sums), memory, memory + scales,
            reinterpret_cast<int32_t*>(memory + scales + sums), inputs, group, static_cast<int32_t>(offset)};
  p.y = y->typed_data();
  p.count = M;
  parallel_for(pool, M, grain_of(M, inputs), [&](int64_t first, int64_t last) { kernels->quantize(p.rows, first, last); });
  const int64_t grain = M < 8 ? stream_of(pool, count, inputs * LANES) : grain_of(count, inputs * LANES * (M / 4));
  parallel_for(pool, count, grain, [&](int64_t first, int64_t last) { kernels->multiply(p, first, last); });
  return ffi::Error::Success();
}

ffi::Error multiply_half(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight,
                         ffi::ResultBuffer<ffi::F32> y) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2) return invalid("realm_matmul_bf16: x and y must be matrices");
  const int64_t M = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  if (inputs % BLOCK != 0) return invalid("realm_matmul_bf16: inputs must be a multiple of 32");
  if (weight.element_type() != ffi::BF16 || !has_shape(weight, {outputs, inputs}) || !has_shape(*y, {M, outputs})) return invalid("realm_matmul_bf16: the weight does not fit x and y");
  auto* pairs = static_cast<uint32_t*>(shared.at_least(static_cast<size_t>(2 * M * inputs)));
  HalfProduct p{static_cast<const uint16_t*>(weight.untyped_data()), pairs, x.typed_data(), y->typed_data(), M, outputs, inputs};
  parallel_for(pool, M, grain_of(M, inputs), [&](int64_t first, int64_t last) { kernels->to_pairs(p, first, last); });
  const int64_t grain = ((M < 8 ? stream_of(pool, outputs, inputs) : grain_of(outputs, inputs * (M / 4))) + 3) / 4 * 4;
  parallel_for(pool, outputs, grain, [&](int64_t first, int64_t last) { kernels->multiply_half(p, first, last); });
  return ffi::Error::Success();
}

ffi::Error normalize(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> y, float eps) {
  const int64_t features = static_cast<int64_t>(scale.element_count());
  if (features == 0 || x.dimensions().size() == 0 || x.dimensions().back() != features || y->element_count() != x.element_count())
    return invalid("realm_rms_norm: the factors do not fit the rows");
  const int64_t rows = static_cast<int64_t>(x.element_count()) / features;
  Norm n{x.typed_data(), scale.typed_data(), y->typed_data(), features, eps};
  parallel_for(pool, rows, grain_of(rows, features), [&](int64_t first, int64_t last) { kernels->normalize(n, first, last); });
  return ffi::Error::Success();
}

ffi::Error rotate(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                  ffi::ResultBuffer<ffi::F32> y, bool interleaved) {
  auto shape = x.dimensions();
  if (shape.size() != 4 || cos.dimensions().size() != 3) return invalid("realm_rotate: heads are [B, T, N, H], turns [B, T, P]");
  const int64_t tokens = shape[0] * shape[1], heads = shape[2], H = shape[3], pairs = cos.dimensions()[2];
  if (2 * pairs > H || !has_shape(cos, {shape[0], shape[1], pairs}) || !has_shape(sin, {shape[0], shape[1], pairs}) ||
      !has_shape(*y, {shape[0], shape[1], heads, H}))
    return invalid("realm_rotate: the turns do not fit the heads");
  Rope r{x.typed_data(), cos.typed_data(), sin.typed_data(), y->typed_data(), heads, H, pairs, interleaved};
  parallel_for(pool, tokens, grain_of(tokens, heads * H), [&](int64_t first, int64_t last) { kernels->rotate(r, first, last); });
  return ffi::Error::Success();
}

// A cache's [S, K, C, H]; false where it has another form.
struct CacheShape {
  int64_t S, K, C, H;
};

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

ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::F32> k_scale,
                  ffi::Buffer<ffi::F32> v_scale, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> positions,
                  ffi::ResultBuffer<ffi::F32> out, float scale, float softcap, int64_t window) {
  CacheShape keys, values;
  if (!read_shape(k, true, &keys) || !read_shape(v, false, &values) || k.element_type() != v.element_type() ||
      keys.S != values.S || keys.K != values.K || keys.C != values.C || keys.H != values.H)
    return invalid("realm_attention: keys and values are no cache of whole blocks of 64 positions");
  auto shape = q.dimensions();
  if (shape.size() != 4 || shape[3] != keys.H || shape[2] % keys.K != 0 || !has_shape(*out, {shape[0], shape[1], shape[2], shape[3]}))
    return invalid("realm_attention: heads do not fit the cache");
  if (!has_shape(positions, {shape[0], shape[1]}) || !(is_empty(slots) ? shape[0] <= keys.S : has_shape(slots, {shape[0]})))
    return invalid("realm_attention: positions or slots do not fit the queries");
  const bool is_int8 = k.element_type() == ffi::S8;
  for (const auto* each : {&k_scale, &v_scale})
    if (!(is_int8 ? has_shape(*each, {keys.S, keys.K, keys.C}) : is_empty(*each)))
      return invalid("realm_attention: int8 has a scale for each position, bf16 none");
  Attention a;
  a.B = shape[0], a.T = shape[1], a.N = shape[2], a.H = shape[3];
  a.S = keys.S, a.K = keys.K, a.C = keys.C;
  a.q = q.typed_data(), a.k = k.untyped_data(), a.v = v.untyped_data();
  a.k_scale = is_int8 ? k_scale.typed_data() : nullptr;
  a.v_scale = is_int8 ? v_scale.typed_data() : nullptr;
  a.slots = is_empty(slots) ? nullptr : slots.typed_data();
  a.positions = positions.typed_data(), a.out = out->typed_data();
  a.scale = scale, a.softcap = softcap, a.window = window;
  a.tokens = a.T < 16 ? a.T : 16;
  const int64_t items = a.B * a.K * ((a.T + a.tokens - 1) / a.tokens);
  parallel_for(pool, items, 1, [&](int64_t first, int64_t last) { kernels->attend(a, first, last); });
  return ffi::Error::Success();
}

// Keys or values written in place: the results are the operands' memory.
ffi::Error write(ffi::ThreadPool pool, const ffi::Buffer<ffi::F32>& x, const ffi::Buffer<ffi::S32>& slots,
                 const ffi::Buffer<ffi::S32>& positions, const ffi::AnyBuffer& operand, void* cache, float* scales, bool is_keys) {
  CacheShape kept;
  auto shape = x.dimensions();
  if (!read_shape(operand, is_keys, &kept) || operand.untyped_data() != cache)
    return invalid("realm_cache_write: this is no cache of whole blocks of 64 positions, or not written in place");
  if (shape.size() != 4 || shape[2] != kept.K || shape[3] != kept.H) return invalid("realm_cache_write: heads do not fit the cache");
  if (!has_shape(positions, {shape[0], shape[1]}) || !(is_empty(slots) ? shape[0] <= kept.S : has_shape(slots, {shape[0]})))
    return invalid("realm_cache_write: positions or slots do not fit the rows");
  CacheWrite c{x.typed_data(), is_empty(slots) ? nullptr : slots.typed_data(), positions.typed_data(),
               cache, scales, shape[1], kept.K, kept.S, kept.C, kept.H, is_keys};
  const int64_t tokens = shape[0] * shape[1];
  parallel_for(pool, tokens, grain_of(tokens, c.K * c.H), [&](int64_t first, int64_t last) { kernels->write(c, first, last); });
  return ffi::Error::Success();
}

ffi::Error write_half(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> positions,
                      ffi::AnyBuffer cache, ffi::Result<ffi::AnyBuffer> written, bool is_keys) {
  if (cache.element_type() != ffi::U32) return invalid("realm_cache_write: bf16 is kept in pairs");
  return write(pool, x, slots, positions, cache, written->untyped_data(), nullptr, is_keys);
}

ffi::Error write_codes(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> positions,
                       ffi::AnyBuffer cache, ffi::Buffer<ffi::F32> scales, ffi::Result<ffi::AnyBuffer> written,
                       ffi::ResultBuffer<ffi::F32> written_scales) {
  auto kept = cache.dimensions();
  if (cache.element_type() != ffi::S8 || kept.size() != 4 || !has_shape(scales, {kept[0], kept[1], kept[2]}))
    return invalid("realm_cache_write: int8 has a scale for each position");
  if (scales.typed_data() != written_scales->typed_data()) return invalid("realm_cache_write: scales are not written in place");
  return write(pool, x, slots, positions, cache, written->untyped_data(), written_scales->typed_data(), true);
}

// Number i of what this processor can run, best first.
const Kernels* usable(int i) {
  struct Set {
    bool is_there;
    const Kernels* kernels;
  };
#if defined(__aarch64__)
#if defined(__linux__)
  const bool has_dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  const bool has_dot = true;  // Apple's have it
#endif
  const Set all[] = {{has_dot, &neon_kernels}};
#else
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const Set all[] = {{has_avx512 && __builtin_cpu_supports("avx512bf16"), &avx512bf16_kernels},
                     {has_avx512, &avx512_kernels},
                     {has_avx2, &avx2_kernels}};
#endif
  for (const Set& each : all)
    if (each.is_there && i-- == 0) return each.kernels;
  return nullptr;
}

}  // namespace
}  // namespace realm

// The instruction set from now on: the one of this name, or, without a name, the best. Null: there is none.
extern "C" const char* realm_select(const char* name) {
  for (int i = 0; const realm::Kernels* found = realm::usable(i); i++)
    if (name == nullptr || std::strcmp(name, found->name) == 0) {
      realm::kernels = found;
      return found->name;
    }
  return nullptr;
}

// The version of the interface this was built for: XLA refuses one that is newer than its own.
extern "C" int realm_ffi_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_matmul, realm::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("super_group")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("offset")
                                  .Attr<ffi::Span<const uint8_t>>("table")
                                  .Attr<bool>("is_float32")
                                  .Attr<bool>("has_bytes")
                                  .Attr<bool>("has_minimum"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_matmul_bf16, realm::multiply_half,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_rms_norm, realm::normalize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_rotate, realm::rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("interleaved"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_attention, realm::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
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
