// Every kernel of every instruction set of this machine, on random shapes and buffers of exactly their sizes;
// built with sanitizers. Results must depend neither on what memory held before nor on how work is divided.
// Usage: native_sanitized CASES SEED
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "kernels.h"

namespace realm {
extern const Kernels avx512bf16_kernels, avx512_kernels, avx2_kernels, neon_kernels;
}

extern "C" bool realm_tile(int kind, const uint8_t* data, int64_t rows, int64_t inputs, uint8_t* records, int64_t record,
                           int64_t first, int64_t last);

using namespace realm;

static std::mt19937_64 generator;
static unsigned char before = 0;  // what fresh memory holds

static int64_t from(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
static bool maybe() { return from(0, 1) == 1; }
static float number() { return std::normal_distribution<float>()(generator); }

// A buffer of its own on the heap: one byte past its end is an error.
template <class T>
struct Buffer {
  size_t size;
  T* data;
  explicit Buffer(int64_t count) : size(static_cast<size_t>(count) * sizeof(T)), data(static_cast<T*>(std::malloc(size))) {
    clear();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  void clear() { std::memset(static_cast<void*>(data), before, size); }
  template <class Draw>
  Buffer& fill(Draw draw) {
    for (size_t i = 0; i < size / sizeof(T); i++) data[i] = draw();
    return *this;
  }
  std::vector<unsigned char> bytes() const {
    auto* first = reinterpret_cast<const unsigned char*>(data);
    return {first, first + size};
  }
};

static uint16_t bf16() {
  float x = number();
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}
static uint16_t small_half() { return static_cast<uint16_t>(from(0, 1) << 15 | from(0x2800, 0x3c00)); }
static uint8_t byte() { return static_cast<uint8_t>(from(0, 255)); }

void* realm::scratch(size_t bytes) {
  static void* kept = nullptr;
  std::free(kept);
  if (posix_memalign(&kept, 64, bytes) != 0) std::abort();
  return std::memset(kept, before, bytes);
}

using Part = std::function<void(int64_t, int64_t)>;

static void in_parts(int64_t count, const Part& part) {
  for (int64_t first = 0; first < count;) {
    const int64_t last = from(first + 1, count);
    part(first, last);
    first = last;
  }
}

// Runs once as a whole on memory of zeros, once in parts on memory of ones.
template <class T, class Run>
static bool same(Buffer<T>& result, const Run& run) {
  before = 0;
  result.clear();
  run([](int64_t count, const Part& part) { part(0, count); });
  const auto whole = result.bytes();
  before = 0xff;
  result.clear();
  run(in_parts);
  before = 0;
  return whole == result.bytes();
}

static bool product(const Kernels& kernels) {
  Weights w{};
  w.group = maybe() ? 16 : 32;
  w.super_group = w.group << from(0, w.group == 16 ? 4 : 3);
  w.inputs = std::lcm(w.super_group, BLOCK) * from(1, 4);
  w.outputs = from(1, 50);
  w.is_4bit = maybe(), w.is_float32 = maybe(), w.has_bytes = maybe(), w.has_minimum = maybe();
  const bool has_table = w.is_4bit && maybe();
  Buffer<uint8_t> table(LANES);
  if (has_table) w.table = table.fill(byte).data;
  const int64_t tiles = (w.outputs + LANES - 1) / LANES, M = from(1, 20);
  Buffer<uint8_t> records(tiles * w.record());
  records.fill(byte);
  for (int64_t tile = 0; tile < tiles; tile++)  // super-scales that are numbers
    for (int i = 0; i <= w.has_minimum; i++) {
      uint8_t* at = records.data + tile * w.record() + w.code_bytes() + i * w.factor_bytes();
      for (int64_t n = 0; n < w.inputs / w.super_group * LANES; n++) {
        const float full = number();
        const uint16_t half = small_half();
        w.is_float32 ? std::memcpy(at + 4 * n, &full, 4) : std::memcpy(at + 2 * n, &half, 2);
      }
    }
  w.records = records.data;
  const int64_t groups = M * w.inputs / w.group;
  Buffer<float> x(M * w.inputs), scales(M * w.inputs / BLOCK), sums(groups), y(M * w.outputs);
  Buffer<int8_t> codes(M * w.inputs);
  Buffer<int32_t> starts(groups);
  x.fill(number);
  if (maybe()) x.data[from(0, M * w.inputs - 1)] = maybe() ? INFINITY : NAN;
  Product p{};
  p.weights = w, p.y = y.data, p.count = M;
  p.rows.x = x.data, p.rows.codes = codes.data, p.rows.scales = scales.data;
  p.rows.sums = sums.data, p.rows.starts = starts.data;
  p.rows.inputs = w.inputs, p.rows.group = w.group;
  p.rows.offset = static_cast<int32_t>(w.is_4bit && !has_table ? from(0, 15) : 128);
  return same(y, [&](auto divide) {
    codes.clear(), scales.clear(), sums.clear(), starts.clear();
    divide(M, [&](int64_t first, int64_t last) { kernels.quantize(p.rows, first, last); });
    divide(tiles, [&](int64_t first, int64_t last) { kernels.multiply(p, first, last); });
  });
}

static bool half_product(const Kernels& kernels) {
  const int64_t M = from(1, 20), inputs = BLOCK * from(1, 20), outputs = from(1, 40);
  Buffer<uint16_t> weight(outputs * inputs);
  Buffer<uint32_t> pairs(M * inputs / 2);
  Buffer<float> x(M * inputs), y(M * outputs);
  weight.fill(bf16), x.fill(number);
  HalfProduct p{weight.data, pairs.data, x.data, y.data, M, outputs, inputs};
  return same(y, [&](auto divide) {
    pairs.clear();
    divide(M, [&](int64_t first, int64_t last) { kernels.to_pairs(p, first, last); });
    divide(outputs, [&](int64_t first, int64_t last) { kernels.multiply_half(p, first, last); });
  });
}

static bool norm(const Kernels& kernels) {
  const int64_t M = from(1, 6), features = from(1, 200);
  Buffer<float> x(M * features), scale(features), y(M * features);
  x.fill(number), scale.fill(number);
  Norm n{x.data, scale.data, y.data, features, 1e-5f};
  return same(y, [&](auto divide) {
    divide(M, [&](int64_t first, int64_t last) { kernels.normalize(n, first, last); });
  });
}

static bool turn(const Kernels& kernels) {
  const int64_t M = from(1, 6), heads = from(1, 4), H = from(1, 70), pairs = from(0, H / 2);
  Buffer<float> x(M * heads * H), cos(M * pairs), sin(M * pairs), y(M * heads * H);
  x.fill(number), cos.fill(number), sin.fill(number);
  Rope r{x.data, cos.data, sin.data, y.data, heads * H, heads, H, pairs, maybe()};
  return same(y, [&](auto divide) {
    divide(M, [&](int64_t first, int64_t last) { kernels.rotate(r, first, last); });
  });
}

// All types that the library knows; its padding is not written.
static bool tiles(const Kernels&) {
  const struct { int kind; int64_t elements, bytes, group; bool is_4bit, has_bytes, has_minimum; } all[] = {
      {2, 32, 18, 32, true, false, false},  {3, 32, 20, 32, true, false, true},  {6, 32, 22, 32, false, false, false},
      {7, 32, 24, 32, false, false, true},  {8, 32, 34, 32, false, false, false}, {12, 256, 144, 32, true, true, true},
      {13, 256, 176, 32, false, true, true}, {14, 256, 210, 16, false, true, false}};
  for (const auto& form : all) {
    Weights w{};
    w.outputs = from(1, 40), w.inputs = form.elements * from(1, 4), w.group = form.group, w.super_group = form.elements;
    w.is_4bit = form.is_4bit, w.has_bytes = form.has_bytes, w.has_minimum = form.has_minimum;
    const int64_t count = (w.outputs + LANES - 1) / LANES;
    Buffer<uint8_t> data(w.outputs * w.inputs / form.elements * form.bytes), records(count * w.record());
    data.fill(byte);
    const int64_t used = w.code_bytes() + w.factor_bytes() * (w.has_minimum ? 2 : 1);
    bool good = true;
    const bool is_same = same(records, [&](auto divide) {
      divide(count, [&](int64_t first, int64_t last) {
        good &= realm_tile(form.kind, data.data, w.outputs, w.inputs, records.data, w.record(), first, last);
      });
      for (int64_t tile = 0; tile < count; tile++)
        std::memset(records.data + tile * w.record() + used, 0, static_cast<size_t>(w.record() - used));
    });
    if (!good || !is_same) return false;
  }
  return true;
}

template <class Number>
static bool cache_write(const Kernels& kernels) {
  const int64_t B = from(1, 4), T = from(1, 20);
  CacheWrite c{};
  c.T = T, c.K = from(1, 3), c.S = from(1, 4), c.C = SPAN * from(1, 2);
  c.H = sizeof(Number) == 1 ? from(1, 70) : LANES * from(1, 5), c.is_keys = maybe(), c.stride = c.K * c.H;
  Buffer<float> x(B * T * c.K * c.H), scales(c.S * c.K * c.C);
  Buffer<Number> cache(c.S * c.K * c.C * c.H);
  Buffer<int32_t> slots(B), positions(B * T);
  x.fill(number), slots.fill([&] { return static_cast<int32_t>(from(-1, c.S)); });
  positions.fill([&] { return static_cast<int32_t>(from(-2, c.C + 2)); });
  c.x = x.data, c.positions = positions.data, c.slots = maybe() ? slots.data : nullptr;
  c.cache = cache.data, c.scales = sizeof(Number) == 1 ? scales.data : nullptr;
  return same(cache, [&](auto divide) {
    scales.fill([] { return 7.0f; }), cache.fill([] { return Number{7}; });
    divide(B * T, [&](int64_t first, int64_t last) { kernels.write(c, first, last); });
  });
}

template <class Number, class Draw>
static bool attention(const Kernels& kernels, const Draw& draw) {
  Attention a{};
  a.B = from(1, 3), a.T = maybe() ? 1 : from(1, 40), a.K = from(1, 3), a.N = a.K * from(1, 5);
  a.S = from(1, 4), a.C = SPAN * from(1, 4), a.H = sizeof(Number) == 1 && maybe() ? from(1, 70) : LANES * from(1, 10);
  a.scale = 0.3f, a.softcap = maybe() ? 20 : 0, a.window = maybe() ? from(1, 150) : 0;
  a.tokens = a.T < 16 ? a.T : from(1, 16), a.stride = a.N * a.H;
  Buffer<float> q(a.B * a.T * a.N * a.H), out(a.B * a.T * a.N * a.H), k_scale(a.S * a.K * a.C), v_scale(a.S * a.K * a.C);
  Buffer<Number> k(a.S * a.K * a.C * a.H), v(a.S * a.K * a.C * a.H);
  Buffer<int32_t> slots(a.B), positions(a.B * a.T);
  q.fill(number), k.fill(draw), v.fill(draw), k_scale.fill(number), v_scale.fill(number);
  slots.fill([&] { return static_cast<int32_t>(from(-1, a.S)); });
  positions.fill([&] { return static_cast<int32_t>(from(-2, a.C + 2)); });
  a.q = q.data, a.k = k.data, a.v = v.data, a.positions = positions.data, a.out = out.data;
  a.slots = maybe() ? slots.data : nullptr;
  if (sizeof(Number) == 1) a.k_scale = k_scale.data, a.v_scale = v_scale.data;
  Buffer<float> sinks(a.N);
  sinks.fill(number);
  a.sinks = maybe() ? sinks.data : nullptr;
  return same(out, [&](auto divide) {
    const int64_t items = a.B * a.K * ((a.T + a.tokens - 1) / a.tokens);
    divide(items, [&](int64_t first, int64_t last) { kernels.attend(a, first, last); });
  });
}

static bool low_rank(const Kernels& kernels) {
  LowRank p{};
  const int64_t rows = from(1, 4), outputs[] = {from(1, 40), from(1, 40), from(1, 40)};
  p.tokens = maybe() ? 1 : from(1, 20), p.adapters = from(1, 4), p.slots = from(1, 4), p.inputs = 2 * from(1, 60);
  p.parts = from(1, 3), p.rank = LANES * from(1, 3), p.start = 2 * from(0, 9), p.projections = from(1, 3);
  p.projection = from(0, p.projections - 1), p.outputs = outputs;
  for (int64_t part = 0; part < p.parts; part++) p.width += outputs[part], p.columns += (outputs[part] + LANES - 1) / LANES * LANES;
  p.stride = p.start + p.rank * (p.inputs * p.parts + p.columns) + 2 * from(0, 9);
  const int64_t M = rows * p.tokens;
  Buffer<float> x(M * p.inputs), y(M * p.width), scale(rows * p.adapters);
  Buffer<uint16_t> bank(p.slots * p.stride);
  Buffer<int32_t> ranks(p.slots * p.projections), index(rows * p.adapters), order(M);
  x.fill(number), scale.fill(number), bank.fill(bf16);
  ranks.fill([&] { return static_cast<int32_t>(from(-1, p.rank + 1)); });
  index.fill([&] { return static_cast<int32_t>(from(-1, p.slots)); });
  std::iota(order.data, order.data + M, 0), std::shuffle(order.data, order.data + M, generator);
  p.order = order.data, p.x = x.data, p.y = y.data, p.bank = bank.data, p.ranks = ranks.data, p.index = index.data, p.scale = scale.data;
  return same(y, [&](auto divide) {
    y.fill([] { return 0.5f; });
    divide(M, [&](int64_t first, int64_t last) { kernels.add_low_rank(p, first, last); });
  });
}

static bool run(const Kernels& kernels, long cases) {
  for (long i = 0; i < cases; i++) {
    const std::pair<const char*, bool> good[] = {
        {"product", product(kernels)},
        {"bf16 product", half_product(kernels)},
        {"norm", norm(kernels)},
        {"rotation", turn(kernels)},
        {"tiles", tiles(kernels)},
        {"bf16 attention", attention<uint16_t>(kernels, bf16)},
        {"int8 attention", attention<int8_t>(kernels, [] { return static_cast<int8_t>(from(-127, 127)); })},
        {"bf16 cache", cache_write<uint16_t>(kernels)},
        {"int8 cache", cache_write<int8_t>(kernels)},
        {"low rank", low_rank(kernels)}};
    for (const auto& [what, is_same] : good)
      if (!is_same) return std::printf("%s, case %ld: %s has other bits\n", kernels.name, i, what), false;
  }
  return std::printf("%s: %ld cases\n", kernels.name, cases), true;
}

static std::vector<const Kernels*> usable() {
#ifdef __aarch64__
  return {&neon_kernels};
#else
  std::vector<const Kernels*> all;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&avx2_kernels);
  if (has_avx512) all.push_back(&avx512_kernels);
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) all.push_back(&avx512bf16_kernels);
  return all;
#endif
}

int main(int, char** arguments) {
  const long cases = std::atol(arguments[1]), seed = std::atol(arguments[2]);
  for (const Kernels* kernels : usable()) {
    generator.seed(static_cast<uint64_t>(seed));
    if (!run(*kernels, cases)) return 1;
  }
  return 0;
}
