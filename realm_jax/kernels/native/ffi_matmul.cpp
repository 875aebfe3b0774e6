// Products as XLA custom calls: by one matrix, or each tile of rows by the matrix of its expert.
#include "ffi.h"

#include <cstring>
#include <vector>

namespace realm {
namespace {

// Rows that meet the same matrix.
struct Run {
  int64_t first, count, matrix;
};

// Tiles of M rows, neighbours of one expert together. Rows of tiles without an expert are in no run.
bool read_runs(const ffi::Buffer<ffi::S32>& expert, int64_t M, int64_t experts, std::vector<Run>* runs) {
  for (int64_t t = 0; t < static_cast<int64_t>(expert.element_count()); t++) {
    const int64_t e = expert.typed_data()[t];
    if (e < -1 || e >= experts) return false;
    if (e < 0) continue;
    if (!runs->empty() && runs->back().matrix == e && runs->back().first + runs->back().count == t * M)
      runs->back().count += M;
    else
      runs->push_back({t * M, M, e});
  }
  return true;
}

int64_t rows_of(const std::vector<Run>& runs) {
  int64_t rows = 0;
  for (const Run& run : runs) rows += run.count;
  return rows;
}

// body(run, first, last) of the outputs of every run; a part has outputs of one run or of neighbours.
template <class Body>
void for_outputs(ffi::ThreadPool& pool, const std::vector<Run>& runs, int64_t outputs, int64_t each, int64_t multiple, const Body& body) {
  const int64_t many = static_cast<int64_t>(runs.size()), all = many * outputs;
  const int64_t rows = many == 0 ? 0 : rows_of(runs) / many;
  const int64_t grain = rows < 8 ? stream_of(pool, all, each) : grain_of(all, each * (rows / 4));
  parallel_for(pool, all, (grain + multiple - 1) / multiple * multiple, [&](int64_t first, int64_t last) {
    for (int64_t r = first / outputs; first < last; r++) {
      const int64_t end = std::min(last, (r + 1) * outputs);
      body(runs[static_cast<size_t>(r)], first - r * outputs, end - r * outputs);
      first = end;
    }
  });
}

// body(first, last) of the rows of all runs.
template <class Body>
void for_rows(ffi::ThreadPool& pool, const std::vector<Run>& runs, int64_t each, const Body& body) {
  for (const Run& run : runs)
    parallel_for(pool, run.count, grain_of(run.count, each), [&](int64_t first, int64_t last) { body(run.first + first, run.first + last); });
}

// Rows of tiles without an expert are zero.
void clear_idle(const ffi::Buffer<ffi::S32>& expert, int64_t numbers, float* y) {
  for (int64_t t = 0; t < static_cast<int64_t>(expert.element_count()); t++)
    if (expert.typed_data()[t] < 0) std::memset(y + t * numbers, 0, static_cast<size_t>(numbers) * 4);
}

// What is known of weights in tiles beside their bytes.
struct Format {
  int64_t group, super_group, bits, offset;
  ffi::Span<const uint8_t> table;
  bool is_float32, has_bytes, has_minimum;

  // What is wrong with it; null where `weights` has it.
  const char* read(int64_t inputs, int64_t outputs, const uint8_t* records, Weights* weights) const {
    if (bits != 4 && bits != 8) return "codes have 4 or 8 bits";
    if (table.size() != 0 && (table.size() != 16 || bits != 4)) return "a table is of 16 codes, for 4-bit indices";
    if (super_group <= 0 || (group != 16 && group != 32) || super_group % group != 0 || inputs % BLOCK != 0 || inputs % super_group != 0)
      return "inputs are no whole groups";
    *weights = {records, outputs, inputs, group, super_group, table.size() == 16 ? table.begin() : nullptr,
                bits == 4, is_float32, has_bytes, has_minimum};
    return nullptr;
  }
};

// Rows [M, I] in all; each matrix has `count` tiles.
void multiply_runs(ffi::ThreadPool& pool, const Weights& weights, int64_t offset, const float* x, int64_t M, const std::vector<Run>& runs,
                   int64_t count, float* y) {
  const int64_t inputs = weights.inputs, group = weights.group, scales = M * (inputs / BLOCK), sums = M * (inputs / group);
  auto* memory = static_cast<float*>(shared_scratch(static_cast<size_t>(4 * (scales + 2 * sums) + M * inputs)));
  const Rows rows{x, reinterpret_cast<int8_t*>(memory + scales + 2 * sums), memory, memory + scales,
                  reinterpret_cast<int32_t*>(memory + scales + sums), inputs, group, static_cast<int32_t>(offset)};
  for_rows(pool, runs, inputs, [&](int64_t first, int64_t last) { kernels->quantize(rows, first, last); });
  for_outputs(pool, runs, count, inputs * LANES, 1, [&](const Run& run, int64_t first, int64_t last) {
    Product p{weights, rows, y + run.first * weights.outputs, run.count};
    p.weights.records += run.matrix * count * weights.record();
    p.rows.x += run.first * inputs, p.rows.codes += run.first * inputs, p.rows.scales += run.first * (inputs / BLOCK);
    p.rows.sums += run.first * (inputs / group), p.rows.starts += run.first * (inputs / group);
    kernels->multiply(p, first, last);
  });
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> tiles, ffi::ResultBuffer<ffi::F32> y,
                    int64_t group, int64_t super_group, int64_t bits, int64_t offset, ffi::Span<const uint8_t> table,
                    bool is_float32, bool has_bytes, bool has_minimum) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2) return invalid("realm_matmul: x and y must be matrices");
  const int64_t M = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  const int64_t count = (outputs + LANES - 1) / LANES;
  Weights weights;
  const Format format{group, super_group, bits, offset, table, is_float32, has_bytes, has_minimum};
  if (const char* what = format.read(inputs, outputs, tiles.typed_data(), &weights)) return failed("realm_matmul", what);
  if (!has_shape(tiles, {count, weights.record()}) || !has_shape(*y, {M, outputs})) return invalid("realm_matmul: the tiles do not fit x and y");
  multiply_runs(pool, weights, offset, x.typed_data(), M, {{0, M, 0}}, count, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error multiply_grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> tiles, ffi::Buffer<ffi::S32> expert,
                            ffi::ResultBuffer<ffi::F32> y, int64_t group, int64_t super_group, int64_t bits, int64_t offset,
                            ffi::Span<const uint8_t> table, bool is_float32, bool has_bytes, bool has_minimum) {
  if (x.dimensions().size() != 3 || y->dimensions().size() != 3 || tiles.dimensions().size() != 3)
    return invalid("realm_grouped_matmul: x and y are tiles of rows, the weights a matrix for each expert");
  const int64_t T = x.dimensions()[0], M = x.dimensions()[1], inputs = x.dimensions()[2], outputs = y->dimensions()[2];
  const int64_t experts = tiles.dimensions()[0], count = (outputs + LANES - 1) / LANES;
  Weights weights;
  const Format format{group, super_group, bits, offset, table, is_float32, has_bytes, has_minimum};
  if (const char* what = format.read(inputs, outputs, tiles.typed_data(), &weights)) return failed("realm_grouped_matmul", what);
  if (!has_shape(tiles, {experts, count, weights.record()}) || !has_shape(*y, {T, M, outputs}) || !has_shape(expert, {T}))
    return invalid("realm_grouped_matmul: the tiles do not fit x and y");
  std::vector<Run> runs;
  if (!read_runs(expert, M, experts, &runs)) return invalid("realm_grouped_matmul: there is no such expert");
  multiply_runs(pool, weights, offset, x.typed_data(), T * M, runs, count, y->typed_data());
  clear_idle(expert, M * outputs, y->typed_data());
  return ffi::Error::Success();
}

// Rows [M, I] in all, matrices [O, I].
void multiply_half_runs(ffi::ThreadPool& pool, const ffi::AnyBuffer& weight, const float* x, int64_t M, const std::vector<Run>& runs,
                        int64_t inputs, int64_t outputs, float* y) {
  auto* pairs = static_cast<uint32_t*>(shared_scratch(static_cast<size_t>(2 * M * inputs)));
  const HalfProduct all{static_cast<const uint16_t*>(weight.untyped_data()), pairs, x, y, M, outputs, inputs};
  for_rows(pool, runs, inputs, [&](int64_t first, int64_t last) { kernels->to_pairs(all, first, last); });
  for_outputs(pool, runs, outputs, inputs, 4, [&](const Run& run, int64_t first, int64_t last) {
    HalfProduct p = all;
    p.weight += run.matrix * outputs * inputs, p.pairs += run.first * (inputs / 2), p.x += run.first * inputs;
    p.y += run.first * outputs, p.count = run.count;
    kernels->multiply_half(p, first, last);
  });
}

ffi::Error multiply_half(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight, ffi::ResultBuffer<ffi::F32> y) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2) return invalid("realm_matmul_bf16: x and y must be matrices");
  const int64_t M = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  if (inputs % BLOCK != 0) return invalid("realm_matmul_bf16: inputs must be a multiple of 32");
  if (weight.element_type() != ffi::BF16 || !has_shape(weight, {outputs, inputs}) || !has_shape(*y, {M, outputs}))
    return invalid("realm_matmul_bf16: the weight does not fit x and y");
  multiply_half_runs(pool, weight, x.typed_data(), M, {{0, M, 0}}, inputs, outputs, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error multiply_half_grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight, ffi::Buffer<ffi::S32> expert,
                                 ffi::ResultBuffer<ffi::F32> y) {
  if (x.dimensions().size() != 3 || y->dimensions().size() != 3 || weight.dimensions().size() != 3)
    return invalid("realm_grouped_matmul_bf16: x and y are tiles of rows, the weights a matrix for each expert");
  const int64_t T = x.dimensions()[0], M = x.dimensions()[1], inputs = x.dimensions()[2], outputs = y->dimensions()[2];
  const int64_t experts = weight.dimensions()[0];
  if (inputs % BLOCK != 0) return invalid("realm_grouped_matmul_bf16: inputs must be a multiple of 32");
  if (weight.element_type() != ffi::BF16 || !has_shape(weight, {experts, outputs, inputs}) || !has_shape(*y, {T, M, outputs}) || !has_shape(expert, {T}))
    return invalid("realm_grouped_matmul_bf16: the weights do not fit x and y");
  std::vector<Run> runs;
  if (!read_runs(expert, M, experts, &runs)) return invalid("realm_grouped_matmul_bf16: there is no such expert");
  multiply_half_runs(pool, weight, x.typed_data(), T * M, runs, inputs, outputs, y->typed_data());
  clear_idle(expert, M * outputs, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace realm

namespace ffi = xla::ffi;

// The attributes of a format are those of `Format`, in its order.
#define REALM_FORMAT                         \
  .Attr<int64_t>("group")                    \
      .Attr<int64_t>("super_group")          \
      .Attr<int64_t>("bits")                 \
      .Attr<int64_t>("offset")               \
      .Attr<ffi::Span<const uint8_t>>("table") \
      .Attr<bool>("is_float32")              \
      .Attr<bool>("has_bytes")               \
      .Attr<bool>("has_minimum")

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_matmul, realm::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>() REALM_FORMAT);

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_grouped_matmul, realm::multiply_grouped,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>() REALM_FORMAT);

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_matmul_bf16, realm::multiply_half,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_grouped_matmul_bf16, realm::multiply_half_grouped,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
