// SPDX-License-Identifier: Apache-2.0
// Error feedback through one group: words and local scale of every lane (a channel with one pair and super scale).
#pragma once

#include "ldlq_group.cuh"

namespace ccq_ldlq {

struct FeedbackArgs {
  int64_t k, stride;        // lanes of a row, a multiple of 128
  const float* weight;      // [k, weight_stride]: by channel
  int64_t weight_stride;
  const float* feedback;    // [k, k], transposed
  const float* d_root;
  const float4* states;     // [pairs, 256]
  const BlockLanes* blocks; // one a thread block
  const int* channel;       // of every lane
  const float* super;
  const float* x;           // [k, stride]: weights plus what earlier groups ask of them
  float* error;             // [64, stride]: of this group
  uint8_t* words;           // [k/4, stride], or NULL where only the loss counts
  uint8_t* local;           // [k/64, stride]
  double* loss;             // [stride]
  float nominal;
  int low, tries;
};

// A lane's `tries` runs stand side by side; a block takes kBlockRuns / tries lanes.
__global__ void __launch_bounds__(kGroupThreads, 4)
feed_back_group(const __grid_constant__ FeedbackArgs a, int first) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  GroupShared& s = *reinterpret_cast<GroupShared*>(dynamic_shared);
  const BlockLanes lanes = a.blocks[blockIdx.x];
  if (lanes.count == 0) return;
  const Member me;
  const float4* states = a.states + static_cast<int64_t>(lanes.pair) * kEntries;
  load_tile(s, a.feedback, a.k, first);

  // Rows me.row, me.row + 4, ... of the lanes of this thread's runs. Runs beyond the last lane repeat it.
  const float *x[kRuns], *w[kRuns];
  float scale[kRuns], inverse[kRuns], loss[kRuns];
  {
    int lane[kRuns], offset[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      const int run = me.team * kRuns + j;
      lane[j] = lanes.first + min(run / a.tries, lanes.count - 1);
      offset[j] = a.low + run % a.tries;
      x[j] = a.x + first * a.stride + lane[j];
      w[j] = a.weight + first * a.weight_stride + a.channel[lane[j]];
    }
    // Thread j sums for run j.
    const float* mine = me.row == 0 ? x[0] : me.row == 1 ? x[1] : x[2];
    float energy = 0;
#pragma unroll 8
    for (int r = 0; r < kGroup; ++r) {
      const float v = mine[r * a.stride];
      energy = plus_product(energy, v, v);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      const float super = a.super[lane[j]];
      const float nominal = nominal_local(me.of(energy, j), a.nominal, super);
      const float local = clamp_local(plus(nominal, static_cast<float>(offset[j])));
      scale[j] = times(local, super);
      inverse[j] = __fdiv_rn(1.0f, scale[j]);
      loss[j] = 0;
      if (me.row == 0) s.local[me.team * kRuns + j] = local;
      x[j] += me.row * a.stride;
      w[j] += me.row * a.weight_stride;
    }
  }

  float next_x[kRuns], next_w[kRuns];
#pragma unroll
  for (int j = 0; j < kRuns; ++j) next_x[j] = *x[j], next_w[j] = *w[j];
#pragma unroll 1
  for (int b = 0; b < kBlocks; ++b) {
    const Root root(a.d_root + (first + b * kBlock) * kBlock);
    BlockBook& book = s.book[b & 1];
    book.build(states, root);
    // Also orders the past of the block before with its readers below.
    __syncthreads();
    float trial[kRuns], own[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      trial[j] = next_x[j], own[j] = next_w[j];
      // One block further, long before it is needed.
      if (b + 1 < kBlocks) {
        next_x[j] = *(x[j] += kBlock * a.stride);
        next_w[j] = *(w[j] += kBlock * a.weight_stride);
      }
    }
    add_past(s, me, b, trial);
    float4 all[kRuns], y[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      all[j] = me.all_rows(trial[j]);
      y[j] = times_all(root.times_root(all[j]), inverse[j]);
    }
    int best[kRuns];
    search(book, me, y, best);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      const float4 chosen = times_all(__ldg(states + best[j]), scale[j]);
      const float4 z = make_float4(minus(all[j].x, chosen.x), minus(all[j].y, chosen.y), minus(all[j].z, chosen.z),
                                   minus(all[j].w, chosen.w));
      loss[j] = plus(loss[j], square_norm(root.times_root(z)));
      remember(s, me, j, b, minus(own[j], part(chosen, me.row)));
      if (me.row == 0) s.words[me.team * kRuns + j][b] = static_cast<uint8_t>(best[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kRuns; ++j)
    if (me.row == 0) s.loss[me.team * kRuns + j] = loss[j];
  __syncthreads();

  // The scale with the least loss, lane by lane; the first among equals.
  for (int i = threadIdx.x; i < lanes.count; i += kGroupThreads) {
    int winner = i * a.tries;
    float least = s.loss[winner];
    for (int run = winner + 1; run < (i + 1) * a.tries; ++run)
      if (s.loss[run] < least) least = s.loss[run], winner = run;
    const int lane = lanes.first + i;
    a.loss[lane] = __dadd_rn(first == 0 ? 0.0 : a.loss[lane], static_cast<double>(least));
    if (a.words) a.local[first / kGroup * a.stride + lane] = static_cast<uint8_t>(s.local[winner]);
    // From here on a lane's first local scale says which run won.
    s.local[i * a.tries] = static_cast<float>(winner);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kGroup * lanes.count; i += kGroupThreads) {
    const int row = i / lanes.count, lane = i % lanes.count;
    const int run = static_cast<int>(s.local[lane * a.tries]);
    const float4& errors = s.past[run % kRuns][row / kBlock][run / kRuns];
    a.error[row * a.stride + lanes.first + lane] = part(errors, row % kBlock);
    if (a.words && row % kBlock == 0)
      a.words[(first + row) / kBlock * a.stride + lanes.first + lane] = s.words[run][row / kBlock];
  }
}

}  // namespace ccq_ldlq
