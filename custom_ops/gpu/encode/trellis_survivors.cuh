// SPDX-License-Identifier: Apache-2.0
// One position of the calibrated search of ccq-2t for one column: survivors that carry the errors of their own
// sequences. The operations of custom_ops/cpu/trellis_ldlq.cpp, one by one; nothing is fused.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "trellis_ldlq.h"
#include "trellis_step.cuh"

namespace ccq_calibrated_trellis {

using ccq_trellis_kernel::kStates;
using ccq_trellis_kernel::word_values;

constexpr int kThreads = 256, kWarps = 8, kGroup = 64, kPositions = 16, kScaleMax = 15;
constexpr int kWindowRows = CCQ_TRELLIS_WINDOW, kWindowBlocks = kWindowRows / 4;
constexpr int kRows = 72;    // of a survivor in memory
constexpr int kBytes = 20;   // positions of a survivor in memory
constexpr int kCostLimit = (1 << 22) - 1;
constexpr int kCostClip = 511;
constexpr float kLeastRms = 3.0f / 16.0f;

__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }

// To nearest even, |y| < 2^22.
__device__ inline float whole(float y) { return sub(add(y, 12582912.0f), 12582912.0f); }

__device__ inline int rescaled(int cost, float factor) {
  const float c = mul(static_cast<float>(cost), factor);
  return static_cast<int>(c > static_cast<float>(kCostLimit) ? static_cast<float>(kCostLimit) : whole(c));
}

__device__ inline uint32_t pack16(int low, int high) {
  return (static_cast<uint32_t>(low) & 0xFFFFu) | static_cast<uint32_t>(high) << 16;
}
__device__ inline int low16(uint32_t x) { return static_cast<int16_t>(x & 0xFFFFu); }
__device__ inline int high16(uint32_t x) { return static_cast<int16_t>(x >> 16); }

// Sixteen times the values of a word in the metric of one block, rounded.
__device__ inline uint2 word_in_metric(uint32_t word, const float* root) {
  int v[4], y[4];
  word_values(word, v);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float sum = mul(static_cast<float>(v[0]), root[j]);
#pragma unroll
    for (int i = 1; i <= j; ++i) sum = add(sum, mul(static_cast<float>(v[i]), root[4 * i + j]));
    y[j] = 16 * static_cast<int>(whole(sum));
  }
  return make_uint2(pack16(y[0], y[1]), pack16(y[2], y[3]));
}

// Sequences that are still alive, in the order of their states; rows and bytes in device memory.
struct Survivors {
  int count;
  int cost[kStates];
  uint8_t state[kStates];
  uint8_t origin[kStates];  // which survivor of the group's start it comes from
};

// The memory of one set of survivors.
struct Rows {
  float* rows;     // [256, kRows]: errors before the position, what is to be encoded from it on
  uint8_t* bytes;  // [256, kBytes]
};

// What one position needs to know.
struct Position {
  const uint2* table;  // [65536]: word_in_metric()
  const float* w;      // weights of the rows [rows]
  const float* m;      // rows of the factor M, `stride` apart
  int64_t stride;
  const float* root;
  float unit, scale;
  int number, rows, beam, fixed;  // fixed: the only byte allowed, or -1
};

struct StepShared {
  uint32_t key[kStates], target[2][kStates];
  uint8_t place[kStates], from[kStates];
  uint32_t least[kWarps];
  int counts[kWarps];
};

// Smallest value of all threads.
__device__ inline uint32_t block_least(uint32_t value, StepShared& sh) {
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, value, step, 32);
    value = other < value ? other : value;
  }
  if (threadIdx.x % 32 == 0) sh.least[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) value = sh.least[w] < value ? sh.least[w] : value;
  __syncthreads();
  return value;
}

// How many threads before this one hold, and how many do.
__device__ inline int block_place(bool holds, StepShared& sh, int* all) {
  const unsigned mine = __ballot_sync(0xFFFFFFFFu, holds);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) sh.counts[warp] = __popc(mine);
  __syncthreads();
  int before = __popc(mine & ((1u << lane) - 1)), total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += sh.counts[w];
    total += sh.counts[w];
  }
  __syncthreads();
  *all = total;
  return before;
}

// now -> next; returns the cost taken off all survivors.
__device__ inline uint32_t step(const Survivors& now, const Rows& now_memory, Survivors& next, const Rows& next_memory,
                                const Position& p, StepShared& sh) {
  const int self = threadIdx.x, at = 4 * p.number;
  if (self < now.count) {
    const float inverse = __fdiv_rn(1.0f, p.scale);
    const float* x = now_memory.rows + self * kRows + at;
    int u[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float sum = mul(x[0], p.root[j]);
#pragma unroll
      for (int i = 1; i <= j; ++i) sum = add(sum, mul(x[i], p.root[4 * i + j]));
      float y = mul(sum, inverse);
      y = y < -kCostClip ? -static_cast<float>(kCostClip) : y;
      y = y > kCostClip ? static_cast<float>(kCostClip) : y;
      u[j] = 16 * static_cast<int>(whole(y));
    }
    sh.key[self] = static_cast<uint32_t>(now.cost[self]) << 8 | now.state[self];
    sh.target[0][self] = pack16(u[0], u[1]);
    sh.target[1][self] = pack16(u[2], u[3]);
    sh.place[now.state[self]] = static_cast<uint8_t>(self);
  }
  __syncthreads();
  uint32_t best = ~0u;
#pragma unroll 8
  for (int s = 0; s < now.count; ++s) {
    const uint32_t key = sh.key[s], u01 = sh.target[0][s], u23 = sh.target[1][s];
    const uint2 v = __ldg(p.table + ((key & 255u) << 8) + self);
    const int e0 = low16(v.x) - low16(u01), e1 = high16(v.x) - high16(u01);
    const int e2 = low16(v.y) - low16(u23), e3 = high16(v.y) - high16(u23);
    const uint32_t cost = key + static_cast<uint32_t>(e0 * e0) + static_cast<uint32_t>(e1 * e1) +
                          static_cast<uint32_t>(e2 * e2) + static_cast<uint32_t>(e3 * e3);
    best = cost < best ? cost : best;
  }
  const bool allowed = p.fixed < 0 || self == p.fixed;
  const uint32_t least = block_least(allowed ? best : ~0u, sh) >> 8;
  const int cost = static_cast<int>((best >> 8) - least);
  int count;
  const bool lives = allowed && cost <= p.beam;
  const int place = block_place(lives, sh, &count);
  if (lives) {
    const int from = sh.place[best & 255u];
    next.cost[place] = cost;
    next.state[place] = static_cast<uint8_t>(self);
    next.origin[place] = p.number ? now.origin[from] : static_cast<uint8_t>(from);
    sh.from[place] = static_cast<uint8_t>(from);
    int v[4];
    word_values(static_cast<uint32_t>(now.state[from]) << 8 | self, v);
    float* rows = next_memory.rows + place * kRows;
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[at + i] = sub(p.w[at + i], mul(p.scale, static_cast<float>(v[i])));
    next_memory.bytes[place * kBytes + p.number] = static_cast<uint8_t>(self);
  }
  if (self == 0) next.count = count;
  __syncthreads();
  // A warp takes one survivor's rows after the other; rows of the factor are the same for all.
  constexpr int kChunks = (kWindowRows + 31) / 32;
  const int lane = self % 32;
  float m[kChunks][4];
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = lane + 32 * c;
      m[c][i] = r >= at + 4 && r < p.rows ? p.m[(at + i) * p.stride + r] : 0.0f;
    }
#pragma unroll 2
  for (int s = self / 32; s < count; s += kWarps) {
    const int from = sh.from[s];
    const float* old = now_memory.rows + from * kRows;
    float* rows = next_memory.rows + s * kRows;
    const float4 e = *reinterpret_cast<const float4*>(rows + at);
    float x[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int r = lane + 32 * c;
      x[c] = r < p.rows ? old[r] : 0.0f;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int r = lane + 32 * c;
      if (r >= p.rows || (r >= at && r < at + 4)) continue;
      if (r > at) x[c] = add(add(add(add(x[c], mul(e.x, m[c][0])), mul(e.y, m[c][1])), mul(e.z, m[c][2])), mul(e.w, m[c][3]));
      rows[r] = x[c];
    }
    if (lane < p.number) next_memory.bytes[s * kBytes + lane] = now_memory.bytes[from * kBytes + lane];
  }
  __syncthreads();
  return least;
}

// The cheapest survivor; the first among equals.
__device__ inline int cheapest(const Survivors& s, StepShared& sh) {
  const int self = threadIdx.x;
  return block_least(self < s.count ? static_cast<uint32_t>(s.cost[self]) << 8 | self : ~0u, sh) & 255u;
}

}  // namespace ccq_calibrated_trellis
