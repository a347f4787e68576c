// SPDX-License-Identifier: Apache-2.0
// One thread block takes some jobs through all groups: forwards with every local scale of the window, and back.
//
// A job is a channel at one super scale. All local scales that a group tries are columns of one call of sweep():
// column = job of the block * tries + number of the local scale. After sixteen positions the best of a job's columns
// is kept, and its costs are where all columns of the job start from in the next group. No back pointers are stored:
// the costs before every position are, in 16 bits (a dropped state has none), and the traceback looks for the least
// sum again, 256 of them a position where the way forward had 65,536.
#pragma once

#include "trellis.h"
#include "trellis_step.cuh"

namespace ccq_trellis_kernel {

constexpr int kGroup = 64, kPositions = 16, kScaleMax = 15;
constexpr double kLeastRms = 3.0 / 16.0;
constexpr uint16_t kNoCost = 0xFFFF;

__host__ __device__ inline int64_t path_costs(int64_t groups) { return groups * kPositions * kStates; }
// 16-bit costs of a block: of the group at hand [position][state][column], of its jobs [job][group][position][state].
__host__ __device__ inline int64_t block_costs(int64_t groups, int tries) {
  return kPositions * kStates * kColumns + kColumns / tries * path_costs(groups);
}

// What the kernels pass on, in device memory.
struct Plan {
  const float* weight;
  int64_t n, k;
  int kappas, low, tries, beam, blocks;
  double nominal;
  uint4* table;       // [256, 256]: table_entry()
  double* energies;   // [n, groups]: sum of w^2 in a group
  float* supers;      // [n, kappas]: 0 where there is no other super scale to try
  int64_t* values;    // [n, kappas]: sum of the groups' values, the less the better
  uint8_t* words;     // [n, kappas, k/4]
  uint8_t* scales;    // [n, kappas, groups]
  uint8_t* ends;      // [n, kappas, groups]: the cheapest survivor's last byte
  uint16_t* costs;    // [blocks, block_costs()]
};

struct Shared {
  Operands operands;
  int reduced[kWarps][kColumns];
  int least[kColumns], square[kColumns], score[kColumns];
  int local[kColumns];                   // 0: the column has nothing to do
  float inverse[kColumns];
  int slot[kColumns];                    // a column's job of the block
  int before[kColumns], chosen[kColumns], end[kColumns];  // of a job: its last local scale (0: a run begins), column
  int64_t total[kColumns];
};

__device__ inline float inverse_scale(int local, float super) {
  return __fdiv_rn(1.0f, __fmul_rn(static_cast<float>(local), super));
}
__device__ inline int fixed_point(float w, float inverse) {
  const float limit = kClip;
  return __float2int_rn(fminf(fmaxf(__fmul_rn(w, inverse), -limit), limit));
}

class Block {
 public:
  __device__ Block(const Plan& plan, Shared& shared)
      : p_(plan), sh_(shared), groups_(static_cast<int>(plan.k / kGroup)), slots_(kColumns / plan.tries),
        group_costs_(plan.costs + blockIdx.x * block_costs(groups_, plan.tries)),
        path_costs_(group_costs_ + kPositions * kStates * kColumns) {}

  __device__ int64_t batches() const { return (jobs() + slots_ - 1) / slots_; }

  // All jobs of one batch.
  __device__ void run(int64_t batch) {
    first_job_ = batch * slots_;
    const int column = threadIdx.x;
    if (column < kColumns) {
      sh_.before[column] = 0, sh_.total[column] = 0, sh_.slot[column] = column / p_.tries;
      sh_.operands.words[2 * kArea + place(column)] = half_pair(2048, 1);
    }
    for (int g = 0; g < groups_; ++g) {
      if (column < kColumns) set_scale(g, column);
      __syncthreads();
      Costs costs;
      start(costs);
      __syncthreads();
      for (int i = 0; i < kPositions; ++i) position(g, i, costs);
      if (column < slots_) choose(g, column);
      __syncthreads();
      keep(g, costs);
      __syncthreads();
      if (column < slots_ && sh_.before[column]) p_.ends[job(column) * groups_ + g] = static_cast<uint8_t>(sh_.end[column]);
    }
    if (column < slots_ && first_job_ + column < jobs()) p_.values[job(column)] = sh_.total[column];
    __syncthreads();
    for (int slot = threadIdx.x / 32; slot < slots_ && first_job_ + slot < jobs(); slot += kWarps) trace(slot);
    __syncthreads();
  }

 private:
  __device__ int64_t jobs() const { return p_.n * p_.kappas; }
  __device__ int64_t job(int slot) const { return first_job_ + slot; }
  __device__ const float* weights(int64_t job, int g) const {
    return p_.weight + job / p_.kappas * p_.k + static_cast<int64_t>(g) * kGroup;
  }

  // The local scale of a column in group g, and its reciprocal.
  __device__ void set_scale(int g, int column) {
    const int slot = column / p_.tries;
    int local = 0;
    if (slot < slots_ && first_job_ + slot < jobs()) {
      const float super = p_.supers[job(slot)];
      if (super > 0) {
        const double rms = __dsqrt_rn(__ddiv_rn(p_.energies[job(slot) / p_.kappas * groups_ + g], kGroup));
        const double ratio = __ddiv_rn(__dmul_rn(p_.nominal, rms), static_cast<double>(super));
        if (ratio >= kLeastRms) {
          const int middle = static_cast<int>(fmin(fmax(rint(ratio), 1.0), static_cast<double>(kScaleMax)));
          local = middle + p_.low + column % p_.tries;
          if (local < 1 || local > kScaleMax) local = 0;
        }
        if (local) sh_.inverse[column] = inverse_scale(local, super);
      }
    }
    sh_.local[column] = local;
    sh_.score[column] = 0;
  }

  // Costs before the group's first position. keep() left those of the kept columns where the digits stand later.
  __device__ void start(Costs& costs) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = column_of(n, h), slot = sh_.slot[column];
        const int local = sh_.local[column], before = local ? sh_.before[slot] : 0, square = local * local;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int i = h; i < 4; i += 2) {
            const int state = state_of(m, i);
            int cost = state == 0 ? 0 : kDropped;
            if (before) {
              const int left = static_cast<int>(sh_.operands.words[kDigits + state * kRow + slot]);
              cost = min((left * before * before + square / 2) / square, kCostLimit);
            }
            costs[m][n][i] = cost;
          }
      }
  }

  // One position of all columns: costs before it -> costs after it.
  __device__ void position(int g, int i, Costs& costs) {
    const int column = threadIdx.x;
    if (column < kColumns) {
      int u[4] = {0, 0, 0, 0};
      if (sh_.local[column]) {
        const float4 w = *reinterpret_cast<const float4*>(weights(job(column / p_.tries), g) + 4 * i);
        const float inverse = sh_.inverse[column];
        u[0] = fixed_point(w.x, inverse), u[1] = fixed_point(w.y, inverse);
        u[2] = fixed_point(w.z, inverse), u[3] = fixed_point(w.w, inverse);
      }
      sh_.operands.words[place(column)] = half_pair(-2 * u[0], -2 * u[1]);
      sh_.operands.words[kArea + place(column)] = half_pair(-2 * u[2], -2 * u[3]);
      const int square = u[0] * u[0] + u[1] * u[1] + u[2] * u[2] + u[3] * u[3];
      sh_.square[column] = square;
      sh_.score[column] -= square;
    }
    __syncthreads();
    uint32_t* stored = reinterpret_cast<uint32_t*>(group_costs_ + i * kStates * kColumns);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
          const int state = state_of(m, r), at = column_of(n, 0);
          const bool low = costs[m][n][r] <= p_.beam, high = costs[m][n][r + 1] <= p_.beam;
          uint32_t* digits = sh_.operands.words + kDigits + state * kRow;
          digits[place(at)] = cost_digits((low ? costs[m][n][r] : kDropped) + sh_.square[at]);
          digits[place(at + 1)] = cost_digits((high ? costs[m][n][r + 1] : kDropped) + sh_.square[at + 1]);
          const uint32_t both[2] = {low ? static_cast<uint32_t>(costs[m][n][r]) : kNoCost,
                                    high ? static_cast<uint32_t>(costs[m][n][r + 1]) : kNoCost};
          stored[(state * kColumns + at) / 2] = both[0] | both[1] << 16;
        }
    __syncthreads();
    sweep(p_.table, sh_.operands, costs);
    subtract_least(costs);
  }

  // Takes the cheapest survivor's cost off all; leaves integers.
  __device__ void subtract_least(Costs& costs) {
    const int warp = threadIdx.x / 32, column = threadIdx.x;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int least = min(min(costs[0][n][h], costs[0][n][h + 2]), min(costs[1][n][h], costs[1][n][h + 2]));
#pragma unroll
        for (int step = 4; step < 32; step *= 2) least = min(least, __shfl_xor_sync(0xFFFFFFFFu, least, step, 32));
        if (threadIdx.x % 32 < 4) sh_.reduced[warp][column_of(n, h)] = least;
      }
    __syncthreads();
    if (column < kColumns) {
      int least = sh_.reduced[0][column];
      for (int w = 1; w < kWarps; ++w) least = min(least, sh_.reduced[w][column]);
      least = static_cast<int>(__int_as_float(least));
      sh_.least[column] = least;
      sh_.score[column] += least;
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          costs[m][n][i] = static_cast<int>(__int_as_float(costs[m][n][i])) - sh_.least[column_of(n, i)];
  }

  // The best local scale of a job; the lowest among equals.
  __device__ void choose(int g, int slot) {
    int chosen = -1;
    int64_t best = 0;
    for (int column = slot * p_.tries; column < (slot + 1) * p_.tries; ++column) {
      const int64_t local = sh_.local[column], value = local * local * sh_.score[column];
      if (local && (chosen < 0 || value < best)) chosen = column, best = value;
    }
    sh_.chosen[slot] = chosen;
    sh_.before[slot] = chosen < 0 ? 0 : sh_.local[chosen];
    sh_.total[slot] += best;
    sh_.end[slot] = kStates;
    if (first_job_ + slot < jobs()) p_.scales[job(slot) * groups_ + g] = static_cast<uint8_t>(sh_.before[slot]);
  }

  // Costs of the kept columns: for the next group's start, and those on the way for the traceback.
  __device__ void keep(int g, const Costs& costs) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = column_of(n, i), slot = sh_.slot[column], state = state_of(m, i);
          if (slot >= slots_ || sh_.chosen[slot] != column) continue;
          sh_.operands.words[kDigits + state * kRow + slot] = static_cast<uint32_t>(costs[m][n][i]);
          if (costs[m][n][i] == 0) atomicMin(&sh_.end[slot], state);
        }
    for (int slot = 0; slot < slots_; ++slot) {
      const int column = sh_.chosen[slot];
      if (column < 0) continue;
      uint16_t* path = path_of(slot, g);
      for (int at = threadIdx.x; at < kPositions * kStates; at += kThreads) path[at] = group_costs_[at * kColumns + column];
    }
  }

  __device__ uint16_t* path_of(int slot, int g) const {
    return path_costs_ + slot * path_costs(groups_) + static_cast<int64_t>(g) * kPositions * kStates;
  }

  // Bytes of a job, from the end of every run of live groups to its beginning; one warp, eight states a lane.
  __device__ void trace(int slot) const {
    const int lane = threadIdx.x % 32;
    const int64_t at = job(slot);
    const float super = p_.supers[at];
    uint8_t* words = p_.words + at * (p_.k / 4);
    bool inside = false;  // of a run
    int byte = 0;
    for (int g = groups_ - 1; g >= 0; --g) {
      const int local = p_.scales[at * groups_ + g];
      if (local == 0) {
        inside = false;
        if (lane < kPositions) words[g * kPositions + lane] = 0;
        continue;
      }
      if (!inside) byte = p_.ends[at * groups_ + g];
      inside = true;
      const float inverse = inverse_scale(local, super);
      const float* w = weights(at, g);
      const uint16_t* path = path_of(slot, g);
      for (int i = kPositions - 1; i >= 0; --i) {
        if (lane == 0) words[g * kPositions + i] = static_cast<uint8_t>(byte);
        byte = byte_before(path + i * kStates + 8 * lane, w + 4 * i, inverse, byte);
      }
    }
  }

  // The previous state of least cost; the lowest among equals. costs: of this lane's eight states.
  __device__ static int byte_before(const uint16_t* costs, const float* w, float inverse, int byte) {
    const uint4 eight = *reinterpret_cast<const uint4*>(costs);
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
    int u[4];
    for (int d = 0; d < 4; ++d) u[d] = fixed_point(w[d], inverse);
    unsigned best = 0xFFFFFFFFu;  // cost << 8 | state
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t cost = pairs[j / 2] >> (16 * (j % 2)) & 0xFFFF, state = threadIdx.x % 32 * 8 + j;
      int v[4];
      word_values(state << 8 | byte, v);
      uint32_t sum = cost;
#pragma unroll
      for (int d = 0; d < 4; ++d) sum += (u[d] - v[d]) * (u[d] - v[d]);
      const unsigned key = sum << 8 | state;
      if (cost != kNoCost && key < best) best = key;
    }
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other = __shfl_xor_sync(0xFFFFFFFFu, best, step, 32);
      if (other < best) best = other;
    }
    return best & 255;
  }

  const Plan& p_;
  Shared& sh_;
  const int groups_, slots_;
  uint16_t *group_costs_, *path_costs_;
  int64_t first_job_ = 0;
};

}  // namespace ccq_trellis_kernel
