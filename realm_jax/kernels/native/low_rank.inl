// What low-rank adapters add to rows. Included inside the namespace of one instruction set.

constexpr int TOKENS = 4;  // of one row, computed together: each weight is read once for them

// The first factor of T tokens for one vector of ranks. Four partial sums in turn, so that none waits for
// itself; how many tokens stand together changes no sum.
template <int T>
inline void shrink(const uint32_t* x, int64_t pairs, const uint32_t* a, int64_t stride, F* hidden) {
  F total[T][4];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) total[t][j] = Vector::zero();
  int64_t i = 0;
  for (; i + 4 <= pairs; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      I weights = Vector::load_int(a + (i + j) * stride);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
        total[t][j] = Vector::dot_pairs(total[t][j], weights, Vector::all_int(static_cast<int32_t>(x[t * pairs + i + j])));
    }
  }
  for (; i < pairs; i++) {
    I weights = Vector::load_int(a + i * stride);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) total[t][0] = Vector::dot_pairs(total[t][0], weights, Vector::all_int(static_cast<int32_t>(x[t * pairs + i])));
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) hidden[t] = Vector::add(Vector::add(total[t][0], total[t][1]), Vector::add(total[t][2], total[t][3]));
}

// The second factor of T tokens, added to `count` outputs, of which the last vector may be part.
template <int T>
inline void expand(const uint32_t* hidden, int64_t hidden_stride, int64_t pairs, const uint32_t* b, int64_t stride, float* y,
                   int64_t y_stride, int64_t count) {
  for (int64_t o = 0; o < count; o += LANES) {
    const bool is_whole = o + LANES <= count;
    F total[T];
    float edge[LANES];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      if (!is_whole) std::memset(edge, 0, sizeof edge), std::memcpy(edge, y + t * y_stride + o, static_cast<size_t>(count - o) * 4);
      total[t] = Vector::load(is_whole ? y + t * y_stride + o : edge);
    }
    for (int64_t r = 0; r < pairs; r++) {
      I weights = Vector::load_int(b + r * stride + o);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
        total[t] = Vector::dot_pairs(total[t], weights, Vector::all_int(static_cast<int32_t>(hidden[t * hidden_stride + r])));
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      Vector::store(is_whole ? y + t * y_stride + o : edge, total[t]);
      if (!is_whole) std::memcpy(y + t * y_stride + o, edge, static_cast<size_t>(count - o) * 4);
    }
  }
}

// One adapter of one row, for T of its tokens, whose inputs are rounded to bf16 pairs.
template <int T>
inline void add_adapter(const LowRank& p, const uint32_t* x, float* y, const uint16_t* slot, int64_t rank, float scale, uint32_t* hidden) {
  const uint32_t* a = reinterpret_cast<const uint32_t*>(slot + p.start);
  const int64_t ranks = p.parts * p.rank, vectors = (rank + LANES - 1) / LANES;
  const uint32_t* b = reinterpret_cast<const uint32_t*>(slot + p.start + p.inputs * ranks);
  int64_t column = 0;
  for (int64_t part = 0; part < p.parts; part++) {
    for (int64_t v = 0; v < vectors; v++) {
      F sums[T];
      shrink<T>(x, p.inputs / 2, a + part * p.rank + v * LANES, ranks, sums);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
        Vector::store_bf16(reinterpret_cast<uint16_t*>(hidden + t * p.rank / 2 + v * LANES / 2), Vector::mul(sums[t], Vector::all(scale)));
    }
    const int64_t count = p.outputs[part];
    expand<T>(hidden, p.rank / 2, vectors * LANES / 2, b + column, p.columns, y, p.width, count);
    column += (count + LANES - 1) / LANES * LANES;
    y += count;
  }
}

// So many rows of inputs as bf16 pairs, one after another; what lies behind the last may change.
inline void round_pairs(const float* x, int64_t inputs, int64_t count, uint32_t* pairs) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < inputs; i += LANES)
      Vector::store_bf16(reinterpret_cast<uint16_t*>(pairs + t * inputs / 2) + i, load_some(x + t * inputs + i, inputs - i));
}

// Tokens first to last: what each row's adapters add to them, in the order in which the row names them.
void add_low_rank(const LowRank& p, int64_t first, int64_t last) {
  const int64_t pairs = p.inputs / 2, rounded = (pairs + LANES - 1) / LANES * LANES;
  auto* memory = static_cast<uint32_t*>(scratch(static_cast<size_t>(TOKENS) * (rounded + p.rank / 2) * 4));
  uint32_t* hidden = memory + TOKENS * rounded;
  for (int64_t m = first; m < last;) {
    const int64_t row = m / p.tokens, whole = (row + 1) * p.tokens, end = whole < last ? whole : last;
    const bool is_block = m + TOKENS <= end;
    const int64_t count = is_block ? TOKENS : 1;
    bool is_rounded = false;
    for (int64_t j = 0; j < p.adapters; j++) {
      const int64_t slot = p.index[row * p.adapters + j];
      if (slot <= 0 || slot >= p.slots) continue;
      const int64_t used = p.ranks[slot * p.projections + p.projection], rank = used < p.rank ? used : p.rank;
      if (rank <= 0) continue;
      if (!is_rounded) round_pairs(p.x + m * p.inputs, p.inputs, count, memory);
      is_rounded = true;
      const uint16_t* weights = p.bank + slot * p.stride;
      const float scale = p.scale[row * p.adapters + j];
      if (is_block) add_adapter<TOKENS>(p, memory, p.y + m * p.width, weights, rank, scale, hidden);
      else add_adapter<1>(p, memory, p.y + m * p.width, weights, rank, scale, hidden);
    }
    m += count;
  }
}
