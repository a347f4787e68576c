// SPDX-License-Identifier: Apache-2.0
// All positions of a group, or of a window, for the columns of a block: survivors with the bytes of their own sequences.
//
// A survivor's rows (trellis_ldlq_reference.py) are not kept. What they are at a position follows from its bytes of the
// group and from the rows at the group's start, in the same order of additions.
#pragma once

#include "trellis_survivors.cuh"

namespace ccq_calibrated_trellis {

constexpr int kTriesMost = 29;                   // local scales of a window that lie in 1 to 15
constexpr int kSweepTries = 3;                   // local scales that a sweep tries
constexpr int kKeyRow = kStates + 4;             // of a column's keys in shared memory, in words
constexpr int kWindowRow = 72;                   // of a window's rows in memory

__host__ __device__ inline int slots_of(int tries) { return kColumns / tries; }

// A block's own device memory: survivors in the order of their states.
struct BlockMemory {
  uint4 bytes[2][kColumns][kStates];             // a survivor's bytes of the group
  uint8_t origin[2][kColumns][kStates];          // which survivor of the group's start it comes from
  uint8_t state[kColumns][kStates];              // of the last position
  int cost[kColumns][kStates];
};
static_assert(sizeof(BlockMemory) % 256 == 0);

// What the kernels pass on, in device memory.
struct Plan {
  int64_t n, k;
  const float *weight, *h, *inverse;
  ccq_trellis_factors all, windows;
  float nominal;
  int low, high, beam, blocks, step;
  // Of the group or window at work, by position: words in the metric, and rows of M before it with its four columns.
  Sixteen* tables;          // [kWindowBlocks, kTable]
  float4* factors;          // [kWindowBlocks, 64]
  BlockMemory* memory;      // [blocks]
  float* begin;             // [blocks, slots, 256, 64]: rows at the group's start
  // Survivors between groups: their costs, states, and bytes of the last group behind the byte `entry`.
  int* kept_count;          // [n]
  int* kept_cost;           // [n, 256]
  uint8_t* kept_state;      // [n, 256]
  uint4* kept_bytes;        // [n, 256]
  uint8_t* entry;           // [n]
  // What the group at work changes behind it: errors decided, zeros stored, moves of a window.
  uint8_t *decides, *stores_zeros;  // [n]
  float* changes;           // [n, kWindowRows]
  float *x;                 // [n, k]: weights with what decided errors ask of them
  float *error, *gradient, *target;  // [n, k]: w - w', that times H, and w times H
  // Of the super scale at work.
  float* super;             // [n]
  uint8_t* words;           // [n, k/4]
  uint8_t* scales;          // [n, k/64]
  double* loss;             // [n]
};

// Rows of a group or a window, and what belongs to its positions.
struct Span {
  const float *root, *unit, *ratio, *spread;
  int positions;
};

struct Shared {
  // Between sweep() and settle(): keys [column][kKeyRow]. Before the first position: what begin_rows() needs.
  alignas(128) uint32_t operands[kStates * kOperands];
  alignas(128) uint32_t constants[kConstants];
  int kept[kWarps][kStates];                     // a warp's survivors of one column: cost << 8 | previous state
  uint8_t states[kWarps][kStates];
  unsigned alive[kColumns][kStates / 32];        // a column's survivors: a bit for each state,
  uint8_t before[kColumns][kStates / 32];        // and how many have lower words
  unsigned tiles[kStates / 4];                   // a byte for each state: tiles in which it is alive
  uint16_t entries[kStates];                     // state | tiles << 8 where there are any
  int entry_count;
  double value[kColumns];
  uint8_t local[kColumns];                       // 0: nothing to do
  uint16_t count[kColumns];                      // survivors in the end
  // Of a slot, which is a channel of the block:
  float super[kColumns];
  uint16_t start_count[kColumns];
  uint8_t middle[kColumns], cheapest[kColumns];
  uint8_t entry[kColumns], behind[kColumns], fixed[kColumns];  // of a window: byte before, scale and byte behind it
};
static_assert(kTiles <= 8 && kBlocksEach * (sizeof(Shared) + 1024) <= 228 * 1024);

__device__ inline int warp_least(int value) {
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_xor_sync(0xFFFFFFFFu, value, step, 32);
    value = other < value ? other : value;
  }
  return value;
}

// word_values() as floats.
__device__ inline void word_floats(uint32_t word, float* v) {
#ifdef __CUDACC__
  // A byte in a float of 2^23 and more is the byte's number.
  constexpr uint32_t kMultiplier[2] = {ccq::kTrellisMultiplier[0], ccq::kTrellisMultiplier[1]};
  constexpr uint32_t kAddend[2] = {ccq::kTrellisAddend[0], ccq::kTrellisAddend[1]};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t x = word * kMultiplier[j] + kAddend[j];
    float byte[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) byte[i] = __uint_as_float(__byte_perm(x, 0x4B000000u, 0x7440u + i));
    v[2 * j] = __fsub_rn(byte[0], byte[1]);
    v[2 * j + 1] = __fsub_rn(byte[2], byte[3]);
  }
#else
  int values[4];
  word_values(word, values);
  for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(values[i]);
#endif
}

// w - w' of a word's four weights.
__device__ inline void errors_of(uint32_t word, const float* w, float scale, float* e) {
  float v[4];
  word_floats(word, v);
#pragma unroll
  for (int i = 0; i < 4; ++i) e[i] = sub(w[i], mul(scale, v[i]));
}

class Columns {
 public:
  __device__ Columns(const Plan& plan, Shared& shared, int tries)
      : p_(plan), sh_(shared), mine_(plan.memory[blockIdx.x]), groups_(static_cast<int>(plan.k / kGroup)), tries_(tries),
        slots_(slots_of(tries)) {}

 protected:
  __device__ int64_t channel_of(int slot) const { return first_channel_ + slot; }
  __device__ bool here(int slot) const { return slot < slots_ && channel_of(slot) < p_.n; }

  __device__ static int beam(int widest, float spread) {
    return static_cast<int>(whole(mul(static_cast<float>(widest), spread)));
  }
  // The cost taken off, in the units of the loss.
  __device__ static double value_of(int least, float unit, float scale) {
    const double s = scale;
    return __dmul_rn(__dmul_rn(__dmul_rn(static_cast<double>(least), static_cast<double>(unit)), s), s);
  }

  // Positions of a span for all columns with a local scale; then count, value and mine_ hold their survivors.
  // weights, rows: of a slot; survivors' rows are kGroup apart. factors: of a column's costs at the start.
  __device__ void search(const Span& span) {
    // Columns of one channel have about as many survivors: they go to different warps.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < kStates / 4; i += kThreads) sh_.tiles[i] = 0;
    for (int i = threadIdx.x; i < kConstants; i += kThreads) sh_.constants[i] = kDigitFactors;
    __syncthreads();
    for (int i = 0; i < kEach; ++i)
      if (sh_.local[i * kWarps + warp]) begin_column(span, i * kWarps + warp);
    __syncthreads();
    for (int b = 0; b < span.positions; ++b) {
      list_entries();
      int keys[kEach][kStates / 32];
      {
        Keys best;
        sweep(p_.tables + static_cast<int64_t>(b) * kTable, sh_.operands, sh_.constants, sh_.entries, sh_.entry_count, p_.step, best);
        __syncthreads();
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              sh_.operands[column_of(n, i) * kKeyRow + state_of(part, i)] = static_cast<uint32_t>(best[part][n][i]);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kStates / 32; ++j)
          keys[i][j] = static_cast<int>(sh_.operands[(i * kWarps + warp) * kKeyRow + 32 * j + lane]);
      __syncthreads();
      // One copy of the code: the next column's keys move up.
#pragma unroll 1
      for (int i = 0; i < kEach; ++i) {
        if (sh_.local[i * kWarps + warp]) settle(span, b, i * kWarps + warp, keys[0]);
#pragma unroll
        for (int j = 0; j + 1 < kEach; ++j)
#pragma unroll
          for (int s = 0; s < kStates / 32; ++s) keys[j][s] = keys[j + 1][s];
      }
      __syncthreads();
    }
  }

  const Plan& p_;
  Shared& sh_;
  BlockMemory& mine_;
  const int groups_, tries_, slots_;
  int64_t first_channel_ = 0;
  // Of a slot, `..._stride_` apart: weights of the span, rows of its start.
  const float *weights_ = nullptr, *rows_ = nullptr;
  int64_t weight_stride_ = 0, row_stride_ = 0;
  bool window_ = false;

 private:
  __device__ float scale_at(int b, int column) const {
    const int slot = column / tries_;
    return mul(static_cast<float>(b == kPositions ? sh_.behind[slot] : sh_.local[column]), sh_.super[slot]);
  }

  // The start's survivors of a column.
  __device__ void begin_column(const Span& span, int column) {
    const int slot = column / tries_, local = sh_.local[column];
    const int64_t channel = channel_of(slot);
    const int lane = threadIdx.x % 32;
    forget(column);
    if (lane < kStates / 32) sh_.alive[column][lane] = 0;
    __syncwarp();
    const float inverse = __fdiv_rn(1.0f, scale_at(0, column));
    for (int i = lane; i < sh_.start_count[slot]; i += 32) {
      int state = sh_.entry[slot], cost = 0;
      if (!window_) {
        const int before = sh_.behind[slot];  // the last group's local scale
        state = p_.kept_state[channel * kStates + i];
        cost = p_.kept_cost[channel * kStates + i];
        if (before)
          cost = rescaled(cost, mul(__fdiv_rn(static_cast<float>(before * before), static_cast<float>(local * local)),
                                    span.ratio[0]));
      }
      atomicOr(&sh_.alive[column][state / 32], 1u << state % 32);
      const uint32_t none[4] = {0, 0, 0, 0};
      place(span, 0, column, state, cost, none, i, 0.0f, inverse);
    }
    __syncwarp();
    if (lane < kStates / 32) {
      int count = 0;
      for (int j = 0; j < lane; ++j) count += __popc(sh_.alive[column][j]);
      sh_.before[column][lane] = static_cast<uint8_t>(count);
    }
  }

  // Which survivor of a column has a state.
  __device__ int survivor(int column, int state) const {
    return sh_.before[column][state / 32] + __popc(sh_.alive[column][state / 32] & ((1u << state % 32) - 1));
  }

  // No state of the column is alive.
  __device__ void forget(int column) {
    const uint32_t dropped = cost_digits(kCostOffset + kDropped);
    for (int state = threadIdx.x % 32; state < kStates; state += 32)
      for (int part = 0; part < 3; ++part) sh_.operands[operand_place(state, column, part)] = part == 2 ? dropped : 0;
  }

  // Previous states of the next position, for all warps.
  __device__ void list_entries() {
    if (threadIdx.x < 32) {
      int count = 0;
      for (int first = 0; first < kStates; first += 32) {
        const int state = first + static_cast<int>(threadIdx.x);
        const unsigned tiles = sh_.tiles[state / 4] >> 8 * (state % 4) & 255u;
        const unsigned alive = __ballot_sync(0xFFFFFFFFu, tiles != 0);
        if (tiles)
          sh_.entries[count + __popc(alive & ((1u << threadIdx.x) - 1))] = static_cast<uint16_t>(state | tiles << 8);
        count += __popc(alive);
      }
      __syncwarp();
      for (int i = threadIdx.x; i < kStates / 4; i += 32) sh_.tiles[i] = 0;
      if (threadIdx.x == 0) sh_.entry_count = count;
    }
    __syncthreads();
  }

  // Survivors of position b of one column, by one warp, and their operands for the next position.
  __device__ void settle(const Span& span, int b, int column, const int (&keys)[kStates / 32]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slot = column / tries_;
    const int fixed = b == kPositions ? sh_.fixed[slot] : -1;
    int least = 0x7FFFFFFF;
#pragma unroll
    for (int j = 0; j < kStates / 32; ++j)
      if (fixed < 0 || 32 * j + lane == fixed) least = min(least, keys[j]);
    least = warp_least(least) >> 8;
    if (lane == 0) sh_.value[column] = __dadd_rn(sh_.value[column], value_of(least, span.unit[b], scale_at(b, column)));
    const int widest = beam(p_.beam, span.spread[b]);
    int* kept = sh_.kept[warp];
    uint8_t* states = sh_.states[warp];
    __syncwarp();  // the column before is done with both
    int count = 0, own_before = 0;
    unsigned own_alive = 0;  // of lane j: word j of the survivors
#pragma unroll
    for (int j = 0; j < kStates / 32; ++j) {
      const int cost = (keys[j] >> 8) - least;
      const bool lives = (fixed < 0 || 32 * j + lane == fixed) && cost <= widest;
      const unsigned all = __ballot_sync(0xFFFFFFFFu, lives);
      const int at = count + __popc(all & ((1u << lane) - 1));
      if (lives) kept[at] = cost << 8 | (keys[j] & 255), states[at] = static_cast<uint8_t>(32 * j + lane);
      if (lane == j) own_alive = all, own_before = count;
      count += __popc(all);
    }
    const bool last = b + 1 == span.positions;
    if (!last) forget(column);
    __syncwarp();
    const uint4* old = mine_.bytes[b & 1][column];
    uint4* next = mine_.bytes[(b + 1) & 1][column];
    float ratio = last ? 0.0f : span.ratio[b + 1];
    const int local = sh_.local[column];
    if (b + 1 == kPositions && !last) {
      const int behind = sh_.behind[slot];
      ratio = mul(__fdiv_rn(static_cast<float>(local * local), static_cast<float>(behind * behind)), ratio);
    }
    const float scale = scale_at(0, column), inverse = last ? 0.0f : __fdiv_rn(1.0f, scale_at(b + 1, column));
    for (int i = lane; i < count; i += 32) {
      const int from = survivor(column, kept[i] & 255), cost = kept[i] >> 8, state = states[i];
      uint32_t bytes[4] = {0, 0, 0, 0};
      if (b) {
        const uint4 before = old[from];
        bytes[0] = before.x, bytes[1] = before.y, bytes[2] = before.z, bytes[3] = before.w;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (b / 4 == j) bytes[j] |= static_cast<uint32_t>(state) << (8 * (b % 4));
      const int origin = b ? mine_.origin[b & 1][column][from] : from;
      next[i] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
      mine_.origin[(b + 1) & 1][column][i] = static_cast<uint8_t>(origin);
      if (last) {
        mine_.cost[column][i] = cost;
        mine_.state[column][i] = static_cast<uint8_t>(state);
      } else {
        place(span, b + 1, column, state, rescaled(cost, ratio), bytes, origin, scale, inverse);
      }
    }
    if (last && lane == 0) sh_.count[column] = static_cast<uint16_t>(count);
    __syncwarp();
    if (lane < kStates / 32) sh_.alive[column][lane] = own_alive, sh_.before[column][lane] = static_cast<uint8_t>(own_before);
  }

  // Operands of one survivor at position b: its four targets after the errors of its bytes before b.
  __device__ void place(const Span& span, int b, int column, int state, int cost, const uint32_t (&bytes)[4], int origin,
                        float scale, float inverse) {
    const int slot = column / tries_;
    const float* w = weights_ + slot * weight_stride_;
    const float4 begin = *reinterpret_cast<const float4*>(rows_ + slot * row_stride_ + origin * kGroup + 4 * b);
    float x[4] = {begin.x, begin.y, begin.z, begin.w};
    const float4* factors = p_.factors + b * kGroup;
    uint32_t before = window_ ? sh_.entry[slot] : p_.kept_state[channel_of(slot) * kStates + origin];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = 4 * j + i;
        if (position >= b) continue;
        const uint32_t byte = bytes[j] >> (8 * i) & 255u;
        const float4 four = *reinterpret_cast<const float4*>(w + 4 * position);
        const float weights[4] = {four.x, four.y, four.z, four.w};
        float e[4];
        errors_of(before << 8 | byte, weights, scale, e);
        before = byte;
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const float4 m = __ldg(factors + 4 * position + d);
          x[0] = add(x[0], mul(e[d], m.x));
          x[1] = add(x[1], mul(e[d], m.y));
          x[2] = add(x[2], mul(e[d], m.z));
          x[3] = add(x[3], mul(e[d], m.w));
        }
      }
    float y[4];
    in_metric(x, span.root + 16 * b, y);
    int u[4], square = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float at = mul(y[j], inverse);
      at = at < -kCostClip ? -static_cast<float>(kCostClip) : at;
      at = at > kCostClip ? static_cast<float>(kCostClip) : at;
      u[j] = static_cast<int>(whole(at));
      square += u[j] * u[j];
    }
    sh_.operands[operand_place(state, column, 0)] = half_pair(-2 * u[0], -2 * u[1]);
    sh_.operands[operand_place(state, column, 1)] = half_pair(-2 * u[2], -2 * u[3]);
    sh_.operands[operand_place(state, column, 2)] = cost_digits(kCostOffset + cost + square);
    atomicOr(&sh_.tiles[state / 4], 1u << (8 * (state % 4) + column / 8));
  }
};

}  // namespace ccq_calibrated_trellis
