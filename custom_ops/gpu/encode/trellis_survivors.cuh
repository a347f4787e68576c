// SPDX-License-Identifier: Apache-2.0
// One position of the calibrated search of ccq-2t for the columns of a block: least cost over 256 previous states, for
// each of 256 states.
//
// A column is one local scale of one channel. Every survivor has four targets u of its own, and y are the four values
// of a word in the block's metric, the same for all columns:
//
//     J + |u - y|^2 = (-2u) . y  +  |y|^2  +  (J + |u|^2)
//
// which is an inner product of eight terms, as in trellis_step.cuh: the last two in two digits each, times 4096 and 1.
// Tensor cores compute 16 states by 8 columns for one previous state, in fp16 with float32 sums, exactly: all factors are
// integers that fp16 holds, every partial sum is below 2^24. The digits stand for 2^23 more than the cost is, so that the
// bits of a sum are a constant and the cost: times 256 they leave room for the previous state, and a minimum of integers
// finds both.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "trellis_ldlq.h"
#include "trellis_step.cuh"

namespace ccq_calibrated_trellis {

using ccq_trellis_kernel::cost_digits;  // times 4096 and 1
using ccq_trellis_kernel::half_pair;
using ccq_trellis_kernel::kStates;
using ccq_trellis_kernel::word_values;

constexpr int kGroup = 64, kPositions = 16, kScaleMax = 15;
constexpr int kWindowRows = CCQ_TRELLIS_WINDOW, kWindowBlocks = kWindowRows / 4;
constexpr int kCostLimit = (1 << 22) - 1;
constexpr int kCostClip = 511;
constexpr float kLeastRms = 3.0f / 16.0f;

// A warp takes kParts times 16 states of all columns in a position's sums, and all states of kEach columns behind them.
// Two blocks a multiprocessor: while one has its sums made, the other finds the targets of its survivors.
constexpr int kColumns = 32, kTiles = kColumns / 8, kWarps = 8, kThreads = 32 * kWarps, kEach = kColumns / kWarps;
constexpr int kAllTiles = (1 << kTiles) - 1;
constexpr int kParts = kStates / 16 / kWarps, kBlocksEach = 64 / kColumns;

// The cost of a state that no sequence may come from. The cheapest survivor has no cost, |u| is at most 2 * 511 and |y| at
// most 2 * 255, so the least cost is below 2.4 million. With targets of any survivor, a dropped state's is above
// 5,000,000 - 2 * 1022 * 510, and a kept one's below 2^22 + 2.4 million: all fit 23 bits.
constexpr int kDropped = 5000000;
// Of 2^23, what |y|^2 brings and what J + |u|^2 does: no digit is above 2048.
constexpr int kWordOffset = 3 << 21, kCostOffset = 1 << 21;
static_assert(kWordOffset + kCostOffset == 1 << 23);

// Sixteen words with one previous state, as the tensor cores want them: of row and row + 8 their first two values, the
// last two, and the digits of |y|^2.
struct Sixteen {
  uint2 rows[8][3];
};
constexpr int kTable = kStates * kStates / 16;  // of one position: [previous state][16 states]

// Operands in shared memory: for each previous state, chunks of 4 columns that a lane loads at once, with their -2u of
// the first two weights, of the last two, and the digits of J + |u|^2. Four words more keep states apart in the banks.
constexpr int kChunk = 12, kQuad = 8 * kChunk, kQuads = kTiles / 4, kOperands = kQuads * kQuad + 4;
// What the digits of |y|^2 are multiplied by, as often as a lane of each half can take it from the banks that the others leave.
constexpr int kConstants = 32 + (kQuads - 1) * kQuad;
constexpr uint32_t kDigitFactors = 0x3C006C00;  // 4096 and 1 in fp16

__device__ inline int operand_place(int state, int column, int part) {
  const int tile = column / 8;
  return state * kOperands + tile / 4 * kQuad + column % 8 * kChunk + part * 4 + tile % 4;
}

__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }

// To nearest even, |y| < 2^22.
__device__ inline float whole(float y) { return sub(add(y, 12582912.0f), 12582912.0f); }

__device__ inline int rescaled(int cost, float factor) {
  const float c = mul(static_cast<float>(cost), factor);
  return static_cast<int>(c > static_cast<float>(kCostLimit) ? static_cast<float>(kCostLimit) : whole(c));
}

// x R for four weights.
__device__ inline void in_metric(const float* x, const float* root, float* y) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float sum = mul(x[0], root[j]);
#pragma unroll
    for (int i = 1; i <= j; ++i) sum = add(sum, mul(x[i], root[4 * i + j]));
    y[j] = sum;
  }
}

// Of a position: values of the words previous << 8 | 16 tile + row and row + 8 in its metric.
__device__ inline void make_words(int previous, int tile, int row, const float* root, Sixteen& out) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int v[4], y[4];
    word_values(previous << 8 | (16 * tile + row + 8 * half), v);
    float x[4], sum[4];
    for (int i = 0; i < 4; ++i) x[i] = static_cast<float>(v[i]);
    in_metric(x, root, sum);
    int norm = kWordOffset;
    for (int i = 0; i < 4; ++i) y[i] = static_cast<int>(whole(sum[i])), norm += y[i] * y[i];
    uint32_t* values = reinterpret_cast<uint32_t*>(out.rows[row]) + half;
    values[0] = half_pair(y[0], y[1]);
    values[2] = half_pair(y[2], y[3]);
    values[4] = cost_digits(norm);
  }
}

// Costs of 16 states and 8 columns, 2^23 more than they are, as bits of floats.
__device__ inline void multiply(int* cost, uint2 rows, uint32_t columns) {
  const ccq_trellis_kernel::Tile tile = ccq_trellis_kernel::multiply(rows.x, rows.y, columns);
#pragma unroll
  for (int i = 0; i < 4; ++i) cost[i] = tile.cost[i];
}

// Least cost << 8 | previous state of the 4 pairs of state and column that a thread keeps of each tile.
using Keys = int[kParts][kTiles][4];

__device__ inline int state_of(int part, int i) {
  const int thread = threadIdx.x;
  return (thread / 32 * kParts + part) * 16 + thread % 32 / 4 + 8 * (i / 2);
}
__device__ inline int column_of(int tile, int i) { return 8 * tile + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }

// What a warp needs of one previous state.
struct Previous {
  uint2 rows[kParts];
  int entry;  // state | tiles in which it is alive << 8
};

__device__ inline Previous previous_of(int entry, const Sixteen* table) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t at = (entry & 255) * uint32_t{16 * sizeof(Sixteen)} + (3 * g + (t < 2 ? t : 2)) * uint32_t{sizeof(uint2)};
  Previous found;
  found.entry = entry;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    found.rows[i].x = found.rows[i].y = kDigitFactors;
    if (t != 2) found.rows[i] = __ldg(reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(table + i) + at));
  }
  return found;
}

// Cost << 8 | previous state. Three of four are multiplied by step = 256, which the compiler must not know, and the fourth is
// put together from bytes: so multipliers and the units that find minima have the same to do.
__device__ inline int key_of(int cost, int state, int step, int i) {
  return static_cast<int>(i < 3 ? static_cast<uint32_t>(cost) * step + state : __byte_perm(cost, state, 0x2104));
}

__device__ inline void take_tile(Keys& best, int tile, const Previous& a, const Previous& b, uint32_t columns_a,
                                 uint32_t columns_b, int step) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    int one[4], two[4];
    multiply(one, a.rows[part], columns_a);
    multiply(two, b.rows[part], columns_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      best[part][tile][i] = __vimin3_s32(best[part][tile][i], key_of(one[i], a.entry & 255, step, i),
                                         key_of(two[i], b.entry & 255, step, i));
    }
  }
}

// Where a lane finds its operands of a previous state. Three of four lanes take the state's; the fourth takes constants
// from the eight banks that those of its quarter of a warp leave free.
struct Lane {
  const uint32_t *operands, *constants;
  bool constant;
  int shift;

  __device__ Lane(const uint32_t* all, const uint32_t* all_constants) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    operands = all + g * kChunk + (t < 3 ? t : 0) * 4, constants = all_constants;
    constant = t == 3, shift = g / 2 * 2 * kChunk + 2 * kChunk + g % 2 * 4;
  }
  __device__ const uint32_t* of(int state) const {
    return constant ? constants + (state * kOperands + shift) % 32 : operands + state * kOperands;
  }
};

// Least costs over two previous states.
__device__ inline void take_pair(Keys& best, const Lane& operands, const Previous& a, const Previous& b, int step) {
  const int tiles = (a.entry | b.entry) >> 8, missing = ~tiles & kAllTiles;
  const uint32_t *columns_a = operands.of(a.entry & 255), *columns_b = operands.of(b.entry & 255);
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const uint4 first = *reinterpret_cast<const uint4*>(columns_a + quad * kQuad);
    const uint4 second = *reinterpret_cast<const uint4*>(columns_b + quad * kQuad);
    const uint32_t x[4] = {first.x, first.y, first.z, first.w}, y[4] = {second.x, second.y, second.z, second.w};
    // Branches keep products of different tiles apart from each other: one tile left out is not worth them.
    if ((missing & (missing - 1)) == 0) {
#pragma unroll
      for (int n = 0; n < 4; ++n) take_tile(best, 4 * quad + n, a, b, x[n], y[n], step);
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (tiles >> (4 * quad + n) & 1) take_tile(best, 4 * quad + n, a, b, x[n], y[n], step);
    }
  }
}

// entries [count]: previous states that are alive in any column. constants [kConstants]: kDigitFactors.
__device__ inline void sweep(const Sixteen* table, const uint32_t* all_operands, const uint32_t* constants,
                             const uint16_t* entries, int count, int step, Keys& best) {
  const Lane operands(all_operands, constants);
  table += threadIdx.x / 32 * kParts;
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) best[part][n][i] = 0x7FFFFFFF;
  if (count == 0) return;
  // A pair in work, the next one on its way: the second-level cache is slow to answer. Behind the end the last entry is
  // taken again.
  auto load = [&](int at) { return previous_of(entries[at < count ? at : count - 1], table); };
  Previous even[2] = {load(0), load(1)}, odd[2] = {load(2), load(3)};
#pragma unroll 1
  for (int at = 0; at < count; at += 4) {
    take_pair(best, operands, even[0], even[1], step);
    if (at + 2 >= count) break;
    even[0] = load(at + 4), even[1] = load(at + 5);
    take_pair(best, operands, odd[0], odd[1], step);
    odd[0] = load(at + 6), odd[1] = load(at + 7);
  }
}

}  // namespace ccq_calibrated_trellis
