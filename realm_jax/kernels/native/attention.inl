// Attention over a slot cache, block by block with a running maximum (Milakov and Gimelshein 2018; Dao et
// al. 2022). Included inside the namespace of one instruction set.
//
// A block of SPAN positions lies in the cache as the dot instruction takes it: pairs of bf16, keys as
// [H / 2, SPAN], values as [SPAN / 2, H]. A block of int8 codes is made into that first.

constexpr float HIDDEN = -1e30f;  // the score of a position that a query does not see
constexpr int64_t PARTS = SPAN / LANES;

// e to the x of numbers <= 0 (Cephes' polynomial); exactly 0 below -87.
inline F exp_nonpositive(F x) {
  F n = Vector::round(Vector::mul(x, Vector::all(1.44269504f)));
  F r = Vector::fma(n, Vector::all(-0.693359375f), x);
  r = Vector::fma(n, Vector::all(2.12194440e-4f), r);
  constexpr float TERMS[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  F p = Vector::all(1.9875691500e-4f);
  for (int i = 0; i < 5; i++) p = Vector::fma(p, r, Vector::all(TERMS[i]));
  F y = Vector::add(Vector::fma(p, Vector::mul(r, r), r), Vector::all(1));
  I power = Vector::shift_left(Vector::add_int(Vector::to_int(n), Vector::all_int(127)), 23);
  return Vector::zero_below(x, -87, Vector::mul(y, Vector::number(power)));
}

inline F tanh(F x) {
  I sign = Vector::and_int(Vector::bits(x), Vector::all_int(INT32_MIN));
  F e = exp_nonpositive(Vector::mul(Vector::magnitude(x), Vector::all(-2)));
  F t = Vector::div(Vector::sub(Vector::all(1), e), Vector::add(Vector::all(1), e));
  return Vector::number(Vector::add_int(Vector::bits(t), sign));
}

// What an item works in.
struct Workspace {
  int64_t width;          // H; for int8 filled up to a multiple of 32 with zeros
  uint32_t* queries;      // [M, width / 2]
  const uint32_t* keys;   // [width / 2, SPAN]
  const uint32_t* values; // [SPAN / 2, width]
  uint32_t *own_keys, *own_values;  // where int8 codes are made into these
  uint16_t* rows;         // [SPAN, width] codes as bf16
  float* out;         // [M, width]
  float* best;        // [M] the running maximum
  float* total;       // [M]
  int32_t* positions; // [M]; -1: idle
};

inline Workspace make_workspace(int64_t queries, int64_t head, bool is_int8) {
  Workspace w;
  w.width = is_int8 ? (head + 31) / 32 * 32 : head;
  const int64_t sizes[] = {queries * w.width / 2, w.width / 2 * SPAN, w.width / 2 * SPAN, w.width / 2 * SPAN, queries * w.width, queries, queries, queries};
  int64_t all = 0;
  for (int64_t size : sizes) all += (size + 15) / 16 * 16;
  uint32_t* at = static_cast<uint32_t*>(scratch(static_cast<size_t>(all) * 4));
  uint32_t* parts[8];
  for (int i = 0; i < 8; i++) parts[i] = at, at += (sizes[i] + 15) / 16 * 16;
  w.queries = parts[0], w.keys = w.own_keys = parts[1], w.values = w.own_values = parts[2];
  w.rows = reinterpret_cast<uint16_t*>(parts[3]);
  w.out = reinterpret_cast<float*>(parts[4]), w.best = reinterpret_cast<float*>(parts[5]);
  w.total = reinterpret_cast<float*>(parts[6]), w.positions = reinterpret_cast<int32_t*>(parts[7]);
  return w;
}

// SPAN rows of codes as bf16, in which they are exact.
inline void expand_codes(const int8_t* from, int64_t head, const Workspace& w) {
  for (int64_t c = 0; c < SPAN; c++, from += head) {
    int8_t padded[LANES] = {};
    for (int64_t h = 0; h < w.width; h += LANES) {
      const int64_t rest = head - h;
      if (rest < LANES) std::memset(padded, 0, LANES);
      if (rest < LANES && rest > 0) std::memcpy(padded, from + h, static_cast<size_t>(rest));
      Vector::store_bf16(w.rows + c * w.width + h, Vector::load_bytes(rest < LANES ? padded : from + h));
    }
  }
}

inline void pack_keys(const Workspace& w) {
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(w.rows);
  for (int64_t c = 0; c < SPAN; c += LANES)
    for (int64_t h = 0; h < w.width / 2; h += LANES)
      Vector::transpose(pairs + c * (w.width / 2) + h, w.width / 2, w.own_keys + h * SPAN + c, SPAN);
}

inline void pack_values(const Workspace& w) {
  for (int64_t c = 0; c < SPAN / 2; c++)
    for (int64_t h = 0; h < w.width; h += LANES)
      Vector::store_int(w.own_values + c * w.width + h, Vector::interleave(w.rows + 2 * c * w.width + h, w.rows + (2 * c + 1) * w.width + h));
}

// The scores of R queries become weights in bf16; returns in `rescale` what earlier blocks are multiplied by.
template <int R>
inline void soften(const Attention& a, const Workspace& w, int64_t m, int32_t first, int64_t scale_row, F (*scores)[PARTS], uint16_t* weights, float* rescale) {
  float before[LANES] = {}, after[LANES] = {};
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    const int32_t at = w.positions[m + r];
    const int32_t low = a.window == 0 || at < a.window ? 0 : at - static_cast<int32_t>(a.window) + 1;
    const bool sees_all = first >= low && first + SPAN - 1 <= at;
    F most = Vector::all(HIDDEN);
#pragma GCC unroll 4
    for (int64_t i = 0; i < PARTS; i++) {
      F score = Vector::mul(scores[r][i], Vector::all(a.scale));
      if (a.k_scale != nullptr) score = Vector::mul(score, Vector::load(a.k_scale + scale_row + i * LANES));
      if (a.softcap > 0) score = Vector::mul(Vector::all(a.softcap), tanh(Vector::mul(score, Vector::all(1 / a.softcap))));
      if (!sees_all) score = Vector::where_within(first + static_cast<int32_t>(i * LANES), low, at, score, HIDDEN);
      scores[r][i] = score;
      most = Vector::max(most, score);
    }
    const float highest = Vector::greatest(most);
    before[r] = w.best[m + r];
    after[r] = highest > before[r] ? highest : before[r];
  }
  float factors[LANES];
  Vector::store(factors, exp_nonpositive(Vector::sub(Vector::load(before), Vector::load(after))));
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    F sum = Vector::zero();
#pragma GCC unroll 4
    for (int64_t i = 0; i < PARTS; i++) {
      F weight = exp_nonpositive(Vector::sub(scores[r][i], Vector::all(after[r])));
      sum = Vector::add(sum, weight);
      if (a.v_scale != nullptr) weight = Vector::mul(weight, Vector::load(a.v_scale + scale_row + i * LANES));
      Vector::store_bf16(weights + r * SPAN + i * LANES, weight);
    }
    w.best[m + r] = after[r];
    w.total[m + r] = w.total[m + r] * factors[r] + Vector::sum(sum);
    rescale[r] = factors[r];
  }
}

// out = out * rescale + weights @ values, of R queries and V vectors of the head
template <int R, int V>
inline void mix(const Workspace& w, int64_t m, int64_t h, const uint16_t* weights, const float* rescale) {
  F part[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) part[r][v] = Vector::zero();
  for (int64_t c = 0; c < SPAN / 2; c++) {
    I values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) values[v] = Vector::load_int(w.values + c * w.width + h + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t two;
      std::memcpy(&two, weights + r * SPAN + 2 * c, sizeof two);
      I pair = Vector::all_int(two);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) part[r][v] = Vector::dot_pairs(part[r][v], values[v], pair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      float* out = w.out + (m + r) * w.width + h + v * LANES;
      Vector::store(out, Vector::fma(Vector::load(out), Vector::all(rescale[r]), part[r][v]));
    }
}

// R queries take in one block.
template <int R>
inline void attend_rows(const Attention& a, const Workspace& w, int64_t m, int32_t first, int64_t scale_row) {
  F scores[R][PARTS];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int64_t i = 0; i < PARTS; i++) scores[r][i] = Vector::zero();
  for (int64_t h = 0; h < w.width / 2; h++) {
    I keys[PARTS];
#pragma GCC unroll 4
    for (int64_t i = 0; i < PARTS; i++) keys[i] = Vector::load_int(w.keys + h * SPAN + i * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      I query = Vector::all_int(static_cast<int32_t>(w.queries[(m + r) * (w.width / 2) + h]));
#pragma GCC unroll 4
      for (int64_t i = 0; i < PARTS; i++) scores[r][i] = Vector::dot_pairs(scores[r][i], keys[i], query);
    }
  }
  uint16_t weights[R * SPAN];
  float rescale[R];
  soften<R>(a, w, m, first, scale_row, scores, weights, rescale);
  int64_t h = 0;
  for (; h + 4 * LANES <= w.width; h += 4 * LANES) mix<R, 4>(w, m, h, weights, rescale);
  for (; h + 2 * LANES <= w.width; h += 2 * LANES) mix<R, 2>(w, m, h, weights, rescale);
  if (h < w.width) mix<R, 1>(w, m, h, weights, rescale);
}

// Whether query m sees some position of the block.
inline bool sees(const Attention& a, const Workspace& w, int64_t m, int32_t first) {
  const int32_t at = w.positions[m];
  return at >= first && (a.window == 0 || at - a.window < first + SPAN - 1);
}

// Where the keys and values of a block stand in pairs; `row` is its first in [S, K, C].
inline void open_block(const Attention& a, Workspace& w, int64_t row) {
  if (a.k_scale == nullptr) {
    w.keys = static_cast<const uint32_t*>(a.k) + row * (a.H / 2);
    w.values = static_cast<const uint32_t*>(a.v) + row * (a.H / 2);
    return;
  }
  expand_codes(static_cast<const int8_t*>(a.k) + row * a.H, a.H, w);
  pack_keys(w);
  expand_codes(static_cast<const int8_t*>(a.v) + row * a.H, a.H, w);
  pack_values(w);
}

inline void attend_block(const Attention& a, Workspace& w, int64_t queries, int64_t row, int32_t first) {
  open_block(a, w, row);
  for (int64_t m = 0; m < queries;) {
    int64_t run = 0;
    while (run < 4 && m + run < queries && sees(a, w, m + run, first)) run++;
    switch (run) {
      case 0: run = 1; break;
      case 1: attend_rows<1>(a, w, m, first, row); break;
      case 2: attend_rows<2>(a, w, m, first, row); break;
      case 3: attend_rows<3>(a, w, m, first, row); break;
      default: attend_rows<4>(a, w, m, first, row);
    }
    m += run;
  }
}

// The item's queries as bf16 pairs, token by token; returns the blocks [low, high) that some query sees.
inline void open_item(const Attention& a, const Workspace& w, int64_t b, int64_t k, int64_t t0, int64_t queries, int64_t* low, int64_t* high) {
  const int64_t group = a.N / a.K;
  *low = a.C, *high = 0;
  for (int64_t m = 0; m < queries; m++) {
    const int64_t t = t0 + m / group, n = k * group + m % group, at = a.positions[b * a.T + t];
    w.positions[m] = at < 0 || at >= a.C ? -1 : static_cast<int32_t>(at);
    w.best[m] = a.sinks == nullptr ? HIDDEN : a.sinks[n], w.total[m] = a.sinks == nullptr ? 0 : 1;
    std::memset(w.out + m * w.width, 0, static_cast<size_t>(w.width) * 4);
    if (w.positions[m] < 0) continue;
    const int64_t start = a.window == 0 || at < a.window ? 0 : (at - a.window + 1) / SPAN;
    *low = start < *low ? start : *low;
    *high = at / SPAN + 1 > *high ? at / SPAN + 1 : *high;
    const float* q = a.q + (b * a.T + t) * a.stride + n * a.H;
    uint16_t* halves = reinterpret_cast<uint16_t*>(w.queries + m * (w.width / 2));
    for (int64_t h = 0; h < w.width; h += LANES) Vector::store_bf16(halves + h, load_some(q + h, a.H - h));
  }
}

inline void close_item(const Attention& a, const Workspace& w, int64_t b, int64_t k, int64_t t0, int64_t queries) {
  const int64_t group = a.N / a.K;
  for (int64_t m = 0; m < queries; m++) {
    float* out = a.out + ((b * a.T + t0 + m / group) * a.N + k * group + m % group) * a.H;
    const float total = w.total[m] > 0 ? w.total[m] : 1;  // an idle query's may be 0
    for (int64_t h = 0; h < a.H; h++) out[h] = w.out[m * w.width + h] / total;
  }
}

void attend(const Attention& a, int64_t first_item, int64_t last_item) {
  const int64_t group = a.N / a.K, chunks = (a.T + a.tokens - 1) / a.tokens;
  for (int64_t item = first_item; item < last_item; item++) {
    const int64_t b = item / (a.K * chunks), k = item / chunks % a.K, t0 = item % chunks * a.tokens;
    const int64_t tokens = a.T - t0 < a.tokens ? a.T - t0 : a.tokens;
    const int64_t slot = a.slots == nullptr ? b : a.slots[b];
    Workspace w = make_workspace(group * tokens, a.H, a.k_scale != nullptr);
    int64_t low, high;
    open_item(a, w, b, k, t0, group * tokens, &low, &high);
    if (slot >= 0 && slot < a.S)
      for (int64_t i = low; i < high; i++)
        attend_block(a, w, group * tokens, (slot * a.K + k) * a.C + i * SPAN, static_cast<int32_t>(i * SPAN));
    close_item(a, w, b, k, t0, group * tokens);
  }
}
