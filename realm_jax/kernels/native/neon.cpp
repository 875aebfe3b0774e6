// Arm since about 2018: Apple's M1, AWS Graviton 2, Raspberry Pi 5.
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace realm {
namespace {

#include "vector_neon.inl"

#include "matmul.inl"
#include "matmul_bf16.inl"
#include "norm.inl"
#include "rope.inl"
#include "attention.inl"
#include "cache.inl"
#include "low_rank.inl"

}  // namespace

extern const Kernels neon_kernels = {"neon", quantize, multiply, to_pairs, multiply_half, normalize, rotate, attend, write,
                                  add_low_rank};

}  // namespace realm
