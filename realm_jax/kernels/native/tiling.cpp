// GGML's blocks -> tiles, as quant/tiling.py does it, for the types that most files are made of.
// All arithmetic is on words of four codes: the layouts of both sides keep four neighbours together.
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace realm {
namespace {

inline uint32_t word(const uint8_t* p) {
  uint32_t w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

constexpr uint32_t LOW = 0x0f0f0f0f, HIGH = 0xf0f0f0f0, MIDDLE = 0x80808080;

// Where the parts of one output's blocks go in its tile's record.
struct Lane {
  uint32_t* codes;  // the lane's word of the first vector; the next vector is LANES words on
  uint8_t *scale, *scale_bytes, *minimum, *minimum_bytes;  // [.., LANES] from this lane on

  void half(uint8_t* to, int64_t i, const uint8_t* from) const { std::memcpy(to + i * LANES * 2, from, 2); }
};

// The bits 0, 1, 2, 3 of x, each at the bottom of a byte.
inline uint32_t spread(uint32_t x) { return (x & 1) | (x & 2) << 7 | (x & 4) << 14 | (x & 8) << 21; }

inline uint16_t negative(const uint8_t* half) {
  uint16_t x;
  std::memcpy(&x, half, sizeof x);
  return x ^ 0x8000;
}

// Each of these takes one block apart, number b of its row.

void q4(const uint8_t* block, int64_t b, const Lane& to, bool has_minimum) {
  to.half(to.scale, b, block);
  if (has_minimum) to.half(to.minimum, b, block + 2);
  const uint8_t* codes = block + (has_minimum ? 4 : 2);
  for (int64_t j = 0; j < 4; j++) to.codes[(4 * b + j) * LANES] = word(codes + 4 * j);
}

void q5(const uint8_t* block, int64_t b, const Lane& to, bool has_minimum) {
  to.half(to.scale, b, block);
  if (has_minimum) to.half(to.minimum, b, block + 2);
  const uint8_t* rest = block + (has_minimum ? 4 : 2);
  const uint32_t fifth = word(rest), bias = has_minimum ? MIDDLE : 0x70707070;  // Q5_0's codes start at -16
  for (int64_t j = 0; j < 4; j++) {
    const uint32_t pair = word(rest + 4 + 4 * j);
    to.codes[(8 * b + j) * LANES] = ((pair & LOW) | spread(fifth >> 4 * j) << 4) + bias;
    to.codes[(8 * b + 4 + j) * LANES] = ((pair >> 4 & LOW) | spread(fifth >> (16 + 4 * j)) << 4) + bias;
  }
}

void q8_0(const uint8_t* block, int64_t b, const Lane& to) {
  to.half(to.scale, b, block);
  for (int64_t j = 0; j < 8; j++) to.codes[(8 * b + j) * LANES] = word(block + 2 + 4 * j) ^ MIDDLE;
}

// Super-scale, super-minimum and the eight six-bit pairs that Q4_K and Q5_K begin with.
void k_scales(const uint8_t* block, int64_t b, const Lane& to) {
  to.half(to.scale, b, block);
  const uint16_t minimum = negative(block + 2);
  std::memcpy(to.minimum + b * LANES * 2, &minimum, 2);
  const uint8_t* s = block + 4;
  for (int64_t i = 0; i < 8; i++) {
    const int scale = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | s[i - 4] >> 6 << 4;
    const int low = i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | s[i] >> 6 << 4;
    to.scale_bytes[(8 * b + i) * LANES] = static_cast<uint8_t>(scale);
    to.minimum_bytes[(8 * b + i) * LANES] = static_cast<uint8_t>(low);
  }
}

void q4_k(const uint8_t* block, int64_t b, const Lane& to) {
  k_scales(block, b, to);
  for (int64_t i = 0; i < 8; i++) {
    const uint8_t* codes = block + 16 + i / 2 * 32;
    for (int64_t j = 0; j < 4; j++) {
      const uint32_t first = word(codes + 4 * j), second = word(codes + 16 + 4 * j);
      to.codes[(4 * (8 * b + i) + j) * LANES] = i % 2 == 0 ? (first & LOW) | (second & LOW) << 4 : (first >> 4 & LOW) | (second & HIGH);
    }
  }
}

void q5_k(const uint8_t* block, int64_t b, const Lane& to) {
  k_scales(block, b, to);
  for (int64_t i = 0; i < 8; i++)
    for (int64_t j = 0; j < 8; j++) {
      const uint32_t fifth = word(block + 16 + 4 * j) >> i & 0x01010101;
      const uint32_t low = word(block + 48 + i / 2 * 32 + 4 * j) >> (i % 2 * 4) & LOW;
      to.codes[(8 * (8 * b + i) + j) * LANES] = (low | fifth << 4) + MIDDLE;
    }
}

void q6_k(const uint8_t* block, int64_t b, const Lane& to) {
  to.half(to.scale, b, block + 208);
  for (int64_t i = 0; i < 16; i++) to.scale_bytes[(16 * b + i) * LANES] = block[192 + i];
  for (int64_t i = 0; i < 8; i++)  // 32 values, of which 128 make a half of the block
    for (int64_t j = 0; j < 8; j++) {
      const uint32_t low = word(block + i / 4 * 64 + i % 2 * 32 + 4 * j) >> (i % 4 / 2 * 4) & LOW;
      const uint32_t high = word(block + 128 + i / 4 * 32 + 4 * j) >> (i % 4 * 2) & 0x03030303;
      to.codes[(8 * (8 * b + i) + j) * LANES] = (low | high << 4) + 0x60606060;  // from -32, and the middle
    }
}

// GGML's numbers of the types.
enum Kind { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

struct Form {
  int64_t elements, bytes, group;
  bool is_4bit, has_bytes, has_minimum;
};

bool form_of(int kind, Form* form) {
  switch (kind) {
    case Q4_0: *form = {32, 18, 32, true, false, false}; return true;
    case Q4_1: *form = {32, 20, 32, true, false, true}; return true;
    case Q5_0: *form = {32, 22, 32, false, false, false}; return true;
    case Q5_1: *form = {32, 24, 32, false, false, true}; return true;
    case Q8_0: *form = {32, 34, 32, false, false, false}; return true;
    case Q4_K: *form = {256, 144, 32, true, true, true}; return true;
    case Q5_K: *form = {256, 176, 32, false, true, true}; return true;
    case Q6_K: *form = {256, 210, 16, false, true, false}; return true;
    default: return false;
  }
}

void take_apart(int kind, const uint8_t* block, int64_t b, const Lane& to) {
  switch (kind) {
    case Q4_0: return q4(block, b, to, false);
    case Q4_1: return q4(block, b, to, true);
    case Q5_0: return q5(block, b, to, false);
    case Q5_1: return q5(block, b, to, true);
    case Q8_0: return q8_0(block, b, to);
    case Q4_K: return q4_k(block, b, to);
    case Q5_K: return q5_k(block, b, to);
    default: return q6_k(block, b, to);
  }
}

}  // namespace
}  // namespace realm

// Tiles first to last of a matrix [rows, inputs] stand in `records`, `record` bytes each. False, and nothing
// is done, for a type or a size of record that this code does not know.
extern "C" bool realm_tile(int kind, const uint8_t* data, int64_t rows, int64_t inputs, uint8_t* records, int64_t record, int64_t first, int64_t last) {
  using namespace realm;
  Form form;
  if (!form_of(kind, &form) || inputs % form.elements != 0) return false;
  const Weights w{nullptr, rows, inputs, form.group, form.elements, nullptr, form.is_4bit, false, form.has_bytes, form.has_minimum};
  if (record != w.record()) return false;
  const int64_t blocks = inputs / form.elements;
  for (int64_t tile = first; tile < last; tile++) {
    uint8_t* to = records + tile * record;
    if ((tile + 1) * LANES > rows) std::memset(to, 0, static_cast<size_t>(record));
    for (int64_t lane = 0; lane < LANES && tile * LANES + lane < rows; lane++) {
      uint8_t* scale = to + w.code_bytes();
      uint8_t* minimum = scale + w.factor_bytes();
      const Lane parts{reinterpret_cast<uint32_t*>(to) + lane, scale + 2 * lane, scale + w.super_bytes() + lane,
                       minimum + 2 * lane, minimum + w.super_bytes() + lane};
      const uint8_t* row = data + (tile * LANES + lane) * blocks * form.bytes;
      for (int64_t b = 0; b < blocks; b++) take_apart(kind, row + b * form.bytes, b, parts);
    }
  }
  return true;
}
