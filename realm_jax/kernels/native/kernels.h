// What the kernels of one instruction set offer, over plain pointers. No state, no threads: a caller divides
// the work. Every result depends on its own row alone, never on how rows or outputs were divided.
//
// Letters: M rows, I inputs, O outputs, D features, B rows of a call, T tokens, N query heads, K kv heads,
// S slots, C capacity, H head dim.
#pragma once

#include <cstddef>
#include <cstdint>

namespace realm {

constexpr int64_t LANES = 16;   // outputs of a tile, and numbers of a vector
constexpr int64_t BLOCK = 32;   // inputs that share the scale of an activation
constexpr int64_t SPAN = 64;    // cache positions of one softmax block

// Rows in int8, a scale per BLOCK inputs: x = scale * code. With the codes of each weight group go their
// sum, by which a minimum is multiplied, and -offset times it, from which a product with codes starts.
struct Rows {
  const float* x;    // [M, I]
  int8_t* codes;     // [M, I]
  float* scales;     // [M, I / BLOCK]
  float* sums;       // [M, I / group]
  int32_t* starts;   // [M, I / group]
  int64_t inputs, group;
  int32_t offset;
};

// Weights in tiles of LANES outputs, one record of bytes each, as kernels/tiles.py describes:
// weight = scale * (code - offset) + minimum.
struct Weights {
  const uint8_t* records;
  int64_t outputs, inputs;
  int64_t group;        // inputs that share a scale: 16 or 32
  int64_t super_group;  // inputs that share a super-scale
  const uint8_t* table;  // 16 codes that 4-bit indices stand for; null: they are the codes
  bool is_4bit, is_float32, has_bytes, has_minimum;

  int64_t code_bytes() const { return inputs * LANES / (is_4bit ? 2 : 1); }
  int64_t super_bytes() const { return inputs / super_group * LANES * (is_float32 ? 4 : 2); }
  int64_t factor_bytes() const { return super_bytes() + (has_bytes ? inputs / group * LANES : 0); }
  int64_t record() const { return (code_bytes() + factor_bytes() * (has_minimum ? 2 : 1) + 63) / 64 * 64; }
};

struct Product {
  Weights weights;
  Rows rows;
  float* y;  // [M, O]
  int64_t count;  // M
};

// y = x @ weight.T in bf16 pairs.
struct HalfProduct {
  const uint16_t* weight;  // [O, I] bf16
  uint32_t* pairs;         // [M, I / 2] x in bf16
  const float* x;          // [M, I]
  float* y;                // [M, O]
  int64_t count, outputs, inputs;
};

struct Norm {
  const float* x;      // [M, D]
  const float* scale;  // [D]
  float* y;            // [M, D]
  int64_t features;
  float eps;
};

struct Rope {
  const float* x;    // [M, N, H], a row for each token
  const float* cos;  // [M, P]
  const float* sin;
  float* y;          // [M, N, H]
  int64_t stride;    // from a token's heads in x to the next one's
  int64_t heads, H, pairs;
  bool interleaved;  // a pair is (2i, 2i + 1), else (i, i + P)
};

// A bf16 cache is kept as the dot instruction takes it, in pairs of numbers and blocks of SPAN positions:
// keys [S, K, C / SPAN, H / 2, SPAN] of two neighbours of the head, values [S, K, C / SPAN, SPAN / 2, H] of two
// positions. H is a multiple of LANES.
struct Attention {
  const float* q;            // [B, T, N, H]
  const void* k;             // packed bf16, see below; or int8 [S, K, C, H] where there are scales
  const void* v;
  const float* k_scale;      // [S, K, C] or null
  const float* v_scale;
  const float* sinks;        // [N] scores that join the softmax without a value, or null
  const int32_t* slots;      // [B] or null: row b is slot b
  const int32_t* positions;  // [B, T]; at or past C: idle
  float* out;                // [B, T, N, H]
  int64_t B, T, N, K, S, C, H;
  float scale, softcap;      // softcap 0: none
  int64_t window;            // 0: none
  int64_t tokens;            // of an item: an item is (row, kv head, this many tokens)
  int64_t stride;            // from a token's queries to the next one's
};

struct CacheWrite {
  const float* x;            // [B, T, K, H]; H even
  const int32_t* slots;      // [B] or null: row b is slot b
  const int32_t* positions;  // [B, T]; at or past C: dropped
  void* cache;               // packed bf16, or int8 [S, K, C, H] where there are scales
  float* scales;             // [S, K, C] or null
  int64_t T, K, S, C, H;
  int64_t stride;            // from a token's heads in x to the next one's
  bool is_keys;
};

// What each row's adapters add to a projection of several parts, as kernels/low_rank.py describes; the bank in
// bf16 pairs, see low_rank.inl.
struct LowRank {
  const float* x;         // [M, I], `tokens` to a row
  float* y;               // [M, width]
  const uint16_t* bank;   // [slots, stride]
  const int32_t* ranks;   // [slots, projections]: ranks beyond are zeros
  const int32_t* index;   // [rows, adapters] slots; 0 or past the last: none
  const float* scale;     // [rows, adapters]
  const int64_t* outputs;  // [parts]
  const int32_t* order;   // [M] tokens; those with the same adapters stand together
  int64_t inputs, width, parts, rank, start, columns, stride, slots, projections, projection, adapters, tokens;
};

struct Kernels {
  const char* name;
  void (*quantize)(const Rows&, int64_t first, int64_t last);
  void (*multiply)(const Product&, int64_t first_tile, int64_t last_tile);
  void (*to_pairs)(const HalfProduct&, int64_t first, int64_t last);
  void (*multiply_half)(const HalfProduct&, int64_t first_output, int64_t last_output);
  void (*normalize)(const Norm&, int64_t first, int64_t last);
  void (*rotate)(const Rope&, int64_t first, int64_t last);
  void (*attend)(const Attention&, int64_t first_item, int64_t last_item);
  void (*write)(const CacheWrite&, int64_t first_token, int64_t last_token);
  void (*add_low_rank)(const LowRank&, int64_t first_token, int64_t last_token);
};

// Memory of this thread, at least so many bytes at a 64-byte boundary, valid until the next call.
void* scratch(size_t bytes);

}  // namespace realm
