// What low-rank adapters add to rows. Included inside the namespace of one instruction set.
//
// Tokens with the same adapters are computed together, so that each weight is read once for several of them;
// that changes no sum. Factors lie in vectors of LANES pairs: a as [parts, rank / LANES, I / 2, LANES] of two
// inputs each, b as [columns / LANES, rank / 2, LANES] of two ranks each.

constexpr int TOGETHER = 4;

// Tokens with the same adapters.
struct Together {
  const uint32_t* x;           // [T, I / 2] their inputs, rounded to bf16 pairs
  float* y[TOGETHER];          // their outputs
  const float* scale[TOGETHER];
};

// The first factor for one vector of ranks. Four partial sums in turn, so that none waits for itself.
template <int T>
inline void shrink(const uint32_t* x, int64_t pairs, const uint32_t* a, F* hidden) {
  F total[T][4];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) total[t][j] = Vector::zero();
  int64_t i = 0;
  for (; i + 4 <= pairs; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      I weights = Vector::load_int(a + (i + j) * LANES);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
        total[t][j] = Vector::dot_pairs(total[t][j], weights, Vector::all_int(static_cast<int32_t>(x[t * pairs + i + j])));
    }
  }
  for (; i < pairs; i++) {
    I weights = Vector::load_int(a + i * LANES);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) total[t][0] = Vector::dot_pairs(total[t][0], weights, Vector::all_int(static_cast<int32_t>(x[t * pairs + i])));
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) hidden[t] = Vector::add(Vector::add(total[t][0], total[t][1]), Vector::add(total[t][2], total[t][3]));
}

// The second factor, added to `count` <= LANES outputs from `at` on.
template <int T>
inline void expand(const uint32_t* hidden, int64_t stride, int64_t pairs, const uint32_t* b, float* const* y, int64_t at, int64_t count) {
  F total[T];
  float edge[LANES];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) total[t] = load_some(y[t] + at, count);
  for (int64_t r = 0; r < pairs; r++) {
    I weights = Vector::load_int(b + r * LANES);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) total[t] = Vector::dot_pairs(total[t], weights, Vector::all_int(static_cast<int32_t>(hidden[t * stride + r])));
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    Vector::store(count >= LANES ? y[t] + at : edge, total[t]);
    if (count < LANES) std::memcpy(y[t] + at, edge, static_cast<size_t>(count) * 4);
  }
}

// Adapter number j of T tokens.
template <int T>
inline void add_adapter(const LowRank& p, const Together& tokens, const uint16_t* slot, int64_t rank, int64_t j, uint32_t* hidden) {
  const int64_t inputs = p.inputs / 2, stride = p.rank / 2, vectors = (rank + LANES - 1) / LANES;
  const uint32_t* a = reinterpret_cast<const uint32_t*>(slot + p.start);
  const uint32_t* b = a + p.parts * p.rank * inputs;
  int64_t first = 0;
  for (int64_t part = 0; part < p.parts; part++, a += p.rank * inputs) {
    for (int64_t v = 0; v < vectors; v++) {
      F sums[T];
      shrink<T>(tokens.x, inputs, a + v * LANES * inputs, sums);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
        Vector::store_bf16(reinterpret_cast<uint16_t*>(hidden + t * stride + v * LANES / 2), Vector::mul(sums[t], Vector::all(tokens.scale[t][j])));
    }
    for (int64_t at = 0; at < p.outputs[part]; at += LANES, b += LANES * stride)
      expand<T>(hidden, stride, vectors * LANES / 2, b, tokens.y, first + at, p.outputs[part] - at);
    first += p.outputs[part];
  }
}

template <int T>
void add_adapters(const LowRank& p, const int32_t* order, const int32_t* index, uint32_t* memory) {
  const int64_t pairs = p.inputs / 2;
  Together tokens;
  tokens.x = memory;
  for (int t = 0; t < T; t++) {
    const int64_t m = order[t];
    tokens.y[t] = p.y + m * p.width;
    tokens.scale[t] = p.scale + m / p.tokens * p.adapters;
    for (int64_t i = 0; i < p.inputs; i += LANES)  // what is written past the end, the next token overwrites
      Vector::store_bf16(reinterpret_cast<uint16_t*>(memory + t * pairs) + i, load_some(p.x + m * p.inputs + i, p.inputs - i));
  }
  uint32_t* hidden = memory + T * pairs + LANES / 2;
  for (int64_t j = 0; j < p.adapters; j++) {
    const int64_t slot = index[j];
    if (slot <= 0 || slot >= p.slots) continue;
    const int64_t used = p.ranks[slot * p.projections + p.projection], rank = used < p.rank ? used : p.rank;
    if (rank > 0) add_adapter<T>(p, tokens, p.bank + slot * p.stride, rank, j, hidden);
  }
}

// Tokens first to last of `order`: what each row's adapters add to them, in the order in which the row names them.
void add_low_rank(const LowRank& p, int64_t first, int64_t last) {
  auto* memory = static_cast<uint32_t*>(scratch(static_cast<size_t>(TOGETHER * (p.inputs / 2 + p.rank / 2) + LANES / 2) * 4));
  auto adapters_of = [&](int64_t place) { return p.index + p.order[place] / p.tokens * p.adapters; };
  for (int64_t m = first; m < last;) {
    const int32_t* index = adapters_of(m);
    int64_t end = m + 1;
    while (end < last && end < m + TOGETHER && std::memcmp(index, adapters_of(end), static_cast<size_t>(p.adapters) * 4) == 0) end++;
    if (end - m == TOGETHER) {
      add_adapters<TOGETHER>(p, p.order + m, index, memory), m += TOGETHER;
    } else if (end - m >= 2) {
      add_adapters<2>(p, p.order + m, index, memory), m += 2;
    } else {
      add_adapters<1>(p, p.order + m, index, memory), m += 1;
    }
  }
}
