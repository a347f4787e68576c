// SPDX-License-Identifier: Apache-2.0
// One group of the calibrated search with feedback, for the channels of a block: begin_group, all local scales of the
// window, the decision about the group before it (feed_back() of custom_ops/cpu/trellis_ldlq.cpp, with the same choices).
#pragma once

#include "trellis_columns.cuh"

namespace ccq_calibrated_trellis {

class FeedBack : public Columns {
 public:
  __device__ FeedBack(const Plan& plan, Shared& shared, int group)
      : Columns(plan, shared, plan.high - plan.low + 1), g_(group), first_(static_cast<int64_t>(group) * kGroup) {}

  __device__ int64_t batches() const { return (p_.n + slots_ - 1) / slots_; }

  __device__ void run(int64_t batch) {
    first_channel_ = batch * slots_;
    weights_ = p_.weight + first_channel_ * p_.k + first_, weight_stride_ = p_.k;
    row_stride_ = kStates * kGroup;
    begin_ = p_.begin + static_cast<int64_t>(blockIdx.x) * slots_ * row_stride_;
    rows_ = begin_;
    const int self = threadIdx.x;
    if (self < slots_) {
      const int64_t channel = channel_of(self);
      const bool valid = here(self);
      sh_.super[self] = valid ? p_.super[channel] : 0.0f;
      sh_.start_count[self] = static_cast<uint16_t>(valid ? p_.kept_count[channel] : 0);
      sh_.behind[self] = valid && g_ ? p_.scales[channel * groups_ + g_ - 1] : 0;
      sh_.middle[self] = 0;
    }
    __syncthreads();
    begin_rows();
    for (int slot = self / 32; here(slot); slot += kWarps) choose_middle(slot);
    __syncthreads();
    if (self < kColumns) {
      const int slot = self / tries_, middle = slot < slots_ ? sh_.middle[slot] : 0;
      const int local = middle + p_.low + self % tries_;
      sh_.local[self] = static_cast<uint8_t>(middle && local >= 1 && local <= kScaleMax ? local : 0);
      sh_.value[self] = 0;
    }
    __syncthreads();
    const int64_t block = first_ / 4;
    search({p_.all.root + 16 * block, p_.all.unit + block, p_.all.ratio + block, p_.all.spread + block, kPositions});
    for (int slot = self / 32; here(slot); slot += kWarps) decide(slot);
    __syncthreads();
  }

 private:
  // The last group was searched: its bytes are not decided yet.
  __device__ bool pending(int slot) const { return sh_.behind[slot] != 0; }

  // Errors of a survivor of the last group at one of its positions.
  __device__ void errors_before(int slot, int survivor, int position, float* e) const {
    const int64_t channel = channel_of(slot);
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p_.kept_bytes + channel * kStates + survivor);
    const uint32_t before = position ? bytes[position - 1] : p_.entry[channel];
    const float scale = mul(static_cast<float>(sh_.behind[slot]), sh_.super[slot]);
    errors_of(before << 8 | bytes[position], p_.weight + channel * p_.k + first_ - kGroup + 4 * position, scale, e);
  }

  // The rows of the group as each survivor of the last one leaves them.
  __device__ void begin_rows() {
    const int self = threadIdx.x;
    float* m = reinterpret_cast<float*>(sh_.operands);  // [64, 64]
    float* errors = m + kGroup * kGroup;                // [256, 64]
    if (g_)
      for (int i = self; i < kGroup * kGroup; i += kThreads)
        m[i] = p_.all.m[(first_ - kGroup + i / kGroup) * p_.k + first_ + i % kGroup];
    for (int slot = 0; here(slot); ++slot) {
      const int count = sh_.start_count[slot];
      if (pending(slot))
        for (int i = self; i < count * kPositions; i += kThreads)
          errors_before(slot, i / kPositions, i % kPositions, errors + 4 * i);
      __syncthreads();
      const float* x = p_.x + channel_of(slot) * p_.k + first_;
      float* out = begin_ + slot * row_stride_;
      const int r = self % kGroup;
      for (int s = self / kGroup; s < count; s += kThreads / kGroup) {
        float sum = x[r];
        if (pending(slot)) {
          const float* e = errors + s * kGroup;
#pragma unroll 16
          for (int i = 0; i < kGroup; ++i) sum = add(sum, mul(e[i], m[i * kGroup + r]));
        }
        out[s * kGroup + r] = sum;
      }
      __syncthreads();
    }
  }

  // Of the start's survivors, the cheapest one; of its rows, the local scale. 0: the group is stored as zeros.
  __device__ void choose_middle(int slot) {
    const int lane = threadIdx.x % 32;
    const int* cost = p_.kept_cost + channel_of(slot) * kStates;
    int best = 0x7FFFFFFF;
    for (int i = lane; i < sh_.start_count[slot]; i += 32) best = min(best, cost[i] << 8 | i);
    best = warp_least(best) & 255;
    const float* own = begin_ + slot * row_stride_ + best * kGroup;
    float energy = 0;
#pragma unroll 16
    for (int r = 0; r < kGroup; ++r) energy = add(energy, mul(own[r], own[r]));
    const float rms = __fsqrt_rn(mul(energy, 1.0f / kGroup));
    const float ratio = __fdiv_rn(mul(rms, p_.nominal), sh_.super[slot]);
    if (lane != 0) return;
    sh_.cheapest[slot] = static_cast<uint8_t>(best);
    if (ratio >= kLeastRms)
      sh_.middle[slot] =
          static_cast<uint8_t>(fminf(fmaxf(whole(fminf(ratio, 100.0f)), 1.0f), static_cast<float>(kScaleMax)));
  }

  // Errors and bytes of the last group, which were its survivor's.
  __device__ void decide_before(int slot, int survivor) {
    const int lane = threadIdx.x % 32;
    const int64_t channel = channel_of(slot);
    if (lane >= kPositions) return;
    float e[4];
    errors_before(slot, survivor, lane, e);
    for (int i = 0; i < 4; ++i) p_.changes[channel * kWindowRow + 4 * lane + i] = e[i];
    p_.words[channel * (p_.k / 4) + (g_ - 1) * kPositions + lane] =
        reinterpret_cast<const uint8_t*>(p_.kept_bytes + channel * kStates + survivor)[lane];
  }

  // The best local scale of a channel, what it decides, and the survivors that remain. By one warp.
  __device__ void decide(int slot) {
    const int lane = threadIdx.x % 32;
    const int64_t channel = channel_of(slot);
    int* cost = p_.kept_cost + channel * kStates;
    uint8_t* state = p_.kept_state + channel * kStates;
    uint4* bytes = p_.kept_bytes + channel * kStates;
    int best = -1;
    for (int column = slot * tries_; column < (slot + 1) * tries_; ++column)
      if (sh_.local[column] && (best < 0 || sh_.value[column] < sh_.value[best])) best = column;
    if (lane == 0) {
      p_.decides[channel] = pending(slot);
      p_.stores_zeros[channel] = best < 0;
      p_.scales[channel * groups_ + g_] = static_cast<uint8_t>(best < 0 ? 0 : sh_.local[best]);
    }
    if (best < 0) {
      // Zeros: what came before is decided, and the chain begins anew.
      if (pending(slot)) decide_before(slot, sh_.cheapest[slot]);
      __syncwarp();
      if (lane == 0) p_.kept_count[channel] = 1, cost[0] = 0, state[0] = 0;
      if (lane < kPositions) p_.words[channel * (p_.k / 4) + g_ * kPositions + lane] = 0;
      return;
    }
    const int end = kPositions & 1, count = sh_.count[best];
    int cheapest = 0x7FFFFFFF;
    for (int i = lane; i < count; i += 32) cheapest = min(cheapest, mine_.cost[best][i] << 8 | i);
    cheapest = warp_least(cheapest) & 255;
    const int origin = mine_.origin[end][best][cheapest];
    if (pending(slot)) decide_before(slot, origin);
    if (lane == 0) p_.entry[channel] = state[origin], p_.loss[channel] = __dadd_rn(p_.loss[channel], sh_.value[best]);
    __syncwarp();
    int kept = 0;
    for (int first = 0; first < count; first += 32) {
      const int i = first + lane;
      const bool holds = i < count && mine_.origin[end][best][i] == origin;
      const unsigned all = __ballot_sync(0xFFFFFFFFu, holds);
      const int at = kept + __popc(all & ((1u << lane) - 1));
      if (holds) cost[at] = mine_.cost[best][i], state[at] = mine_.state[best][i], bytes[at] = mine_.bytes[end][best][i];
      kept += __popc(all);
    }
    if (lane == 0) p_.kept_count[channel] = kept;
    if (g_ + 1 == groups_ && lane < kPositions)
      p_.words[channel * (p_.k / 4) + g_ * kPositions + lane] =
          reinterpret_cast<const uint8_t*>(&mine_.bytes[end][best][cheapest])[lane];
  }

  const int g_;
  const int64_t first_;
  float* begin_ = nullptr;
};

}  // namespace ccq_calibrated_trellis
