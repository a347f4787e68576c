// SPDX-License-Identifier: Apache-2.0
// What both halves of the calibrated search do with one group of 64 weights: book of a block, search, running sums.
//
// A run is one channel at one local scale. Four threads (a team) carry three runs: thread t of a team owns row t of
// every block and looks at every fourth entry of the book, once for all three runs. Reading the book costs 20 bytes of
// shared memory for an entry and about 28 instructions; with fewer runs a thread, shared memory would be the limit.
#pragma once

#include "ldlq_math.cuh"

namespace ccq_ldlq {

constexpr int kTeam = 4;
constexpr int kRuns = 3;
constexpr int kGroupThreads = 128;
constexpr int kTeams = kGroupThreads / kTeam;
constexpr int kBlockRuns = kTeams * kRuns;
constexpr unsigned kWarp = 0xFFFFFFFFu;

// One block's work: `count` lanes of one pair from `first` on.
struct BlockLanes {
  int pair, first, count, unused;
};

// The book in the metric of one block of weights, and half the squared norm of every entry. Entry e belongs to thread
// e % 4 of a team; the halves of a thread lie together, four floats further than a whole number of bank rows.
struct BlockBook {
  float4 entry[kEntries];
  float half[kTeam][kEntries / kTeam + 4];

  __device__ void build(const float4* states, const Root& root) {
#pragma unroll
    for (int i = 0; i < kEntries / kGroupThreads; ++i) {
      const int e = threadIdx.x + i * kGroupThreads;
      const float4 y = root.times_root(__ldg(states + e));
      entry[e] = y;
      half[e % kTeam][e / kTeam] = times(0.5f, square_norm(y));
    }
  }
};

struct GroupShared {
  BlockBook book[2];                      // of this block, and of the one that slower warps still read
  float tile[kGroup][kGroup + 4];         // the group's own part of the matrix: [row][column]
  float4 past[kRuns][kBlocks][kTeams];    // of each run: its errors (or moves) in the blocks so far
  uint8_t words[kBlockRuns][kBlocks];
  float local[kBlockRuns];
  float loss[kBlockRuns];
};

struct Member {
  int team, row;  // row within a block
  __device__ Member() : team(threadIdx.x / kTeam), row(threadIdx.x % kTeam) {}
  // What thread `row` of the own team holds.
  __device__ float of(float value, int row) const { return __shfl_sync(kWarp, value, row, kTeam); }
  __device__ float4 all_rows(float value) const { return make_float4(of(value, 0), of(value, 1), of(value, 2), of(value, 3)); }
};

// matrix is transposed: element (row, column) stands at [column][row].
__device__ inline void load_tile(GroupShared& s, const float* matrix, int64_t k, int64_t first) {
  const int row = threadIdx.x % kGroup, column0 = threadIdx.x / kGroup;
  const float* from = matrix + (first + column0) * k + first + row;
  constexpr int kColumns = kGroupThreads / kGroup;
#pragma unroll 8
  for (int column = column0; column < kGroup; column += kColumns, from += kColumns * k) s.tile[row][column] = *from;
}

__device__ inline float4 tile_row(const GroupShared& s, int row, int block) {
  return *reinterpret_cast<const float4*>(&s.tile[row][block * kBlock]);
}

// value[j] + what the blocks before b of run j ask of row `row` of block b.
__device__ inline void add_past(const GroupShared& s, const Member& me, int b, float* value) {
  for (int before = 0; before < b; ++before) {
    const float4 factors = tile_row(s, b * kBlock + me.row, before);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) value[j] = plus_products(value[j], s.past[j][before][me.team], factors);
  }
}

__device__ inline void remember(GroupShared& s, const Member& me, int j, int b, float value) {
  reinterpret_cast<float*>(&s.past[j][b][me.team])[me.row] = value;
}

// best[j] = argmax over entries of y[j].c - |c|^2/2, the first among equals, for all threads of a team.
//
// Four scores at a time: only their maximum is compared with the best so far, and of the best four the entry is found
// again by computing the same bits once more. Where no score exceeds kWorstScore (or is a number) it is entry 0.
__device__ inline void search(const BlockBook& book, const Member& me, const float4* y, int* best) {
  constexpr int kStep = 4, kSteps = kEntries / kTeam / kStep;
  float top[kRuns];
  int step_of[kRuns];
#pragma unroll
  for (int j = 0; j < kRuns; ++j) top[j] = kWorstScore, step_of[j] = -1;
#pragma unroll 2
  for (int step = 0; step < kSteps; ++step) {
    const float4 half = *reinterpret_cast<const float4*>(&book.half[me.row][step * kStep]);
    float most[kRuns];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float4 c = book.entry[(step * kStep + i) * kTeam + me.row];
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        const float s = score(y[j], c, part(half, i));
        most[j] = i == 0 ? s : fmaxf(most[j], s);
      }
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      if (most[j] > top[j]) top[j] = most[j], step_of[j] = step;
  }
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    int found = 0;
    if (step_of[j] >= 0) {
#pragma unroll
      for (int i = kStep - 1; i >= 0; --i) {
        const int at = step_of[j] * kStep + i;
        if (score(y[j], book.entry[at * kTeam + me.row], book.half[me.row][at]) == top[j]) found = at * kTeam + me.row;
      }
    }
#pragma unroll
    for (int step = 1; step < kTeam; step *= 2) {
      const float other = __shfl_xor_sync(kWarp, top[j], step, kTeam);
      const int other_found = __shfl_xor_sync(kWarp, found, step, kTeam);
      if (other > top[j] || (other == top[j] && other_found < found)) top[j] = other, found = other_found;
    }
    best[j] = found;
  }
}

}  // namespace ccq_ldlq
