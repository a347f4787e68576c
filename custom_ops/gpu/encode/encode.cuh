// SPDX-License-Identifier: Apache-2.0
// Score loops of the encoder: integers, so that any order of evaluation gives the CPU's choices.
//
// One thread holds one vector of a group at up to eight scales and scans the code book; kTeam threads
// (16 or 32) make up the group. While only the best score counts, the entry's index is left out: three
// instructions an entry (two dp2a, one max). 16-bit coordinates by 8-bit states, below 2^24.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "encode.h"

namespace ccq_encode_kernel {

constexpr int kGroup = 64;
constexpr int kBatch = CCQ_ENCODE_BATCH;
constexpr int kThreads = 256;
// Below this a super scale's reciprocal would leave float32; such a channel is stored as zeros.
constexpr float kSmallestSuper = 7.9e-31f;

struct Vector {
  int first, dims, word, shift, base, mask;  // book: entries base .. base + mask
  bool used;
};

__device__ inline Vector vector_of(const ccq_encode_layout& layout, int lane) {
  Vector v;
  v.used = lane < layout.vectors;
  const int i = v.used ? lane : 0;
  v.first = layout.vector[i].first;
  v.dims = layout.vector[i].dims;
  v.word = layout.vector[i].word;
  v.shift = layout.vector[i].shift;
  v.base = layout.vector[i].book ? layout.entries[0] : 0;
  v.mask = layout.entries[layout.vector[i].book] - 1;
  return v;
}

// round_to_nearest_even(w * (2^fraction / scale)), saturated to 16 bits.
__device__ inline int fixed_point(float w, float inverse) {
  const float y = __fmul_rn(w, inverse);
  return __float2int_rn(fminf(fmaxf(y, -32767.0f), 32767.0f));
}

__device__ inline int pack16(int low, int high) { return (low & 0xFFFF) | (high << 16); }

// One vector at one scale.
struct Point {
  int x01, x23;
};

__device__ inline Point load_point(const float* group, const Vector& v, float inverse) {
  int x[4];
#pragma unroll
  for (int d = 0; d < 4; ++d) x[d] = d < v.dims ? fixed_point(group[v.first + d], inverse) : 0;
  return {pack16(x[0], x[1]), pack16(x[2], x[3])};
}

__device__ inline int evaluate(const Point& p, int2 entry) {
  return __dp2a_hi(p.x23, entry.x, __dp2a_lo(p.x01, entry.x, entry.y));
}

// best[b] = largest score of point b over the entries of its book. Books of different size may meet in
// a warp (not with kOneBook): the smaller one is scanned again, which changes no maximum.
template <int kCount, bool kOneBook>
__device__ inline void best_scores(const int2* book, const Vector& v, int entries, const Point* points, int* best) {
#pragma unroll
  for (int b = 0; b < kCount; ++b) best[b] = INT32_MIN;
#pragma unroll 4
  for (int e = 0; e < entries; e += 2) {
    const int at = kOneBook ? e : v.base + (e & v.mask);
    const int4 two = *reinterpret_cast<const int4*>(book + at);
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      const int s0 = evaluate(points[b], make_int2(two.x, two.y));
      const int s1 = evaluate(points[b], make_int2(two.z, two.w));
      best[b] = max(max(s0, s1), best[b]);
    }
  }
}

// The best entry of one point; of equal ones the largest index.
__device__ inline int best_entry(const int2* book, const Vector& v, int entries, const Point& point, int& index) {
  int best = INT32_MIN;
  index = 0;
  for (int e = 0; e < entries; ++e) {
    const int s = evaluate(point, book[v.base + (e & v.mask)]);
    if (s >= best) {
      best = s;
      index = e & v.mask;
    }
  }
  return best;
}

__device__ inline int remainder_state(const ccq_encode_layout& layout, int x) {
  const int q = (x + (1 << (layout.fraction - 1))) >> layout.fraction;
  return min(max(q, layout.state_min), layout.state_max);
}

// The 64th row alone, where the layout has it: score and state at one scale.
__device__ inline int remainder_score(const ccq_encode_layout& layout, const float* group, float inverse) {
  if (!layout.remainder_shift) return 0;
  const int x = fixed_point(group[kGroup - 1], inverse), q = remainder_state(layout, x);
  return x * q - ((q * q) << layout.fraction) / 2;
}

template <int kTeam>
__device__ inline int team_sum(int value) {
#pragma unroll
  for (int step = kTeam / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  return value;
}

__device__ inline double gain(float scale, int score) {
  const double s = scale;
  return __dmul_rn(__dmul_rn(s, s), static_cast<double>(score));
}

__device__ inline float reciprocal(const ccq_encode_layout& layout, float scale) {
  return __fdiv_rn(static_cast<float>(1 << layout.fraction), scale);
}

__device__ inline int clamp_scale(const ccq_encode_layout& layout, double s) {
  return static_cast<int>(fmin(fmax(rint(s), 1.0), static_cast<double>(layout.scale_max)));
}

__device__ inline float local_scale(int local, float super) { return __fmul_rn(static_cast<float>(local), super); }

__device__ inline float to_bfloat16(double value) {
  uint32_t bits = __float_as_uint(__double2float_rn(value));
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  return __uint_as_float(bits);
}

}  // namespace ccq_encode_kernel
