// SPDX-License-Identifier: Apache-2.0
// The channel loop of the data-free encoder of ccq-2t: what paddle_ccq/encoder/trellis_reference.py says, with the
// same bytes. Costs are integers; the few float operations are single IEEE operations in a fixed order.
#include "trellis.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "../gpu/common/trellis_code.h"
#include "channel.h"

namespace ccq {
namespace {

constexpr int32_t kCostLimit = (1 << 22) - 1;
constexpr double kLeastRms = 3.0 / 16.0;

using Costs = int32_t[kTrellisStates];

// What one local scale makes of a group.
struct Trial {
  int local = 0;
  int64_t value = 0;
  Costs costs;                                         // of the survivors at the end
  uint8_t before[kTrellisBytes * kTrellisStates];      // the byte before, at every position
};

class TrellisChannel {
 public:
  TrellisChannel(const TrellisKernels& kernels, const TrellisRecipe& recipe, int64_t k)
      : kernels_(kernels), recipe_(recipe), groups_(static_cast<int>(k / kGroup)), rms_(groups_),
        before_(static_cast<size_t>(k / 4) * kTrellisStates), words_(k / 4), scales_(groups_) {}

  void run(const float* w, uint8_t* words, uint8_t* scales, float* super_out, double* sums) {
    w_ = w;
    const double total = group_rms(w, rms_);
    const double channel_rms = std::sqrt(total / (static_cast<double>(groups_) * kGroup));
    const std::vector<float> supers = super_candidates(recipe_.kappas, recipe_.nominal * channel_rms);
    std::fill(words, words + words_.size(), 0);
    std::fill(scales, scales + groups_, 0);
    *super_out = 0;
    double most = 0;
    for (float super : supers) {
      const int64_t value = search(super);
      const double gain = static_cast<double>(super) * static_cast<double>(super) * static_cast<double>(-value);
      if (*super_out != 0 && !(gain > most)) continue;
      most = gain;
      *super_out = super;
      std::copy(words_.begin(), words_.end(), words);
      std::copy(scales_.begin(), scales_.end(), scales);
    }
    sums[0] = total;
    sums[1] = sums[2] = 0;
    measure(words, scales, *super_out, sums);
  }

 private:
  // Bytes and local scales for one super scale; returns the sum of the groups' values.
  int64_t search(float super) {
    std::fill(words_.begin(), words_.end(), 0);
    std::fill(scales_.begin(), scales_.end(), 0);
    int64_t total = 0;
    for (int g = 0; g < groups_;) {
      int end = g;
      while (end < groups_ && ratio(end, super) >= kLeastRms) ++end;
      if (end > g) total += search_run(g, end, super);
      g = end + 1;
    }
    return total;
  }

  double ratio(int g, float super) const { return recipe_.nominal * rms_[g] / static_cast<double>(super); }

  // A run of live groups, behind byte 0.
  int64_t search_run(int first, int end, float super) {
    int64_t total = 0;
    Costs costs = {};
    int before = 0;
    for (int g = first; g < end; ++g) {
      const double middle = std::min(std::max(std::nearbyint(ratio(g, super)), 1.0), double{kTrellisScaleMax});
      const int low = std::max(static_cast<int>(middle) + recipe_.window_low, 1);
      const int high = std::min(static_cast<int>(middle) + recipe_.window_high, kTrellisScaleMax);
      int kept = -1;
      for (int local = low; local <= high; ++local) {
        Trial& trial = trials_[kept == 0 ? 1 : 0];
        std::copy(costs, costs + kTrellisStates, trial.costs);
        if (g > first) {
          const int square = local * local;
          for (int32_t& cost : trial.costs)
            cost = std::min((cost * before * before + square / 2) / square, kCostLimit);
        }
        trial.local = local;
        try_scale(w_ + static_cast<int64_t>(g) * kGroup, static_cast<float>(local) * super, g == first, trial);
        if (kept < 0 || trial.value < trials_[kept].value) kept = &trial == &trials_[0] ? 0 : 1;
      }
      const Trial& best = trials_[kept];
      total += best.value;
      before = best.local;
      scales_[g] = static_cast<uint8_t>(best.local);
      std::copy(best.costs, best.costs + kTrellisStates, costs);
      std::copy(best.before, best.before + sizeof best.before, &before_[static_cast<size_t>(g) * sizeof best.before]);
    }
    int byte = static_cast<int>(std::min_element(costs, costs + kTrellisStates) - costs);
    for (int i = end * kTrellisBytes - 1; i >= first * kTrellisBytes; --i) {
      words_[i] = static_cast<uint8_t>(byte);
      byte = before_[static_cast<size_t>(i) * kTrellisStates + byte];
    }
    return total;
  }

  // Sixteen positions from trial.costs on.
  void try_scale(const float* w, float scale, bool opening, Trial& trial) const {
    const float inverse = 1.0f / scale;
    int64_t taken = 0;
    for (int i = 0; i < kTrellisBytes; ++i) {
      int32_t u[4];
      for (int d = 0; d < 4; ++d) {
        float y = w[4 * i + d] * inverse;
        y = y < -kTrellisClip ? -static_cast<float>(kTrellisClip) : y;
        y = y > kTrellisClip ? static_cast<float>(kTrellisClip) : y;
        u[d] = static_cast<int32_t>((y + 12582912.0f) - 12582912.0f);  // to nearest even (encode.cpp)
        taken -= u[d] * u[d];
      }
      uint32_t keys[kTrellisStates];
      alignas(64) uint32_t best[kTrellisStates];
      int count = 0;
      if (opening && i == 0) {
        keys[count++] = 0;  // no cost, state 0
      } else {
        for (int s = 0; s < kTrellisStates; ++s) {
          keys[count] = static_cast<uint32_t>(trial.costs[s]) << 8 | static_cast<uint32_t>(s);
          count += trial.costs[s] <= recipe_.beam;
        }
      }
      kernels_.step(keys, count, u, best);
      uint32_t least = best[0];
      for (int s = 1; s < kTrellisStates; ++s) least = std::min(least, best[s]);
      least >>= 8;
      for (int s = 0; s < kTrellisStates; ++s) {
        trial.before[i * kTrellisStates + s] = static_cast<uint8_t>(best[s]);
        trial.costs[s] = static_cast<int32_t>((best[s] >> 8) - least);
      }
      taken += least;
    }
    trial.value = static_cast<int64_t>(trial.local) * trial.local * taken;
  }

  // The error as the decoder will see it.
  void measure(const uint8_t* words, const uint8_t* scales, float super, double* sums) const {
    int before = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(words_.size()); ++i) {
      const float scale = static_cast<float>(scales[i / kTrellisBytes]) * super;
      int32_t v[4];
      trellis_values(before << 8 | words[i], v);
      before = words[i];
      for (int d = 0; d < 4; ++d) {
        const double value = static_cast<double>(static_cast<float>(v[d]) * scale);
        sums[1] += static_cast<double>(w_[4 * i + d]) * value;
        sums[2] += value * value;
      }
    }
  }

  const TrellisKernels& kernels_;
  const TrellisRecipe& recipe_;
  const int groups_;
  const float* w_ = nullptr;
  std::vector<double> rms_;
  std::vector<uint8_t> before_;  // [K/4, 256]
  std::vector<uint8_t> words_, scales_;
  Trial trials_[2];
};

}  // namespace

void trellis_values(int word, int32_t* v) {
  for (int j = 0; j < 2; ++j) {
    const uint32_t x = static_cast<uint32_t>(word) * kTrellisMultiplier[j] + kTrellisAddend[j];
    v[2 * j] = static_cast<int32_t>(x & 255u) - static_cast<int32_t>(x >> 8 & 255u);
    v[2 * j + 1] = static_cast<int32_t>(x >> 16 & 255u) - static_cast<int32_t>(x >> 24);
  }
}

const TrellisKernels* pick_trellis(const char* name) {
  // What a processor can run is the score loop's to say.
  const TrellisKernels* all[] = {trellis_avx512vnni(), trellis_avx512(), trellis_avx2(), trellis_plain()};
  for (const TrellisKernels* k : all)
    if (k && pick_kernels(k->name) && (!std::strcmp(name, "auto") || !std::strcmp(name, k->name))) return k;
  return nullptr;
}

void trellis_encode(const TrellisKernels& kernels, const TrellisRecipe& recipe, const float* weight, int64_t n,
                    int64_t k, int threads, const TrellisOutput& out) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    TrellisChannel channel(kernels, recipe, k);
    for (int64_t i = next++; i < n; i = next++)
      channel.run(weight + i * k, out.words + i * (k / 4), out.scales + i * (k / kGroup), out.supers + i,
                  out.sums + 3 * i);
  };
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < std::min<int64_t>(threads, n); ++t) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace ccq
