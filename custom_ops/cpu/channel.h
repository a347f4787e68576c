// SPDX-License-Identifier: Apache-2.0
// What the data-free searches know of a channel before they search: its groups' magnitudes and the super scales to try.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "search.h"

namespace ccq {

// Below this a super scale's reciprocal would leave float32; such a channel is stored as zeros.
constexpr float kSmallestSuper = 7.9e-31f;  // about 2^-100

// To nearest even; for finite values.
inline float bfloat16_of(double value) {
  float f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  std::memcpy(&f, &bits, 4);
  return f;
}

// rms of every group of w [groups * kGroup]; returns the sum of all squares.
inline double group_rms(const float* w, std::vector<double>& rms) {
  double total = 0;
  for (size_t g = 0; g < rms.size(); ++g) {
    double sum = 0;
    for (int r = 0; r < kGroup; ++r) {
      const double v = w[g * kGroup + r];
      sum += v * v;
    }
    total += sum;
    rms[g] = std::sqrt(sum / kGroup);
  }
  return total;
}

// bfloat16 of reference / kappa, each once and only those large enough.
inline std::vector<float> super_candidates(const std::vector<double>& kappas, double reference) {
  std::vector<float> supers;
  for (double kappa : kappas) {
    const float super = bfloat16_of(reference / kappa);
    if (super >= kSmallestSuper && std::find(supers.begin(), supers.end(), super) == supers.end())
      supers.push_back(super);
  }
  return supers;
}

}  // namespace ccq
