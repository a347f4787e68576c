// SPDX-License-Identifier: Apache-2.0
// One output channel in one thread block: its memory, its first float sums, and the scores of one group.
//
// Every float sum of the encoder runs over the groups (or rows) in order, in one thread, with single IEEE
// operations: the CPU's order. That is a few thousand dependent additions a channel, next to millions of
// integer scores.
#pragma once

#include "encode.cuh"

namespace ccq_encode_kernel {

constexpr int kChoices = CCQ_ENCODE_KEEP;

// A block's scratch in global memory: it stays in the caches, and K has no limit.
struct Scratch {
  double* rms;      // [groups]
  double* gains;    // [kChoices][groups]
  int* locals;      // [kChoices][groups]
  int* best_locals; // [groups]
  int* scores;      // [pairs][groups], of the screening
};

__host__ __device__ inline size_t scratch_bytes(int64_t groups, int pairs) {
  const size_t bytes = groups * (8 + 8 * kChoices + 4 * kChoices + 4 + 4 * static_cast<size_t>(pairs));
  return (bytes + 255) / 256 * 256;
}

__device__ inline Scratch scratch_of(void* workspace, int64_t groups, int pairs) {
  char* p = static_cast<char*>(workspace) + blockIdx.x * scratch_bytes(groups, pairs);
  Scratch s;
  s.rms = reinterpret_cast<double*>(p);
  s.gains = s.rms + groups;
  s.locals = reinterpret_cast<int*>(s.gains + kChoices * groups);
  s.best_locals = s.locals + kChoices * groups;
  s.scores = s.best_locals + groups;
  return s;
}

struct Shared {
  alignas(16) int2 books[CCQ_ENCODE_ENTRIES];
  int8_t states[kThreads / 16][kGroup];
  double totals[CCQ_ENCODE_PAIRS];
  double best_gain;
  float supers[CCQ_ENCODE_KAPPAS];
  int super_count;
  int kept[kChoices], kept_count;
  float super;
  int pair, better;
};

template <int kTeam, bool kOneBook>
struct Channel {
  const ccq_encode_args& a;
  Shared& sh;
  Scratch scratch;
  const int groups, entries, team, lane;
  const Vector v;
  int scan_length;  // entries of the longest book

  __device__ Channel(const ccq_encode_args& args, Shared& shared)
      : a(args), sh(shared), scratch(scratch_of(args.workspace, args.k / kGroup, args.pairs)),
        groups(static_cast<int>(args.k / kGroup)),
        entries(args.layout.entries[0] + (args.layout.books > 1 ? args.layout.entries[1] : 0)),
        team(threadIdx.x / kTeam), lane(threadIdx.x % kTeam), v(vector_of(args.layout, threadIdx.x % kTeam)) {
    scan_length = args.layout.entries[0];
    if (args.layout.books > 1) scan_length = max(scan_length, args.layout.entries[1]);
  }

  static constexpr int kTeams = kThreads / kTeam;

  __device__ void load_books(int slot, int pair) {
    const int2* from = reinterpret_cast<const int2*>(a.entries) + static_cast<int64_t>(pair) * entries;
    for (int e = threadIdx.x; e < entries; e += kThreads) sh.books[slot * entries + e] = from[e];
  }

  __device__ int nominal_scale(int g, float super) const {
    return clamp_scale(a.layout, __ddiv_rn(__dmul_rn(a.recipe.nominal, scratch.rms[g]), super));
  }

  __device__ void measure(const float* w) {
    for (int g = threadIdx.x; g < groups; g += kThreads) {
      const float4* p = reinterpret_cast<const float4*>(w + static_cast<int64_t>(g) * kGroup);
      double sum = 0;
      for (int i = 0; i < kGroup / 4; ++i) {
        const float4 q = p[i];
        const double x[4] = {q.x, q.y, q.z, q.w};
        for (int j = 0; j < 4; ++j) sum = __dadd_rn(sum, __dmul_rn(x[j], x[j]));
      }
      // The energy for now; thread 0 sums it and the block then turns it into rms.
      scratch.rms[g] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0;
      for (int g = 0; g < groups; ++g) total = __dadd_rn(total, scratch.rms[g]);
      sh.best_gain = total;
    }
    __syncthreads();
    for (int g = threadIdx.x; g < groups; g += kThreads) scratch.rms[g] = __dsqrt_rn(scratch.rms[g] / kGroup);
    __syncthreads();
  }

  // Returns the channel's energy (thread 0 only).
  __device__ double choose_supers() {
    const double total = sh.best_gain;
    double reference = 0;
    if (a.recipe.ratio_count) {
      for (int g = 0; g < groups; ++g) reference = fmax(reference, scratch.rms[g]);
    } else {
      reference = __dsqrt_rn(__ddiv_rn(total, static_cast<double>(groups) * kGroup));
    }
    sh.super_count = 0;
    for (int i = 0; i < a.recipe.kappa_count; ++i) {
      const float super = to_bfloat16(__ddiv_rn(__dmul_rn(a.recipe.nominal, reference), a.recipe.kappas[i]));
      bool fresh = super >= kSmallestSuper;
      for (int j = 0; j < sh.super_count; ++j) fresh = fresh && sh.supers[j] != super;
      if (fresh) sh.supers[sh.super_count++] = super;
    }
    sh.best_gain = -1;
    return total;
  }

  // Scores of `count` local scales of one group with the books of `slot`.
  template <int kCount>
  __device__ void score(const float* group, int slot, const int* local, float super, int* scores) {
    Point points[kCount];
    int best[kCount], rest[kCount];
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      const float inverse = reciprocal(a.layout, local_scale(local[b], super));
      points[b] = load_point(group, v, inverse);
      rest[b] = remainder_score(a.layout, group, inverse);
    }
    best_scores<kCount, kOneBook>(sh.books + slot * entries, v, scan_length, points, best);
#pragma unroll
    for (int b = 0; b < kCount; ++b) scores[b] = team_sum<kTeam>(v.used ? best[b] : 0) + rest[b];
  }

  __device__ void store_choice(int c, int g, double value, int local) {
    if (lane != 0 || g >= groups) return;
    const bool live = scratch.rms[g] != 0;
    scratch.gains[c * groups + g] = live ? value : 0;
    scratch.locals[c * groups + g] = live ? local : 0;
  }

  // The states of one group at one scale into shared memory, its words if asked for; returns the score.
  __device__ int decode(const float* group, int slot, float scale, uint16_t* words) {
    const float inverse = reciprocal(a.layout, scale);
    const Point point = load_point(group, v, inverse);
    int index;
    const int best = best_entry(sh.books + slot * entries, v, scan_length, point, index);
    const int states = sh.books[slot * entries + v.base + index].x;
    __syncwarp();
    if (v.used)
      for (int d = 0; d < v.dims; ++d) sh.states[team][v.first + d] = static_cast<int8_t>(states >> (8 * d));
    int rest = 0, last = 0;
    if (a.layout.remainder_shift) {
      rest = remainder_score(a.layout, group, inverse);
      const int q = remainder_state(a.layout, fixed_point(group[kGroup - 1], inverse));
      if (lane == 0) sh.states[team][kGroup - 1] = static_cast<int8_t>(q);
      last = (q - a.layout.state_min) << a.layout.remainder_shift;
    }
    __syncwarp();
    if (words) {
      // Two vectors may share a word: its first one collects the others' bits.
      for (int word = 0; word < a.layout.words; ++word) {
        unsigned mine = v.used && v.word == word ? static_cast<unsigned>(index) << v.shift : 0u;
        const int value = team_sum<kTeam>(static_cast<int>(mine));
        if (lane == 0)
          words[word] = static_cast<uint16_t>(word + 1 == a.layout.words && a.layout.remainder_shift ? last : value);
      }
    }
    return team_sum<kTeam>(v.used ? best : 0) + rest;
  }
};

}  // namespace ccq_encode_kernel
