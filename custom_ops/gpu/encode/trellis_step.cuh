// SPDX-License-Identifier: Apache-2.0
// One position of the trellis for 64 columns of a block: least cost over 256 previous states, for each of 256 states.
//
// A column is a channel at one super scale and one local scale; u are its four weights at a position, v the four
// values of a word, and the cost of a step is
//
//     J + |u - v|^2 = (-2u) . v  +  |v|^2  +  (J + |u|^2)
//
// which is an inner product of eight terms: four values; |v|^2 in two digits, times 2048 and 1; and J + |u|^2 in two
// digits, times 4096 and 1. The tensor cores compute it for 16 states and 8 columns at a time, in fp16 with float32 sums,
// exactly: all factors are integers that fp16 holds, every product and every partial sum is below 2^24. Costs are not
// negative, so that floats are ordered as their bits are, and a minimum of three takes one instruction.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "../common/trellis_code.h"

namespace ccq_trellis_kernel {

constexpr int kThreads = 256, kWarps = 8, kStates = 256, kColumns = 64;
constexpr int kClip = 767;                 // of |u|: trellis_reference.py
constexpr int kCostLimit = (1 << 22) - 1;  // costs of survivors stay below
// The cost of a state that no sequence may come from. A live sequence always wins against it: the cheapest one has no
// cost, and |u - v|^2 is at most 4 (767 + 255)^2 = 4,177,936. With |u|^2 of at most 2,353,156 it fits the digits.
constexpr int kDropped = 6000000;

// Words of shared memory: the factors of -2u and of |v|^2 for all columns, then the digits of J + |u|^2 of every state.
// Each area begins eight banks behind the one before, so that the four lanes of a row meet no bank conflict.
constexpr int kRow = kColumns, kArea = kRow + 8, kDigits = 3 * kArea + 32;
static_assert(kDigits % 32 == 24 && kArea % 32 == 8);

struct Operands {
  alignas(16) uint32_t words[kDigits + kStates * kRow];
};

// Where a column's word stands in a row: a lane loads the words of four of its columns at once.
__device__ inline int place(int column) { return column / 32 * 32 + column % 8 * 4 + column / 8 % 4; }

// An integer that fp16 holds, as its bits.
__device__ inline uint32_t half_bits(int value) {
#ifdef __CUDACC__
  return __half_as_ushort(__int2half_rn(value));
#else
  return emulated::half_of_integer(value);
#endif
}
__device__ inline uint32_t half_pair(int low, int high) { return half_bits(low) | half_bits(high) << 16; }

__device__ inline uint32_t cost_digits(int value) {
  const int high = (value + 2048) >> 12;
  return half_pair(high, value - (high << 12));
}

// The values of a word, which is the byte before << 8 | the byte.
__device__ inline void word_values(uint32_t word, int* v) {
  constexpr uint32_t kMultiplier[2] = {ccq::kTrellisMultiplier[0], ccq::kTrellisMultiplier[1]};
  constexpr uint32_t kAddend[2] = {ccq::kTrellisAddend[0], ccq::kTrellisAddend[1]};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t x = word * kMultiplier[j] + kAddend[j];
    v[2 * j] = static_cast<int>(x & 255u) - static_cast<int>(x >> 8 & 255u);
    v[2 * j + 1] = static_cast<int>(x >> 16 & 255u) - static_cast<int>(x >> 24);
  }
}

// The factors of all words in fragment order: [previous state][warp][lane] of two tiles of 16 states.
__device__ inline uint4 table_entry(int previous, int thread) {
  const int lane = thread % 32, g = lane / 4, t = lane % 4;
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int v[4];
    word_values(previous << 8 | (thread / 32 * 32 + 8 * i + g), v);
    const int norm = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
    w[i] = t == 0   ? half_pair(v[0], v[1])
           : t == 1 ? half_pair(v[2], v[3])
           : t == 2 ? half_pair(norm >> 11, norm & 2047)
                    : half_pair(4096, 1);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Rows g and g + 8 of a tile, columns 2t and 2t + 1 of eight: [0] g 2t, [1] g 2t+1, [2] g+8 2t, [3] g+8 2t+1.
struct Tile {
  int cost[4];  // the bits of floats
};

__device__ inline Tile multiply(uint32_t low_rows, uint32_t high_rows, uint32_t columns) {
  float d[4];
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(low_rows), "r"(high_rows), "r"(columns), "f"(0.0f));
#else
  emulated::multiply_16x8x8(d, low_rows, high_rows, columns);
#endif
  Tile tile;
#pragma unroll
  for (int i = 0; i < 4; ++i) tile.cost[i] = __float_as_int(d[i]);
  return tile;
}

// Costs of the 4 x 16 pairs of state and column that a thread keeps, [tile of states][tile of columns][place in it].
using Costs = int[2][8][4];

__device__ inline int state_of(int tile, int i) {
  return static_cast<int>(threadIdx.x) / 32 * 32 + 16 * tile + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * (i / 2);
}
__device__ inline int column_of(int tile, int i) { return 8 * tile + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }

// costs: the least of all previous states, as bits of floats.
__device__ inline void sweep(const uint4* __restrict__ table, const Operands& operands, Costs& costs) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint4* rows = table + threadIdx.x;
  const uint32_t* columns = operands.words + (t < 3 ? t * kArea : kDigits) + 4 * g;
  const int stride = t < 3 ? 0 : kRow;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) costs[m][n][i] = 0x7F000000;  // above every float here
  uint4 next0 = __ldg(rows), next1 = __ldg(rows + kThreads);
#pragma unroll 1
  for (int previous = 0; previous < kStates; previous += 2) {
    const uint4 a0 = next0, a1 = next1;
    rows += 2 * kThreads;
    if (previous < kStates - 2) next0 = __ldg(rows), next1 = __ldg(rows + kThreads);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 b0 = *reinterpret_cast<const uint4*>(columns + 32 * half);
      const uint4 b1 = *reinterpret_cast<const uint4*>(columns + stride + 32 * half);
      const uint32_t x0[4] = {b0.x, b0.y, b0.z, b0.w}, x1[4] = {b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Tile first0 = multiply(a0.x, a0.y, x0[n]), first1 = multiply(a0.z, a0.w, x0[n]);
        const Tile second0 = multiply(a1.x, a1.y, x1[n]), second1 = multiply(a1.z, a1.w, x1[n]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int& low = costs[0][4 * half + n][i];
          int& high = costs[1][4 * half + n][i];
          low = __vimin3_s32(low, first0.cost[i], second0.cost[i]);
          high = __vimin3_s32(high, first1.cost[i], second1.cost[i]);
        }
      }
    }
    columns += 2 * stride;
  }
}

}  // namespace ccq_trellis_kernel
