// Rotary positions. Included inside the namespace of one instruction set.

// Heads of tokens first to last, turned: y = x * cos + partner * sin, where a pair's first number has the
// second one's negative for a partner. Numbers past the pairs stay.
void rotate(const Rope& r, int64_t first, int64_t last) {
  const int64_t P = r.pairs, step = r.interleaved ? 1 : P;
  const int64_t whole = r.interleaved ? 2 * P / LANES * LANES : P / LANES * LANES;
  float* cos = static_cast<float*>(scratch(static_cast<size_t>(16 * P)));  // [2 P] each, as an interleaved head lies
  float* sin = cos + 2 * P;
  for (int64_t t = first; t < last; t++) {
    const float *c = r.cos + t * P, *s = r.sin + t * P;
    for (int64_t p = 0; r.interleaved && p < P; p++) {
      cos[2 * p] = cos[2 * p + 1] = c[p];
      sin[2 * p] = -s[p], sin[2 * p + 1] = s[p];
    }
    for (int64_t n = 0; n < r.heads; n++) {
      const float* x = r.x + t * r.stride + n * r.H;
      float* y = r.y + (t * r.heads + n) * r.H;
      for (int64_t i = 0; i < whole; i += LANES) {
        F a = Vector::load(x + i);
        if (r.interleaved) {
          F turned = Vector::mul(Vector::swap_pairs(a), Vector::load(sin + i));
          Vector::store(y + i, Vector::add(Vector::mul(a, Vector::load(cos + i)), turned));
        } else {
          F b = Vector::load(x + P + i), cosine = Vector::load(c + i), sine = Vector::load(s + i);
          Vector::store(y + i, Vector::sub(Vector::mul(a, cosine), Vector::mul(b, sine)));
          Vector::store(y + P + i, Vector::add(Vector::mul(a, sine), Vector::mul(b, cosine)));
        }
      }
      for (int64_t p = r.interleaved ? whole / 2 : whole; p < P; p++) {
        const int64_t i = r.interleaved ? 2 * p : p;
        const float a = x[i], b = x[i + step];
        y[i] = a * c[p] - b * s[p];
        y[i + step] = a * s[p] + b * c[p];
      }
      for (int64_t i = 2 * P; i < r.H; i++) y[i] = x[i];
    }
  }
}
