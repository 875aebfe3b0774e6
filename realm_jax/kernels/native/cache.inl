// New keys or values into a slot cache. Included inside the namespace of one instruction set.
//
// What is not finite becomes 0: it would reach a later sequence of the slot, as 0 * NaN is NaN.

constexpr int32_t FLOAT_INFINITY = 0x7f800000, ROUNDS_TO_INFINITY = 0x7f7f8000;  // in float32, to bf16

// One head of one token among the pairs of its block.
inline void write_keys(const float* x, int64_t size, uint32_t* block, int64_t c) {
  uint16_t halves[LANES];
  for (int64_t h = 0; h < size; h += LANES) {
    Vector::store_bf16(halves, Vector::keep_below(Vector::load(x + h), ROUNDS_TO_INFINITY));
    for (int64_t i = 0; i < LANES / 2; i++) std::memcpy(block + (h / 2 + i) * SPAN + c, halves + 2 * i, 4);
  }
}

inline void write_values(const float* x, int64_t size, uint32_t* block, int64_t c) {
  uint16_t halves[LANES];
  uint16_t* to = reinterpret_cast<uint16_t*>(block + c / 2 * size) + c % 2;
  for (int64_t h = 0; h < size; h += LANES) {
    Vector::store_bf16(halves, Vector::keep_below(Vector::load(x + h), ROUNDS_TO_INFINITY));
    for (int64_t i = 0; i < LANES; i++) to[2 * (h + i)] = halves[i];
  }
}

// The codes of one head of one token; returns their scale.
inline float write_codes(const float* x, int64_t size, int8_t* to) {
  F most = Vector::zero();
  for (int64_t h = 0; h < size; h += LANES)
    most = Vector::max(most, Vector::magnitude(Vector::keep_below(load_some(x + h, size - h), FLOAT_INFINITY)));
  const float scale = Vector::greatest(most) / 127;
  const F divisor = Vector::all(scale > 0 ? scale : 1);
  for (int64_t h = 0; h < size; h += LANES) {
    int8_t padded[LANES];
    const bool is_whole = size - h >= LANES;
    F value = Vector::keep_below(load_some(x + h, size - h), FLOAT_INFINITY);
    Vector::store_bytes(is_whole ? to + h : padded, Vector::to_int(Vector::div(value, divisor)));
    if (!is_whole) std::memcpy(to + h, padded, static_cast<size_t>(size - h));
  }
  return scale;
}

// Tokens first to last of B * T, all heads of each, to their slots and positions; others are dropped.
void write(const CacheWrite& c, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; token++) {
    const int64_t slot = c.slots == nullptr ? token / c.T : c.slots[token / c.T], at = c.positions[token];
    if (slot < 0 || slot >= c.S || at < 0 || at >= c.C) continue;
    for (int64_t k = 0; k < c.K; k++) {
      const float* x = c.x + token * c.stride + k * c.H;
      const int64_t row = (slot * c.K + k) * c.C + at;
      if (c.scales != nullptr) {
        c.scales[row] = write_codes(x, c.H, static_cast<int8_t*>(c.cache) + row * c.H);
        continue;
      }
      uint32_t* block = static_cast<uint32_t*>(c.cache) + row / SPAN * (c.H / 2 * SPAN);
      if (c.is_keys)
        write_keys(x, c.H, block, at % SPAN);
      else
        write_values(x, c.H, block, at % SPAN);
    }
  }
}
