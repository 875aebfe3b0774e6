// Products of bf16 rows and bf16 weights [O, I]. Included inside the namespace of one instruction set.

void to_pairs(const HalfProduct& p, int64_t first, int64_t last) {
  for (int64_t i = first * p.inputs; i < last * p.inputs; i += LANES)
    Vector::store_bf16(reinterpret_cast<uint16_t*>(p.pairs) + i, Vector::load(p.x + i));
}

// R rows and P outputs: LANES partial sums each, added by halving at the end.
template <int R, int P>
inline void multiply_half_rows(const HalfProduct& p, int64_t row, int64_t output) {
  const int64_t pairs = p.inputs / 2;
  const uint32_t* x = p.pairs + row * pairs;
  const uint32_t* w = reinterpret_cast<const uint32_t*>(p.weight) + output * pairs;
  F total[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < P; o++) total[r][o] = Vector::zero();
  for (int64_t i = 0; i < pairs; i += LANES) {
    I weights[P];
#pragma GCC unroll 8
    for (int o = 0; o < P; o++) {
      __builtin_prefetch(w + (P + o) * pairs + i, 0, 2);  // the next outputs'
      weights[o] = Vector::load_int(w + o * pairs + i);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      I inputs = Vector::load_int(x + r * pairs + i);
#pragma GCC unroll 8
      for (int o = 0; o < P; o++) total[r][o] = Vector::dot_pairs(total[r][o], weights[o], inputs);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < P; o++) p.y[(row + r) * p.outputs + output + o] = Vector::sum(total[r][o]);
}

template <int P>
inline void multiply_half_outputs(const HalfProduct& p, int64_t output) {
  int64_t row = 0;
  for (; row + 4 <= p.count; row += 4) multiply_half_rows<4, P>(p, row, output);
  if (row + 2 <= p.count) multiply_half_rows<2, P>(p, row, output), row += 2;
  if (row < p.count) multiply_half_rows<1, P>(p, row, output);
}

void multiply_half(const HalfProduct& p, int64_t first_output, int64_t last_output) {
  int64_t output = first_output;
  for (; output + 4 <= last_output; output += 4) multiply_half_outputs<4>(p, output);
  for (; output < last_output; output++) multiply_half_outputs<1>(p, output);
}
