// SPDX-License-Identifier: Apache-2.0
// One group of a sweep, all others fixed, for the channels of a block (descend_group() of
// custom_ops/cpu/trellis_ldlq.cpp, with the same choices).
#pragma once

#include "trellis_columns.cuh"

namespace ccq_calibrated_trellis {

class Descent : public Columns {
 public:
  __device__ Descent(const Plan& plan, Shared& shared, int group)
      : Columns(plan, shared, kSweepTries), g_(group), first_(static_cast<int64_t>(group) * kGroup),
        last_(group + 1 == groups_), rows_count_(last_ ? kGroup : kWindowRows) {}

  __device__ int64_t batches() const { return (p_.n + slots_ - 1) / slots_; }

  // Behind the byte before it, and up to the first byte of the next group, whose weights its last byte takes part in.
  __device__ void run(int64_t batch) {
    const int self = threadIdx.x;
    first_channel_ = batch * slots_;
    window_ = true;
    wanted_ = p_.begin + static_cast<int64_t>(blockIdx.x) * slots_ * kWindowRow;
    weights_ = rows_ = wanted_;
    weight_stride_ = row_stride_ = kWindowRow;
    if (self < slots_) {
      const int64_t channel = channel_of(self), word = channel * (p_.k / 4) + first_ / 4;
      const uint8_t* scales = p_.scales + channel * groups_ + g_;
      const bool valid = here(self), searched = valid && scales[0] && (last_ || scales[1]);
      sh_.super[self] = valid ? p_.super[channel] : 0.0f;
      sh_.middle[self] = searched ? scales[0] : 0;
      sh_.start_count[self] = 1;
      sh_.entry[self] = searched && g_ ? p_.words[word - 1] : 0;
      sh_.behind[self] = searched && !last_ ? scales[1] : 0;
      sh_.fixed[self] = searched && !last_ ? p_.words[word + kPositions] : 0;
      if (valid) p_.decides[channel] = 0;
    }
    __syncthreads();
    for (int slot = self / 32; here(slot); slot += kWarps)
      if (sh_.middle[slot]) want(slot);
    if (self < kColumns) {
      const int slot = self / tries_, middle = slot < slots_ ? sh_.middle[slot] : 0, trial = self % tries_;
      const int local = middle + (trial == 0 ? 0 : trial == 1 ? -1 : 1);
      sh_.local[self] = static_cast<uint8_t>(middle && local >= 1 && local <= kScaleMax ? local : 0);
      sh_.value[self] = 0;
    }
    __syncthreads();
    const ccq_trellis_factors& f = p_.windows;
    const int64_t at = static_cast<int64_t>(g_) * kWindowBlocks;
    search({f.root + 16 * at, f.unit + at, f.ratio + at, f.spread + at, rows_count_ / 4});
    for (int slot = self / 32; here(slot); slot += kWarps)
      if (sh_.middle[slot]) decide(slot);
    __syncthreads();
  }

 private:
  // A warp's room for the rows of a window.
  __device__ float* room() const { return reinterpret_cast<float*>(sh_.kept[threadIdx.x / 32]); }

  // Without the window's own errors the gradient is `rest`; its weights would best be w + rest H^-1. By one warp.
  __device__ void want(int slot) {
    const int64_t at = channel_of(slot) * p_.k + first_;
    const float* h = p_.h + first_ * p_.k + first_;
    const float* inverse = p_.inverse + static_cast<int64_t>(g_) * kWindowRows * kWindowRows;
    float *errors = room(), *rest = errors + kWindowRow;
    for (int r = threadIdx.x % 32; r < rows_count_; r += 32) errors[r] = p_.error[at + r];
    __syncwarp();
    for (int r = threadIdx.x % 32; r < rows_count_; r += 32) {
      float own = 0;
#pragma unroll 4
      for (int i = 0; i < rows_count_; ++i) own = add(own, mul(errors[i], h[i * p_.k + r]));
      rest[r] = sub(p_.gradient[at + r], own);
    }
    __syncwarp();
    for (int r = threadIdx.x % 32; r < rows_count_; r += 32) {
      float sum = p_.weight[at + r];
#pragma unroll 4
      for (int i = 0; i < rows_count_; ++i) sum = add(sum, mul(rest[i], inverse[i * kWindowRows + r]));
      wanted_[slot * kWindowRow + r] = sum;
    }
    __syncwarp();
  }

  // The best local scale of a channel, if it makes the error smaller. By one warp.
  __device__ void decide(int slot) {
    const int lane = threadIdx.x % 32;
    const int64_t channel = channel_of(slot), at = channel * p_.k + first_;
    int best = -1;
    for (int column = slot * tries_; column < (slot + 1) * tries_; ++column)
      if (sh_.local[column] && (best < 0 || sh_.value[column] < sh_.value[best])) best = column;
    const int end = rows_count_ / 4 & 1, count = sh_.count[best];
    int cheapest = 0x7FFFFFFF;
    for (int i = lane; i < count; i += 32) cheapest = min(cheapest, mine_.cost[best][i] << 8 | i);
    cheapest = warp_least(cheapest) & 255;
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&mine_.bytes[end][best][cheapest]);
    // Errors counted from the wanted weights, back to errors of the weights.
    float *now = room(), *move = now + kWindowRow, *moved = move + kWindowRow;
    const float *wanted = wanted_ + slot * kWindowRow, *full = p_.gradient + at;
    if (lane < rows_count_ / 4) {
      const uint32_t byte = lane == kPositions ? sh_.fixed[slot] : bytes[lane];
      const uint32_t before = lane ? bytes[lane - 1] : sh_.entry[slot];
      const int local = lane == kPositions ? sh_.behind[slot] : sh_.local[best];
      float e[4];
      errors_of(before << 8 | byte, wanted + 4 * lane, mul(static_cast<float>(local), sh_.super[slot]), e);
      for (int i = 0; i < 4; ++i) {
        const int r = 4 * lane + i;
        now[r] = add(sub(e[i], wanted[r]), p_.weight[at + r]);
        move[r] = sub(now[r], p_.error[at + r]);
      }
    }
    __syncwarp();
    const float* h = p_.h + first_ * p_.k + first_;
    for (int r = lane; r < rows_count_; r += 32) {
      float sum = 0;
#pragma unroll 4
      for (int i = 0; i < rows_count_; ++i) sum = add(sum, mul(move[i], h[i * p_.k + r]));
      // Growth of e H e^T: v.(g before + g after) for a move v.
      moved[r] = mul(move[r], add(full[r], add(full[r], sum)));
    }
    __syncwarp();
    float growth = 0;
#pragma unroll 4
    for (int r = 0; r < rows_count_; ++r) growth = add(growth, moved[r]);
    if (!(growth < 0.0f)) return;
    for (int r = lane; r < rows_count_; r += 32) p_.error[at + r] = now[r], p_.changes[channel * kWindowRow + r] = move[r];
    if (lane < kPositions) p_.words[channel * (p_.k / 4) + first_ / 4 + lane] = bytes[lane];
    if (lane == 0) p_.scales[channel * groups_ + g_] = static_cast<uint8_t>(sh_.local[best]), p_.decides[channel] = 1;
  }

  const int g_;
  const int64_t first_;
  const bool last_;
  const int rows_count_;
  float* wanted_ = nullptr;
};

}  // namespace ccq_calibrated_trellis
