// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the calibrated search: custom_ops/cpu/ldlq.inc, operation by operation.
//
// Every product, sum, quotient and root is one rounded IEEE operation (the _rn functions are never fused), and a sum of
// several terms goes from the first to the last, as there.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace ccq_ldlq {

constexpr int kGroup = 64;     // weights that share a local scale
constexpr int kBlock = 4;      // weights of one byte
constexpr int kBlocks = kGroup / kBlock;
constexpr int kEntries = 256;  // vectors a byte can stand for
constexpr float kLargestLocal = 15;
constexpr float kWorstScore = -3.0e38f;

__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float minus(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float plus_product(float sum, float a, float b) { return __fadd_rn(sum, __fmul_rn(a, b)); }

// sum + a.x b.x + a.y b.y + ..., in this order.
__device__ inline float plus_products(float sum, const float4& a, const float4& b) {
  sum = plus_product(sum, a.x, b.x);
  sum = plus_product(sum, a.y, b.y);
  sum = plus_product(sum, a.z, b.z);
  return plus_product(sum, a.w, b.w);
}

// To the nearest whole number, ties to even, for |v| < 2^22.
__device__ inline float whole(float v) { return minus(plus(v, 12582912.0f), 12582912.0f); }

__device__ inline float clamp_local(float v) {
  v = v < 1.0f ? 1.0f : v;
  return v > kLargestLocal ? kLargestLocal : v;
}

// The local scale of a group with this sum of squares that comes nearest to the best scale.
__device__ inline float nominal_local(float energy, float nominal, float super) {
  return whole(__fdiv_rn(times(__fsqrt_rn(times(energy, 1.0f / kGroup)), nominal), super));
}

__device__ inline float to_bfloat16(float value) {
  uint32_t bits = __float_as_uint(value);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  return __uint_as_float(bits);
}

__device__ inline float part(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Upper triangular R [4, 4], and x R.
struct Root {
  float4 row0, row1, row2, row3;

  __device__ explicit Root(const float* r)
      : row0(reinterpret_cast<const float4*>(r)[0]), row1(reinterpret_cast<const float4*>(r)[1]),
        row2(reinterpret_cast<const float4*>(r)[2]), row3(reinterpret_cast<const float4*>(r)[3]) {}

  __device__ float4 times_root(const float4& x) const {
    float4 y;
    y.x = times(x.x, row0.x);
    y.y = plus_product(times(x.x, row0.y), x.y, row1.y);
    y.z = plus_product(plus_product(times(x.x, row0.z), x.y, row1.z), x.z, row2.z);
    y.w = plus_product(plus_product(plus_product(times(x.x, row0.w), x.y, row1.w), x.z, row2.w), x.w, row3.w);
    return y;
  }
};

__device__ inline float square_norm(const float4& y) {
  return plus_product(plus_product(plus_product(times(y.x, y.x), y.y, y.y), y.z, y.z), y.w, y.w);
}

__device__ inline float4 times_all(const float4& y, float factor) {
  return make_float4(times(y.x, factor), times(y.y, factor), times(y.z, factor), times(y.w, factor));
}

// y.c - |c|^2/2 for one entry of a book.
__device__ inline float score(const float4& y, const float4& c, float half) {
  const float first = plus(times(y.x, c.x), times(y.y, c.y)), second = plus(times(y.z, c.z), times(y.w, c.w));
  return minus(plus(first, second), half);
}

}  // namespace ccq_ldlq
