// What low-rank adapters add to a projection, as an XLA custom call.
#include "ffi.h"

namespace realm {
namespace {

ffi::Error add(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> y, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U16> bank,
               ffi::Buffer<ffi::S32> ranks, ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::F32> scale,
               ffi::ResultBuffer<ffi::F32> result, ffi::Span<const int64_t> outputs, int64_t rank, int64_t start, int64_t column) {
  auto rows = index.dimensions(), inputs = x.dimensions(), width = y.dimensions(), slots = bank.dimensions(), kept = ranks.dimensions();
  if (inputs.size() != 2 || width.size() != 2 || slots.size() != 2 || rows.size() != 2 || kept.size() != 2)
    return invalid("realm_low_rank: x, y, bank, ranks and index must be matrices");
  const int64_t M = inputs[0];
  LowRank p{x.typed_data(), result->typed_data(), bank.typed_data(), ranks.typed_data(), index.typed_data(), scale.typed_data(), outputs.begin()};
  p.inputs = inputs[1], p.width = width[1], p.parts = static_cast<int64_t>(outputs.size()), p.rank = rank, p.start = start;
  p.stride = slots[1], p.slots = slots[0], p.projections = kept[1], p.projection = column, p.adapters = rows[1];
  int64_t total = 0;
  for (int64_t count : outputs) total += count, p.columns += (count + LANES - 1) / LANES * LANES;
  auto same = scale.dimensions();
  if (result->typed_data() != y.typed_data()) return invalid("realm_low_rank: y is not changed in place");
  if (rows[0] == 0 || M % rows[0] != 0 || width[0] != M || total != p.width || !std::equal(rows.begin(), rows.end(), same.begin(), same.end()))
    return invalid("realm_low_rank: x, y, index and scale are not of the same rows");
  if (p.inputs % 2 != 0 || rank <= 0 || rank % LANES != 0 || kept[0] != p.slots || column < 0 || column >= p.projections || start < 0 ||
      start % 2 != 0 || start + rank * (p.inputs * p.parts + p.columns) > p.stride || p.stride % 2 != 0)
    return invalid("realm_low_rank: the factors do not fit the bank");
  p.tokens = M / rows[0];
  const int64_t grain = (M + 4 * pool.num_threads() - 1) / (4 * std::max<int64_t>(pool.num_threads(), 1));
  const bool has_any = std::any_of(p.index, p.index + rows[0] * rows[1], [](int32_t slot) { return slot > 0; });
  if (has_any) parallel_for(pool, M, (grain + 3) / 4 * 4 > p.tokens ? grain : (grain + 3) / 4 * 4, [&](int64_t first, int64_t last) { kernels->add_low_rank(p, first, last); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace realm

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_low_rank, realm::add,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("outputs")
                                  .Attr<int64_t>("rank")
                                  .Attr<int64_t>("start")
                                  .Attr<int64_t>("column"));
