// SPDX-License-Identifier: Apache-2.0
// The choices of one channel: code pairs, local scales, super scale; the stages are those of
// custom_ops/cpu/encode.cpp.
#pragma once

#include "encode_channel.cuh"

namespace ccq_encode_kernel {

template <int kTeam, bool kOneBook>
struct Encoder : Channel<kTeam, kOneBook> {
  using Base = Channel<kTeam, kOneBook>;
  using Base::a;
  using Base::groups;
  using Base::kTeams;
  using Base::lane;
  using Base::scratch;
  using Base::sh;
  using Base::team;
  using Base::v;
  using Base::scan_length;

  __device__ Encoder(const ccq_encode_args& args, Shared& shared) : Base(args, shared) {}

  // Pairs worth a full search: the best few on every group's nominal scale.
  __device__ void screen(const float* w) {
    const float super = sh.supers[0];
    if (a.pairs <= a.recipe.keep_pairs) {
      if (threadIdx.x == 0) {
        sh.kept_count = a.pairs;
        for (int p = 0; p < a.pairs; ++p) sh.kept[p] = p;
      }
      __syncthreads();
      return;
    }
    for (int first = 0; first < groups; first += kBatch * kTeams) {
      Point points[kBatch];
      int rest[kBatch];
      for (int b = 0; b < kBatch; ++b) {
        const int g = min(first + b * kTeams + team, groups - 1);
        const float inverse = reciprocal(a.layout, local_scale(this->nominal_scale(g, super), super));
        const float* group = w + static_cast<int64_t>(g) * kGroup;
        points[b] = load_point(group, v, inverse);
        rest[b] = remainder_score(a.layout, group, inverse);
      }
      for (int p = 0; p < a.pairs; ++p) {
        __syncthreads();
        this->load_books(0, p);
        __syncthreads();
        int best[kBatch];
        best_scores<kBatch, kOneBook>(sh.books, v, scan_length, points, best);
        for (int b = 0; b < kBatch; ++b) {
          const int score = team_sum<kTeam>(v.used ? best[b] : 0) + rest[b];
          const int g = first + b * kTeams + team;
          if (lane == 0 && g < groups) scratch.scores[p * groups + g] = score;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < a.pairs) {
      double total = 0;
      for (int g = 0; g < groups; ++g) {
        if (scratch.rms[g] == 0) continue;
        const float scale = local_scale(this->nominal_scale(g, super), super);
        total = __dadd_rn(total, gain(scale, scratch.scores[threadIdx.x * groups + g]));
      }
      sh.totals[threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      // A stable sort's first entries: of equal gains the smaller pair.
      sh.kept_count = a.recipe.keep_pairs;
      for (int i = 0; i < sh.kept_count; ++i) {
        int top = -1;
        for (int p = 0; p < a.pairs; ++p) {
          bool taken = false;
          for (int j = 0; j < i; ++j) taken = taken || sh.kept[j] == p;
          if (!taken && (top < 0 || sh.totals[p] > sh.totals[top])) top = p;
        }
        sh.kept[i] = top;
      }
    }
    __syncthreads();
  }

  // Coarse local scales: every integer of the window around the nominal one, kCount at a time.
  // The number of rounds is the same for every group, though windows are cut: teams of a warp shuffle together.
  template <int kCount, int kRounds>
  __device__ void search_window(const float* w, float super) {
    for (int first = 0; first < groups; first += kTeams) {
      const int g = min(first + team, groups - 1);
      const float* group = w + static_cast<int64_t>(g) * kGroup;
      const int nominal = this->nominal_scale(g, super);
      const int low = max(nominal + a.recipe.window_low, 1);
      const int high = min(nominal + a.recipe.window_high, a.layout.scale_max);
      for (int c = 0; c < sh.kept_count; ++c) {
        double top = -1;
        int at = 0;
#pragma unroll 1
        for (int start = 0; start < kCount * kRounds; start += kCount) {
          int local[kCount], scores[kCount];
#pragma unroll
          for (int b = 0; b < kCount; ++b) local[b] = min(low + start + b, a.layout.scale_max);
          this->template score<kCount>(group, c, local, super, scores);
#pragma unroll
          for (int b = 0; b < kCount; ++b) {
            const double value = gain(local_scale(local[b], super), scores[b]);
            if (low + start + b <= high && value > top) {
              top = value;
              at = local[b];
            }
          }
        }
        this->store_choice(c, first + team, top, at);
      }
    }
  }

  // Fine local scales (a warp a group): multiples of the nominal one, then eq. (4) and a new search while it helps.
  __device__ void search_ratios(const float* w, float super) {
    for (int g = team; g < groups; g += kTeams) {
      const float* group = w + static_cast<int64_t>(g) * kGroup;
      for (int c = 0; c < sh.kept_count; ++c) {
        int local[kBatch], scores[kBatch];
        for (int b = 0; b < kBatch; ++b) {
          const double ratio = a.recipe.ratios[min(b, a.recipe.ratio_count - 1)];
          const double wanted = __dmul_rn(__dmul_rn(a.recipe.nominal, scratch.rms[g]), ratio);
          local[b] = clamp_scale(a.layout, __ddiv_rn(wanted, super));
        }
        this->template score<kBatch>(group, c, local, super, scores);
        double best = -1;
        int at = local[0];
        for (int b = 0; b < a.recipe.ratio_count; ++b) {
          const double value = gain(local_scale(local[b], super), scores[b]);
          if (value > best) {
            best = value;
            at = local[b];
          }
        }
        if (a.recipe.refits) this->decode(group, c, local_scale(at, super), nullptr);
        for (int round = 0; round < a.recipe.refits; ++round) {
          double dot = 0;
          int norm = 0;
          for (int r = 0; r < kGroup; ++r) {
            const int state = sh.states[team][r];
            dot = __dadd_rn(dot, __dmul_rn(static_cast<double>(group[r]), static_cast<double>(state)));
            norm += state * state;
          }
          if (norm == 0) break;
          const int fitted = clamp_scale(a.layout, __ddiv_rn(__ddiv_rn(dot, static_cast<double>(norm)), super));
          if (fitted == at) break;
          const int found = this->decode(group, c, local_scale(fitted, super), nullptr);
          const double value = gain(local_scale(fitted, super), found);
          if (!(value > best)) break;
          best = value;
          at = fitted;
        }
        this->store_choice(c, g, best, at);
      }
    }
  }

  // The choices of one super scale against the best so far.
  __device__ void compare(float super) {
    __syncthreads();
    if (threadIdx.x < sh.kept_count) {
      double total = 0;
      for (int g = 0; g < groups; ++g) total = __dadd_rn(total, scratch.gains[threadIdx.x * groups + g]);
      sh.totals[threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      sh.better = -1;
      for (int c = 0; c < sh.kept_count; ++c) {
        if (sh.totals[c] > sh.best_gain) {
          sh.best_gain = sh.totals[c];
          sh.super = super;
          sh.pair = c;
          sh.better = c;
        }
      }
    }
    __syncthreads();
    if (sh.better >= 0)
      for (int g = threadIdx.x; g < groups; g += kThreads) scratch.best_locals[g] = scratch.locals[sh.better * groups + g];
    __syncthreads();
  }

  // The words of the chosen scales, and the error as the decoder will see it.
  __device__ void finish(const float* w, uint16_t* words, uint16_t* scales, double* sums, double energy) {
    const float super = sh.super;
    double dot = 0, norm = 0;
    for (int first = 0; first < groups; first += kTeams) {
      const int g = min(first + team, groups - 1);
      const int local = scratch.best_locals[g];
      const bool mine = first + team < groups;
      uint16_t* out = words + static_cast<int64_t>(g) * a.layout.words;
      // Teams of one warp take the shuffles together: past the last group they write its words once more, and a
      // group of scale 0 is cleared afterwards.
      this->decode(w + static_cast<int64_t>(g) * kGroup, sh.pair, local_scale(max(local, 1), super), out);
      if (mine && lane == 0) scales[g] = static_cast<uint16_t>(local);
      __syncthreads();
      if (mine && local == 0)
        for (int i = lane; i < a.layout.words; i += kTeam) out[i] = 0;
      if (threadIdx.x == 0) {
        for (int t = 0; t < kTeams && first + t < groups; ++t) {
          const int chosen = scratch.best_locals[first + t];
          if (chosen == 0) continue;
          const float scale = local_scale(chosen, super);
          const float* group = w + static_cast<int64_t>(first + t) * kGroup;
          for (int r = 0; r < kGroup; ++r) {
            const double value = __fmul_rn(static_cast<float>(sh.states[t][r]), scale);
            dot = __dadd_rn(dot, __dmul_rn(static_cast<double>(group[r]), value));
            norm = __dadd_rn(norm, __dmul_rn(value, value));
          }
        }
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      sums[0] = energy;
      sums[1] = dot;
      sums[2] = norm;
    }
  }

  __device__ void run(int64_t channel) {
    const float* w = a.weight + channel * a.k;
    uint16_t* words = a.words + channel * groups * a.layout.words;
    uint16_t* scales = a.scales + channel * groups;
    this->measure(w);
    double energy = 0;
    if (threadIdx.x == 0) energy = this->choose_supers();
    __syncthreads();
    if (sh.super_count == 0) {
      for (int i = threadIdx.x; i < groups * a.layout.words; i += kThreads) words[i] = 0;
      for (int g = threadIdx.x; g < groups; g += kThreads) scales[g] = 0;
      if (threadIdx.x == 0) {
        a.supers[channel] = 0;
        a.chosen[channel] = 0;
        a.sums[3 * channel] = energy;
        a.sums[3 * channel + 1] = a.sums[3 * channel + 2] = 0;
      }
      __syncthreads();
      return;
    }
    screen(w);
    for (int c = 0; c < sh.kept_count; ++c) this->load_books(c, sh.kept[c]);
    __syncthreads();
    for (int i = 0; i < sh.super_count; ++i) {
      const float super = sh.supers[i];
      const int width = a.recipe.window_high - a.recipe.window_low + 1;
      if (kTeam == 32 && a.recipe.ratio_count) search_ratios(w, super);
      else if (width <= 6) search_window<6, 1>(w, super);
      else if (width <= 8) search_window<8, 1>(w, super);
      else search_window<5, 2>(w, super);
      compare(super);
    }
    finish(w, words, scales, a.sums + 3 * channel, energy);
    if (threadIdx.x == 0) {
      a.supers[channel] = sh.super;
      a.chosen[channel] = sh.kept[sh.pair];
    }
    __syncthreads();
  }
};

}  // namespace ccq_encode_kernel
