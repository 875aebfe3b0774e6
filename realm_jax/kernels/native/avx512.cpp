// Intel since Cascade Lake, AMD since Zen 4.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

// Only what stands between the pragmas may use these instructions: the standard library stays outside.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")

namespace realm {
namespace {

#include "vector_avx512.inl"

#include "matmul.inl"
#include "matmul_bf16.inl"
#include "norm.inl"
#include "rope.inl"
#include "attention.inl"
#include "cache.inl"
#include "low_rank.inl"

}  // namespace

extern const Kernels avx512_kernels = {"avx512", quantize, multiply, to_pairs, multiply_half, normalize, rotate, attend, write,
                                  add_low_rank};

}  // namespace realm

#pragma GCC pop_options
