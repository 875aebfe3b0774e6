// Root mean square norm. Included inside the namespace of one instruction set.

void normalize(const Norm& n, int64_t first, int64_t last) {
  const int64_t whole = n.features / LANES * LANES;
  for (int64_t m = first; m < last; m++) {
    const float* x = n.x + m * n.features;
    float* y = n.y + m * n.features;
    F squares[2] = {Vector::zero(), Vector::zero()};
    for (int64_t i = 0; i < whole; i += LANES) {
      F value = Vector::load(x + i);
      squares[i / LANES % 2] = Vector::fma(value, value, squares[i / LANES % 2]);
    }
    float sum = Vector::sum(Vector::add(squares[0], squares[1]));
    for (int64_t i = whole; i < n.features; i++) sum += x[i] * x[i];
    const float factor = 1 / std::sqrt(sum / static_cast<float>(n.features) + n.eps);
    for (int64_t i = 0; i < whole; i += LANES)
      Vector::store(y + i, Vector::mul(Vector::mul(Vector::load(x + i), Vector::all(factor)), Vector::load(n.scale + i)));
    for (int64_t i = whole; i < n.features; i++) y[i] = x[i] * factor * n.scale[i];
  }
}
