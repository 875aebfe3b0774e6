// Products of int8 rows and tiled 4- or 8-bit weights. Included inside the namespace of one instruction set.

using F = Vector::F;
using I = Vector::I;

// The first `count` numbers, then zeros.
inline F load_some(const float* p, int64_t count) {
  if (count >= LANES) return Vector::load(p);
  float padded[LANES] = {};
  if (count > 0) std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(float));
  return Vector::load(padded);
}

// Codes and scales of the rows: x is rounded to 127 steps of each block's largest magnitude.
void quantize(const Rows& rows, int64_t first, int64_t last) {
  const I magnitude = Vector::all_int(0x7fffffff);
  for (int64_t m = first; m < last; m++) {
    const float* x = rows.x + m * rows.inputs;
    int8_t* codes = rows.codes + m * rows.inputs;
    float* scales = rows.scales + m * (rows.inputs / BLOCK);
    for (int64_t b = 0; b < rows.inputs / BLOCK; b++, x += BLOCK, codes += BLOCK) {
      F low = Vector::load(x), high = Vector::load(x + LANES);
      // as integers, the magnitudes of floats are in order, and NaN is above infinity: it is not lost
      I both = Vector::max_int(Vector::and_int(Vector::bits(low), magnitude), Vector::and_int(Vector::bits(high), magnitude));
      int32_t lanes[LANES], most = 0;
      Vector::store_int(lanes, both);
      for (int64_t i = 0; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
      float largest;
      std::memcpy(&largest, &most, sizeof largest);
      scales[b] = largest / 127;
      F inverse = Vector::all(largest > 1e-30f ? 127 / largest : 0);
      Vector::store_bytes(codes, Vector::to_int(Vector::mul(low, inverse)));
      Vector::store_bytes(codes + LANES, Vector::to_int(Vector::mul(high, inverse)));
    }
    codes = rows.codes + m * rows.inputs;
    const int64_t groups = rows.inputs / rows.group;
    for (int64_t g = 0; g < groups; g++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < rows.group; i++) sum += codes[g * rows.group + i];
      rows.sums[m * groups + g] = static_cast<float>(sum);
      rows.starts[m * groups + g] = -rows.offset * sum;
    }
  }
}

// Where a tile's codes come from: step j of block b is LANES outputs of four inputs. What stands at the same
// place `ahead`, in the next tile, is asked for: codes and scales in turn are no stream that a processor sees.
struct Bytes {
  const uint8_t* codes;
  int64_t ahead;
  inline I load(int64_t b, int64_t j) const {
    const uint8_t* at = codes + b * 512 + j * 64;
    __builtin_prefetch(at + ahead, 0, 2);
    return Vector::load_int(at);
  }
};

struct Nibbles {
  const uint8_t* codes;
  int64_t ahead;
  inline I load(int64_t b, int64_t j) const {
    const uint8_t* at = codes + b * 256 + (j & 3) * 64;
    if (j < 4) __builtin_prefetch(at + ahead, 0, 2);
    I pair = Vector::load_int(at);
    return j < 4 ? Vector::low_nibbles(pair) : Vector::high_nibbles(pair);
  }
};

struct Indices {
  Nibbles nibbles;
  I table;
  inline I load(int64_t b, int64_t j) const { return Vector::look_up(table, nibbles.load(b, j)); }
};

// The scale (or minimum) of each group of a tile, float32 [I / group, LANES].
inline void expand(const Weights& w, const uint8_t* factors, float* out) {
  const int64_t supers = w.inputs / w.super_group, each = w.super_group / w.group;
  const uint16_t* half = reinterpret_cast<const uint16_t*>(factors);
  const float* full = reinterpret_cast<const float*>(factors);
  const int8_t* bytes = reinterpret_cast<const int8_t*>(factors + w.super_bytes());
  for (int64_t s = 0; s < supers; s++) {
    F factor = w.is_float32 ? Vector::load(full + s * LANES) : Vector::load_half(half + s * LANES);
    for (int64_t g = s * each; g < (s + 1) * each; g++)
      Vector::store(out + g * LANES, w.has_bytes ? Vector::mul(factor, Vector::load_bytes(bytes + g * LANES)) : factor);
  }
}

// R rows of one tile; codes' products are exact integers, and blocks are added in order.
template <int R, int GROUP, bool HAS_MINIMUM, class Codes>
inline void multiply_rows(const Product& p, Codes codes, const float* scales, const float* minima, int64_t row, int64_t tile) {
  const int64_t inputs = p.weights.inputs, blocks = inputs / BLOCK, outputs = p.weights.outputs;
  const int8_t* x[R];
  const float* x_scale[R];
  const float* sums[R];
  const int32_t* starts[R];
  F total[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    x[r] = p.rows.codes + (row + r) * inputs;
    x_scale[r] = p.rows.scales + (row + r) * blocks;
    sums[r] = p.rows.sums + (row + r) * (inputs / GROUP);
    starts[r] = p.rows.starts + (row + r) * (inputs / GROUP);
    total[r] = Vector::zero();
  }
  for (int64_t b = 0; b < blocks; b++) {
    F block[R];
#pragma GCC unroll 8
    for (int h = 0; h < BLOCK / GROUP; h++) {
      const int64_t g = b * (BLOCK / GROUP) + h;
      I dots[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) dots[r] = Vector::all_int(starts[r][g]);
#pragma GCC unroll 8
      for (int j = 0; j < GROUP / 4; j++) {
        I w = codes.load(b, h * (GROUP / 4) + j);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          int32_t four;
          std::memcpy(&four, x[r] + b * BLOCK + h * GROUP + 4 * j, sizeof four);
          dots[r] = Vector::dot(dots[r], w, Vector::all_int(four));
        }
      }
      F scale = Vector::load(scales + g * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        F dot = Vector::to_float(dots[r]);
        block[r] = h == 0 ? Vector::mul(scale, dot) : Vector::fma(scale, dot, block[r]);
      }
      if (HAS_MINIMUM) {
        F minimum = Vector::load(minima + g * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          block[r] = Vector::fma(minimum, Vector::all(sums[r][g]), block[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) total[r] = Vector::fma(block[r], Vector::all(x_scale[r][b]), total[r]);
  }
  const int64_t width = outputs - tile * LANES;  // of the last tile, some outputs may not exist
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    float* y = p.y + (row + r) * outputs + tile * LANES;
    if (width >= LANES) {
      Vector::store(y, total[r]);
    } else {
      float lanes[LANES];
      Vector::store(lanes, total[r]);
      std::memcpy(y, lanes, static_cast<size_t>(width) * sizeof(float));
    }
  }
}

template <int GROUP, bool HAS_MINIMUM, class Codes>
inline void multiply_tile(const Product& p, Codes codes, const float* scales, const float* minima, int64_t tile) {
  int64_t row = 0;
  for (; row + 8 <= p.count; row += 8) multiply_rows<8, GROUP, HAS_MINIMUM>(p, codes, scales, minima, row, tile);
  if (row + 4 <= p.count) multiply_rows<4, GROUP, HAS_MINIMUM>(p, codes, scales, minima, row, tile), row += 4;
  if (row + 2 <= p.count) multiply_rows<2, GROUP, HAS_MINIMUM>(p, codes, scales, minima, row, tile), row += 2;
  if (row < p.count) multiply_rows<1, GROUP, HAS_MINIMUM>(p, codes, scales, minima, row, tile);
}

template <class Codes>
inline void multiply_any(const Product& p, Codes codes, const float* scales, const float* minima, int64_t tile) {
  const bool has_minimum = p.weights.has_minimum;
  if (p.weights.group == 16)
    has_minimum ? multiply_tile<16, true>(p, codes, scales, minima, tile) : multiply_tile<16, false>(p, codes, scales, minima, tile);
  else
    has_minimum ? multiply_tile<32, true>(p, codes, scales, minima, tile) : multiply_tile<32, false>(p, codes, scales, minima, tile);
}

void multiply(const Product& p, int64_t first_tile, int64_t last_tile) {
  const Weights& w = p.weights;
  const int64_t blocks = w.inputs / BLOCK, groups = w.inputs / w.group;
  const int64_t record = w.record();
  float* scales = static_cast<float*>(scratch(static_cast<size_t>(8 * groups * LANES + blocks * 512)));
  float* minima = scales + groups * LANES;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(minima + groups * LANES);
  const I table = Vector::table(w.table == nullptr ? bytes : w.table);
  for (int64_t tile = first_tile; tile < last_tile; tile++) {
    const uint8_t* codes = w.records + tile * record;
    const uint8_t* factors = codes + w.code_bytes();
    const Nibbles nibbles{codes, record};
    for (int64_t i = w.code_bytes(); i < record; i += 64) __builtin_prefetch(codes + i + record, 0, 2);
    expand(w, factors, scales);
    if (w.has_minimum) expand(w, factors + w.factor_bytes(), minima);
    if (!w.is_4bit) {
      multiply_any(p, Bytes{codes, record}, scales, minima, tile);
    } else if (p.count > 8) {  // taken apart once for all rows
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t j = 0; j < 8; j++)
          Vector::store_int(bytes + b * 512 + j * 64, w.table == nullptr ? nibbles.load(b, j) : Indices{nibbles, table}.load(b, j));
      multiply_any(p, Bytes{bytes, 0}, scales, minima, tile);
    } else if (w.table == nullptr) {
      multiply_any(p, nibbles, scales, minima, tile);
    } else {
      multiply_any(p, Indices{nibbles, table}, scales, minima, tile);
    }
  }
}
