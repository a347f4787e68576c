// SPDX-License-Identifier: Apache-2.0
// One local scale tried on one group or window of one channel: the survivors of the calibrated search of ccq-2t, step by step.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "trellis.h"

namespace ccq {

constexpr int kRowsMax = 80;  // kWindowRows, up to a whole number of vectors
constexpr int32_t kCostLimit = (1 << 22) - 1;
constexpr int kCostClip = 511;

// The values of all words, coordinate by coordinate.
inline const int16_t* values() {
  static const std::vector<int16_t> v = [] {
    std::vector<int16_t> out(4 << 16);
    for (int word = 0; word < 1 << 16; ++word) {
      int32_t x[4];
      trellis_values(word, x);
      for (int i = 0; i < 4; ++i) out[(i << 16) + word] = static_cast<int16_t>(x[i]);
    }
    return out;
  }();
  return v.data();
}

inline float whole(float y) { return (y + 12582912.0f) - 12582912.0f; }  // to nearest even, |y| < 2^22

// Sequences that are still alive, in the order of their states.
struct Survivors {
  int count = 0;
  int32_t cost[kTrellisStates];
  uint8_t state[kTrellisStates];
  uint8_t origin[kTrellisStates];  // which survivor of the window's start it comes from
  uint8_t bytes[kTrellisStates][kTrellisBytes + 1];
  // Rows before the position: errors; rows from it on: the weights and what the errors ask of them.
  alignas(64) float rows[kTrellisStates][kRowsMax];

  void single(uint8_t byte) {
    count = 1;
    cost[0] = 0;
    state[0] = byte;
    origin[0] = 0;
  }
  int best() const { return static_cast<int>(std::min_element(cost, cost + count) - cost); }
};

// One local scale tried on one group or window of one channel.
struct Run {
  std::unique_ptr<Survivors> now = std::make_unique<Survivors>(), next = std::make_unique<Survivors>();
  int local = 0;
  double value = 0;

  // Position b: table of the block's metric; w the weights [rows]; m and root of the factors, rows apart `stride`.
  void step(const TrellisKernels& kernels, const uint32_t* t01, const uint32_t* t23, int b, int rows, const float* w,
            const float* m, int64_t stride, const float* root, float unit, float scale, int beam, int fixed) {
    const float inverse = 1.0f / scale;
    uint32_t keys[kTrellisStates], targets[2 * kTrellisStates];
    alignas(64) uint32_t best[kTrellisStates];
    uint8_t place[kTrellisStates];
    const int at = 4 * b;
    for (int s = 0; s < now->count; ++s) {
      keys[s] = static_cast<uint32_t>(now->cost[s]) << 8 | now->state[s];
      place[now->state[s]] = static_cast<uint8_t>(s);
      const float* x = now->rows[s] + at;
      int32_t u[4];
      for (int j = 0; j < 4; ++j) {
        float sum = x[0] * root[j];
        for (int i = 1; i <= j; ++i) sum += x[i] * root[4 * i + j];
        float y = sum * inverse;
        y = y < -kCostClip ? -static_cast<float>(kCostClip) : y;
        y = y > kCostClip ? static_cast<float>(kCostClip) : y;
        u[j] = 16 * static_cast<int32_t>(whole(y));
      }
      targets[2 * s] = (static_cast<uint32_t>(u[0]) & 0xFFFFu) | static_cast<uint32_t>(u[1]) << 16;
      targets[2 * s + 1] = (static_cast<uint32_t>(u[2]) & 0xFFFFu) | static_cast<uint32_t>(u[3]) << 16;
    }
    kernels.step_in_metric(keys, targets, now->count, t01, t23, best);
    uint32_t least = best[0];
    for (int s = 1; s < kTrellisStates; ++s) least = std::min(least, best[s]);
    if (fixed >= 0) least = best[fixed];
    least >>= 8;
    value += static_cast<double>(least) * static_cast<double>(unit) * static_cast<double>(scale) *
             static_cast<double>(scale);
    const int16_t* v = values();
    int count = 0;
    for (int byte = fixed < 0 ? 0 : fixed; byte < (fixed < 0 ? kTrellisStates : fixed + 1); ++byte) {
      const int32_t cost = static_cast<int32_t>((best[byte] >> 8) - least);
      if (cost > beam) continue;
      const int from = place[best[byte] & 255u], word = now->state[from] << 8 | byte;
      next->cost[count] = cost;
      next->state[count] = static_cast<uint8_t>(byte);
      next->origin[count] = b ? now->origin[from] : static_cast<uint8_t>(from);
      std::memcpy(next->bytes[count], now->bytes[from], b);
      next->bytes[count][b] = static_cast<uint8_t>(byte);
      float e[4];
      for (int i = 0; i < 4; ++i) e[i] = w[at + i] - scale * static_cast<float>(v[(i << 16) + word]);
      const float* old = now->rows[from];
      float* rows_out = next->rows[count];
      std::memcpy(rows_out, old, sizeof(float) * at);
      for (int i = 0; i < 4; ++i) rows_out[at + i] = e[i];
      kernels.add_four(rows_out + at + 4, old + at + 4, e, m + at * stride + at + 4, stride, rows - at - 4);
      ++count;
    }
    next->count = count;
    std::swap(now, next);
  }
};

inline float rescaled(int32_t cost, float factor) {
  const float c = static_cast<float>(cost) * factor;
  return c > static_cast<float>(kCostLimit) ? static_cast<float>(kCostLimit) : whole(c);
}

}  // namespace ccq
