// SPDX-License-Identifier: Apache-2.0
// The calibrated search of ccq-2t of one channel by one thread block: feed_back() and descend() of
// custom_ops/cpu/trellis_ldlq.cpp, with the same choices.
#pragma once

#include "trellis_survivors.cuh"

namespace ccq_calibrated_trellis {

constexpr int kSets = 3;  // of survivors: the best local scale's so far, and two for the one at work
// A block's own device memory: two sets at a group's start, and kSets.
constexpr int64_t kBlockBytes = (2 + kSets) * int64_t{kStates} * (kRows * 4 + kBytes);

// What the kernels pass on, in device memory.
struct Plan {
  int64_t n, k;
  const float *weight, *h, *inverse;
  ccq_trellis_factors all, windows;
  float nominal;
  int low, high, beam, blocks;
  uint2* tables;         // [k/4, 65536]
  uint2* window_tables;  // [k/64, kWindowBlocks, 65536]
  char* memory;          // [blocks, kBlockBytes]
  float* x;              // [n, k]: weights with what decided errors ask of them
  float *error, *gradient, *target;  // [n, k]: w - w', that times H, and w times H
  // Of the super scale at work.
  float* super;          // [n]
  uint8_t* words;        // [n, k/4]
  uint8_t* scales;       // [n, k/64]
  double* loss;          // [n]
};

struct ChannelShared {
  StepShared step;
  Survivors start, set[kSets];
  float decided[kGroup], wanted[kWindowRows], rest[kWindowRows], now[kWindowRows], move[kWindowRows], moved[kWindowRows];
  int goes_down;
};

class Channel {
 public:
  __device__ Channel(const Plan& plan, ChannelShared& shared, int64_t channel)
      : p_(plan), sh_(shared), groups_(static_cast<int>(plan.k / kGroup)), super_(plan.super[channel]),
        w_(plan.weight + channel * plan.k), x_(plan.x + channel * plan.k), error_(plan.error + channel * plan.k),
        gradient_(plan.gradient + channel * plan.k), words_(plan.words + channel * (plan.k / 4)),
        scales_(plan.scales + channel * groups_), loss_(plan.loss + channel) {
    float* rows = reinterpret_cast<float*>(plan.memory + blockIdx.x * kBlockBytes);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(rows + (2 + kSets) * kStates * kRows);
    auto next = [&] {
      const Rows found{rows, bytes};
      rows += kStates * kRows, bytes += kStates * kBytes;
      return found;
    };
    begin_ = next();
    last_ = next();
    for (Rows& memory : memory_) memory = next();
  }

  // Group after group, each fed with the errors before it.
  __device__ void feed_back() {
    const int self = threadIdx.x;
    for (int64_t r = self; r < p_.k; r += kThreads) x_[r] = w_[r];
    for (int64_t i = self; i < p_.k / 4; i += kThreads) words_[i] = 0;
    single(0);
    bool pending = false;  // the last group's bytes are not decided yet
    int before = 1;
    double loss = 0;
    __syncthreads();
    for (int g = 0; g < groups_; ++g) {
      const int64_t first = static_cast<int64_t>(g) * kGroup;
      begin_group(first, pending);
      int middle = 0, local = 0;
      const bool live = nominal_scale(&middle);
      int best = -1;
      double least = 0;
      for (int l = max(middle + p_.low, 1); live && l <= min(middle + p_.high, kScaleMax); ++l) {
        const int now = best == 0 ? 1 : 0, next = best == 2 ? 1 : 2;
        const float factor =
            g ? mul(__fdiv_rn(static_cast<float>(before * before), static_cast<float>(l * l)), p_.all.ratio[first / 4])
              : 1.0f;
        double value = 0;
        const int end = try_scale(first, l, factor, now, next, &value);
        if (best < 0 || value < least) best = end, least = value, local = l;
      }
      const bool decides = pending;
      if (live) {
        const int origin = sh_.set[best].origin[cheapest(sh_.set[best], sh_.step)];
        if (pending) decide(g - 1, origin);
        __syncthreads();
        keep(best, origin);
        loss += least;
      } else {
        // Zeros: what came before is decided, and the chain begins anew.
        const int chosen = cheapest(sh_.start, sh_.step);
        if (pending) decide(g - 1, chosen);
        __syncthreads();
        single(0);
      }
      pending = live;
      before = live ? local : 1;
      if (self == 0) scales_[g] = static_cast<uint8_t>(live ? local : 0);
      __syncthreads();
      for (int64_t r = first + kGroup + self; r < p_.k; r += kThreads) {
        float sum = x_[r];
        if (decides)
          for (int i = 0; i < kGroup; ++i) sum = add(sum, mul(sh_.decided[i], p_.all.m[(first - kGroup + i) * p_.k + r]));
        if (!live)
          for (int i = 0; i < kGroup; ++i) sum = add(sum, mul(w_[first + i], p_.all.m[(first + i) * p_.k + r]));
        x_[r] = sum;
      }
      __syncthreads();
    }
    const int chosen = cheapest(sh_.start, sh_.step);
    if (pending) decide(groups_ - 1, chosen);
    if (self == 0) *loss_ = loss;
    __syncthreads();
  }

  // Every group anew, with all others fixed.
  __device__ void descend() {
    for (int g = 0; g < groups_; ++g) descend_group(g);
  }

 private:
  __device__ void single(uint8_t byte) {
    if (threadIdx.x == 0) sh_.start.count = 1, sh_.start.cost[0] = 0, sh_.start.state[0] = byte;
  }

  // The rows of the group as each survivor of the last one leaves them.
  __device__ void begin_group(int64_t first, bool pending) {
    for (int s = threadIdx.x / 32; s < sh_.start.count; s += kWarps)
      for (int r = threadIdx.x % 32; r < kGroup; r += 32) {
        float sum = x_[first + r];
        if (pending) {
          const float* e = last_.rows + s * kRows;
          const float* m = p_.all.m + (first - kGroup) * p_.k + first + r;
          for (int i = 0; i < kGroup; ++i) sum = add(sum, mul(e[i], m[i * p_.k]));
        }
        begin_.rows[s * kRows + r] = sum;
      }
    __syncthreads();
  }

  // False: the group is stored as zeros.
  __device__ bool nominal_scale(int* middle) {
    const float* own = begin_.rows + cheapest(sh_.start, sh_.step) * kRows;
    float energy = 0;
    for (int r = 0; r < kGroup; ++r) energy = add(energy, mul(own[r], own[r]));
    const float rms = __fsqrt_rn(mul(energy, 1.0f / kGroup));
    const float ratio = __fdiv_rn(mul(rms, p_.nominal), super_);
    if (!(ratio >= kLeastRms)) return false;
    *middle = static_cast<int>(fminf(fmaxf(whole(fminf(ratio, 100.0f)), 1.0f), static_cast<float>(kScaleMax)));
    return true;
  }

  __device__ void rescale(Survivors& s, float factor) {
    const int self = threadIdx.x;
    if (self < s.count) s.cost[self] = rescaled(s.cost[self], factor);
  }

  __device__ static int beam(int widest, float spread) {
    return static_cast<int>(whole(mul(static_cast<float>(widest), spread)));
  }

  // The cost taken off, in the units of the loss.
  __device__ static double value_of(uint32_t least, float unit, float scale) {
    const double s = scale;
    return __dmul_rn(__dmul_rn(__dmul_rn(static_cast<double>(least), static_cast<double>(unit)), s), s);
  }

  // Sixteen positions at one local scale; returns the set that holds the survivors.
  __device__ int try_scale(int64_t first, int local, float factor, int now, int next, double* value) {
    const int self = threadIdx.x;
    if (self < sh_.start.count) {
      sh_.set[now].cost[self] = rescaled(sh_.start.cost[self], factor);
      sh_.set[now].state[self] = sh_.start.state[self];
    }
    if (self == 0) sh_.set[now].count = sh_.start.count;
    __syncthreads();
    const float scale = mul(static_cast<float>(local), super_);
    for (int b = 0; b < kPositions; ++b) {
      const int64_t block = first / 4 + b;
      if (b) rescale(sh_.set[now], p_.all.ratio[block]);
      const Position position{p_.tables + (block << 16), w_ + first, p_.all.m + first * p_.k + first, p_.k,
                              p_.all.root + 16 * block, p_.all.unit[block], scale, b, kGroup,
                              beam(p_.beam, p_.all.spread[block]), -1};
      const uint32_t least = step(sh_.set[now], b ? memory_[now] : begin_, sh_.set[next], memory_[next], position, sh_.step);
      *value = __dadd_rn(*value, value_of(least, position.unit, scale));
      const int old = now;
      now = next, next = old;
    }
    return now;
  }

  // Bytes and errors of a group whose survivors wait in last_.
  __device__ void decide(int g, int survivor) {
    const int self = threadIdx.x;
    if (self < kGroup) sh_.decided[self] = last_.rows[survivor * kRows + self];
    if (self < kPositions) words_[g * kPositions + self] = last_.bytes[survivor * kBytes + self];
  }

  // Of the survivors of a set, those that come from `origin`.
  __device__ void keep(int set, int origin) {
    const int self = threadIdx.x;
    const Survivors& found = sh_.set[set];
    const bool holds = self < found.count && found.origin[self] == origin;
    int count;
    const int place = block_place(holds, sh_.step, &count);
    if (holds) {
      sh_.start.cost[place] = found.cost[self];
      sh_.start.state[place] = found.state[self];
      sh_.step.from[place] = static_cast<uint8_t>(self);
    }
    if (self == 0) sh_.start.count = count;
    __syncthreads();
    for (int s = self / 32; s < count; s += kWarps) {
      const int from = sh_.step.from[s], lane = self % 32;
      for (int r = lane; r < kGroup; r += 32) last_.rows[s * kRows + r] = memory_[set].rows[from * kRows + r];
      if (lane < kPositions) last_.bytes[s * kBytes + lane] = memory_[set].bytes[from * kBytes + lane];
    }
    __syncthreads();
  }

  // A group anew, its neighbours fixed: behind the byte before it, and up to the first byte of the next group, whose
  // weights its last byte takes part in.
  __device__ void descend_group(int g) {
    const int self = threadIdx.x;
    const bool last = g + 1 == groups_;
    if (!scales_[g] || (!last && !scales_[g + 1])) return;
    const int64_t first = static_cast<int64_t>(g) * kGroup;
    const int rows = last ? kGroup : kWindowRows;
    const float* h = p_.h + first * p_.k + first;
    const float *e = error_ + first, *full = gradient_ + first, *w = w_ + first;
    // Without the window's own errors the gradient is `rest`; its weights would best be w + rest H^-1.
    if (self < rows) {
      float own = 0;
      for (int i = 0; i < rows; ++i) own = add(own, mul(e[i], h[i * p_.k + self]));
      sh_.rest[self] = sub(full[self], own);
    }
    __syncthreads();
    if (self < rows) {
      const float* inverse = p_.inverse + static_cast<int64_t>(g) * kWindowRows * kWindowRows;
      float sum = w[self];
      for (int i = 0; i < rows; ++i) sum = add(sum, mul(sh_.rest[i], inverse[i * kWindowRows + self]));
      sh_.wanted[self] = sum;
      begin_.rows[self] = sum;
    }
    __syncthreads();
    int best = -1, local = 0;
    double least = 0;
    for (int trial = 0; trial < 3; ++trial) {
      const int l = scales_[g] + (trial == 0 ? 0 : trial == 1 ? -1 : 1);
      if (l < 1 || l > kScaleMax) continue;
      const int now = best == 0 ? 1 : 0, next = best == 2 ? 1 : 2;
      double value = 0;
      const int end = try_window(g, l, rows, now, next, &value);
      if (best < 0 || value < least) best = end, least = value, local = l;
    }
    const int chosen = cheapest(sh_.set[best], sh_.step);
    // Errors counted from the wanted weights, back to errors of the weights.
    if (self < rows) {
      sh_.now[self] = add(sub(memory_[best].rows[chosen * kRows + self], sh_.wanted[self]), w[self]);
      sh_.move[self] = sub(sh_.now[self], e[self]);
    }
    __syncthreads();
    if (self < rows) {
      float moved = 0;
      for (int i = 0; i < rows; ++i) moved = add(moved, mul(sh_.move[i], h[i * p_.k + self]));
      sh_.moved[self] = moved;
    }
    __syncthreads();
    if (self == 0) {
      // Growth of e H e^T: v.(g before + g after) for a move v.
      float growth = 0;
      for (int r = 0; r < rows; ++r)
        growth = add(growth, mul(sh_.move[r], add(full[r], add(full[r], sh_.moved[r]))));
      sh_.goes_down = growth < 0.0f;
    }
    __syncthreads();
    if (!sh_.goes_down) return;
    if (self < rows) error_[first + self] = sh_.now[self];
    if (self == 0) scales_[g] = static_cast<uint8_t>(local);
    if (self < kPositions) words_[g * kPositions + self] = memory_[best].bytes[chosen * kBytes + self];
    for (int64_t r = self; r < p_.k; r += kThreads) {
      float sum = gradient_[r];
      for (int i = 0; i < rows; ++i) sum = add(sum, mul(sh_.move[i], p_.h[(first + i) * p_.k + r]));
      gradient_[r] = sum;
    }
    __syncthreads();
  }

  // The window of a group at one local scale, from the one survivor whose rows stand in begin_.
  __device__ int try_window(int g, int local, int rows, int now, int next, double* value) {
    const int64_t byte = static_cast<int64_t>(g) * kPositions;
    const ccq_trellis_factors& f = p_.windows;
    const int64_t at = static_cast<int64_t>(g) * kWindowBlocks;
    if (threadIdx.x == 0) {
      Survivors& s = sh_.set[now];
      s.count = 1, s.cost[0] = 0, s.state[0] = g ? words_[byte - 1] : 0;
    }
    __syncthreads();
    for (int b = 0; b < rows / 4; ++b) {
      const bool behind = b == kPositions;
      const int scale_behind = behind ? scales_[g + 1] : 0;
      float factor = f.ratio[at + b];
      if (behind)
        factor = mul(__fdiv_rn(static_cast<float>(local * local), static_cast<float>(scale_behind * scale_behind)), factor);
      if (b) rescale(sh_.set[now], factor);
      const float scale = mul(static_cast<float>(behind ? scale_behind : local), super_);
      const Position position{p_.window_tables + ((at + b) << 16), sh_.wanted, f.m + at * 4 * kWindowRows, kWindowRows,
                              f.root + 16 * (at + b), f.unit[at + b], scale, b, rows, beam(p_.beam, f.spread[at + b]),
                              behind ? words_[byte + kPositions] : -1};
      const uint32_t least = step(sh_.set[now], b ? memory_[now] : begin_, sh_.set[next], memory_[next], position, sh_.step);
      *value = __dadd_rn(*value, value_of(least, position.unit, scale));
      const int old = now;
      now = next, next = old;
    }
    return now;
  }

  const Plan& p_;
  ChannelShared& sh_;
  const int groups_;
  const float super_;
  const float* w_;
  float *x_, *error_, *gradient_;
  uint8_t *words_, *scales_;
  double* loss_;
  Rows begin_, last_, memory_[kSets];
};

}  // namespace ccq_calibrated_trellis
