// The operations as XLA custom calls: arguments checked, work divided over XLA's threads. Products are in
// ffi_matmul.cpp, those of the cache in ffi_cache.cpp.
#include "ffi.h"

#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

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
void* shared_scratch(size_t bytes) { return shared.at_least(bytes); }

const Kernels* kernels = nullptr;

namespace {

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
  Rope r{x.typed_data(), cos.typed_data(), sin.typed_data(), y->typed_data(), heads * H, heads, H, pairs, interleaved};
  parallel_for(pool, tokens, grain_of(tokens, heads * H), [&](int64_t first, int64_t last) { kernels->rotate(r, first, last); });
  return ffi::Error::Success();
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

namespace ffi = xla::ffi;

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
