// SPDX-License-Identifier: Apache-2.0
// Coordinate descent: one group of a sweep, and what happens between sweeps. Lanes are channels here, sorted by pair.
#pragma once

#include "ldlq_group.cuh"

namespace ccq_ldlq {

struct DescentArgs {
  int64_t k, stride;        // lanes of a row, a multiple of 128
  int lanes;
  const float* h;           // [k, k], transposed
  const float* h_root;
  const float* h_inverse;
  const float4* states;     // [pairs, 256]
  const BlockLanes* blocks; // one a thread block, kTeams lanes at most
  const int* pair;          // of every lane
  float* super;
  const float* weight;      // [k, stride], by lane, like the rest
  float* error;             // w - w'
  float* gradient;          // H e
  const float* target;      // H w
  float* moves;             // [64, stride]: how the group's errors changed
  uint8_t* words;           // [k/4, stride]
  uint8_t* local;           // [k/64, stride]
  double* loss;
};

struct DescentShared : GroupShared {
  float4 state[kBlocks][kTeams];
  float4 moved[kBlocks][kTeams];  // H's part for the group, times the states
};

// One lane for each team: its three runs are the lane's own scale, one less and one more. The own scale comes first, so
// that it wins where another is not better.
__global__ void __launch_bounds__(kGroupThreads, 3)
descend_group(const __grid_constant__ DescentArgs a, int first) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  DescentShared& s = *reinterpret_cast<DescentShared*>(dynamic_shared);
  const BlockLanes lanes = a.blocks[blockIdx.x];
  if (lanes.count == 0) return;
  const Member me;
  const float4* states = a.states + static_cast<int64_t>(lanes.pair) * kEntries;
  load_tile(s, a.h, a.k, first);

  // Teams beyond the last lane repeat it and store nothing.
  const bool used = me.team < lanes.count;
  const int lane = lanes.first + min(me.team, lanes.count - 1);
  const int64_t corner = first * a.stride + lane, step_down = kBlock * a.stride;
  uint8_t* const words = a.words + first / kBlock * a.stride + lane;
  const float super = a.super[lane], own = static_cast<float>(a.local[first / kGroup * a.stride + lane]);
  const float own_scale = times(own, super);
  float local[kRuns], scale[kRuns], inverse[kRuns], away[kRuns], delta[kRuns];
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    local[j] = clamp_local(plus(own, j == 0 ? 0.0f : j == 1 ? -1.0f : 1.0f));
    scale[j] = times(local[j], super);
    inverse[j] = __fdiv_rn(1.0f, scale[j]);
    away[j] = minus(own_scale, scale[j]);
  }
  for (int b = 0; b < kBlocks; ++b)
    reinterpret_cast<float*>(&s.state[b][me.team])[me.row] =
        __ldg(reinterpret_cast<const float*>(states + words[b * a.stride]) + me.row);
  __syncthreads();
  {
    float sum[kBlocks];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) sum[b] = 0;
#pragma unroll 1
    for (int column = 0; column < kBlocks; ++column) {
      const float4 state = s.state[column][me.team];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) sum[b] = plus_products(sum[b], state, tile_row(s, b * kBlock + me.row, column));
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) reinterpret_cast<float*>(&s.moved[b][me.team])[me.row] = sum[b];
  }
  __syncwarp();
  {
    // Growth of e H e^T when e moves by v: v.(gradient before + after), row by row; thread j sums for run j.
    const float step = me.row == 0 ? away[0] : me.row == 1 ? away[1] : away[2];
    float sum = 0;
#pragma unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      const float4 state = s.state[b][me.team], moved = s.moved[b][me.team];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const float before = a.gradient[corner + (b * kBlock + i) * a.stride];
        const float after = plus_product(before, step, part(moved, i));
        sum = plus(sum, times(times(step, part(state, i)), plus(before, after)));
      }
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j) delta[j] = me.of(sum, j);
  }

  const float* next = a.gradient + corner + me.row * a.stride;
  const int64_t to_error = a.error - a.gradient, to_weight = a.weight - a.gradient;
  float next_gradient = next[0], next_error = next[to_error], next_weight = next[to_weight];
#pragma unroll 1
  for (int b = 0; b < kBlocks; ++b) {
    const Root root(a.h_root + (first + b * kBlock) * kBlock);
    BlockBook& book = s.book[b & 1];
    book.build(states, root);
    // Also orders the past of the block before with its readers below.
    __syncthreads();
    const float gradient = next_gradient, error = next_error, weight = next_weight;
    if (b + 1 < kBlocks) {
      next += step_down;
      next_gradient = next[0], next_error = next[to_error], next_weight = next[to_weight];
    }
    const float state = part(s.state[b][me.team], me.row), moved = part(s.moved[b][me.team], me.row);
    float e[kRuns], g[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) e[j] = plus_product(error, away[j], state), g[j] = plus_product(gradient, away[j], moved);
    add_past(s, me, b, g);
    const float4 diagonal = tile_row(s, b * kBlock + me.row, b);
    const float4 inverse_row = reinterpret_cast<const float4*>(a.h_inverse)[first + b * kBlock + me.row];
    float4 y[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      // Without this block's own error the gradient is `rest`; the block would best be w + rest H_bb^-1.
      const float rest = minus(g[j], plus_products(0.0f, me.all_rows(e[j]), diagonal));
      const float best = plus_products(weight, me.all_rows(rest), inverse_row);
      y[j] = times_all(root.times_root(me.all_rows(best)), inverse[j]);
    }
    int found[kRuns];
    search(book, me, y, found);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      const float chosen = __ldg(reinterpret_cast<const float*>(states + found[j]) + me.row);
      const float move = minus(minus(weight, times(scale[j], chosen)), e[j]);
      const float after = plus_products(g[j], me.all_rows(move), diagonal);
      const float4 growth = me.all_rows(times(move, plus(g[j], after)));
      delta[j] = plus(plus(plus(plus(delta[j], growth.x), growth.y), growth.z), growth.w);
      remember(s, me, j, b, move);
      if (me.row == 0) s.words[me.team * kRuns + j][b] = static_cast<uint8_t>(found[j]);
    }
  }
  __syncwarp();

  int winner = 0;
  float least = delta[0];
#pragma unroll
  for (int j = 1; j < kRuns; ++j)
    if (delta[j] < least) least = delta[j], winner = j;
  // Where nothing is gained nothing changes.
  const bool gain = least < 0.0f;
  if (!used) return;
  const float new_scale = winner == 0 ? scale[0] : winner == 1 ? scale[1] : scale[2];
  const float new_local = winner == 0 ? local[0] : winner == 1 ? local[1] : local[2];
  if (gain && me.row == 0) a.local[first / kGroup * a.stride + lane] = static_cast<uint8_t>(new_local);
#pragma unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    const int word = s.words[me.team * kRuns + winner][b];
    const int64_t row = b * kBlock + me.row, at = corner + row * a.stride;
    const float before = a.error[at];
    float now = before;
    if (gain) {
      now = minus(a.weight[at], times(new_scale, __ldg(reinterpret_cast<const float*>(states + word) + me.row)));
      a.error[at] = now;
      if (me.row == 0) words[b * a.stride] = static_cast<uint8_t>(word);
    }
    a.moves[row * a.stride + lane] = minus(now, before);
  }
}

// e = w - w' from words and scales. One thread a byte.
__global__ void restore_errors(const __grid_constant__ DescentArgs a) {
  const int lane = blockIdx.x * blockDim.x + threadIdx.x;
  if (lane >= a.lanes) return;
  const int64_t block = blockIdx.y;
  const float scale = times(static_cast<float>(a.local[block / kBlocks * a.stride + lane]), a.super[lane]);
  const int64_t entry = static_cast<int64_t>(a.pair[lane]) * kEntries + a.words[block * a.stride + lane];
  const float4 c = __ldg(a.states + entry);
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const int64_t at = (block * kBlock + i) * a.stride + lane;
    a.error[at] = minus(a.weight[at], times(scale, part(c, i)));
  }
}

// The best factor on w' = w - e is 1 + (w' H e) / (w' H w'); taken where it helps after rounding. One thread a lane.
__global__ void fit_supers(const __grid_constant__ DescentArgs a) {
  const int lane = blockIdx.x * blockDim.x + threadIdx.x;
  if (lane >= a.lanes) return;
  float cross = 0, norm = 0;
#pragma unroll 8
  for (int64_t r = 0; r < a.k; ++r) {
    const int64_t at = r * a.stride + lane;
    const float g = a.gradient[at], w = minus(a.weight[at], a.error[at]);
    cross = plus_product(cross, w, g);
    norm = plus_product(norm, w, minus(a.target[at], g));
  }
  const float old = a.super[lane];
  const float fitted = to_bfloat16(plus(old, times(old, __fdiv_rn(cross, norm))));
  const float t = minus(__fdiv_rn(fitted, old), 1.0f);
  const bool better = norm > 0.0f && fitted > 0.0f && times(t, minus(times(t, norm), times(2.0f, cross))) < 0.0f;
  if (better) a.super[lane] = fitted;
}

__global__ void sum_losses(const __grid_constant__ DescentArgs a) {
  const int lane = blockIdx.x * blockDim.x + threadIdx.x;
  if (lane >= a.lanes) return;
  double sum = 0;
#pragma unroll 8
  for (int64_t r = 0; r < a.k; ++r) {
    const int64_t at = r * a.stride + lane;
    sum = __dadd_rn(sum, __dmul_rn(static_cast<double>(a.error[at]), static_cast<double>(a.gradient[at])));
  }
  a.loss[lane] = sum;
}

}  // namespace ccq_ldlq
