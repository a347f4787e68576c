// SPDX-License-Identifier: Apache-2.0
// The data-free encoder's channel loop. Scores are integers; the few float operations are single IEEE
// operations in a fixed order, so the bytes depend on neither instruction set nor thread count.
// Compiled without floating-point contraction: a fused multiply-add would round differently.
#include "encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "channel.h"

namespace ccq {
namespace {

int32_t pair16(int32_t low, int32_t high) {
  return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xFFFFu) | (static_cast<uint32_t>(high) << 16));
}

// Scaled weights of up to kMaxBatch (group, scale) candidates in the layout the score loop reads.
class Batch {
 public:
  explicit Batch(const Layout& layout) : layout_(layout) {}

  void clear() { size_ = 0; }
  int size() const { return size_; }

  // x = round_to_nearest_even(w * (2^fraction / scale)), saturated to 16 bits.
  void add(const float* w, float scale) {
    const float inverse = static_cast<float>(1 << layout_.fraction) / scale;
    int32_t x[kGroup + 4] = {};
    for (int r = 0; r < kGroup; ++r) {
      float y = w[r] * inverse;
      y = y < -32767.0f ? -32767.0f : y;
      y = y > 32767.0f ? 32767.0f : y;
      // Adding and taking away 1.5 * 2^23 rounds to nearest even, in any instruction set.
      x[r] = static_cast<int32_t>((y + 12582912.0f) - 12582912.0f);
    }
    const int b = size_++;
    for (size_t s = 0; s < layout_.sets.size(); ++s) {
      const LaneSet& set = layout_.sets[s];
      int32_t* x01 = x01_[s] + b * kLanes;
      int32_t* x23 = x23_[s] + b * kLanes;
      if (set.dims == 4) {
        for (int l = 0; l < set.lanes; ++l) {
          const int32_t* v = x + set.first + l * set.stride;
          x01[l] = pair16(v[0], v[1]);
          x23[l] = pair16(v[2], v[3]);
        }
      } else {
        for (int l = 0; l < set.lanes; ++l) {
          const int32_t* v = x + set.first + l * set.stride;
          x01[l] = pair16(v[0], set.dims > 1 ? v[1] : 0);
          x23[l] = pair16(set.dims > 2 ? v[2] : 0, 0);
        }
      }
    }
    remainder_[b] = x[kGroup - 1];
  }

  // score[b] = sum over the group of x.c - |c|^2/2, in units of 2^-fraction.
  void score(const Kernels& kernels, const std::vector<Codebook>& books, int64_t* score) {
    std::fill(score, score + size_, 0);
    for (size_t s = 0; s < layout_.sets.size(); ++s) {
      const LaneSet& set = layout_.sets[s];
      const Codebook& book = books[set.book];
      kernels.score(book, x01_[s], x23_[s], best_[s], size_);
      for (int b = 0; b < size_; ++b) {
        int64_t sum = 0;
        for (int l = 0; l < set.lanes; ++l) sum += best_[s][b * kLanes + l] >> book.index_bits;
        score[b] += sum;
      }
    }
    if (layout_.remainder_shift) {
      for (int b = 0; b < size_; ++b) {
        const int64_t q = remainder_state(b);
        score[b] += remainder_[b] * q - ((q * q) << layout_.fraction) / 2;
      }
    }
  }

  // Words and signed states of candidate b, after score() with the same books.
  void decode(const std::vector<Codebook>& books, int b, uint16_t* words, int32_t* states) const {
    std::fill(words, words + layout_.words, 0);
    for (size_t s = 0; s < layout_.sets.size(); ++s) {
      const LaneSet& set = layout_.sets[s];
      const Codebook& book = books[set.book];
      for (int l = 0; l < set.lanes; ++l) {
        const int e = best_[s][b * kLanes + l] & ((1 << book.index_bits) - 1);
        words[set.word + l] |= static_cast<uint16_t>(e << set.shift);
        const int32_t c[4] = {static_cast<int16_t>(book.c01[e] & 0xFFFF), book.c01[e] >> 16,
                              static_cast<int16_t>(book.c23[e] & 0xFFFF), book.c23[e] >> 16};
        for (int d = 0; d < set.dims; ++d)
          states[set.first + l * set.stride + d] = c[d] >> book.index_bits;
      }
    }
    if (layout_.remainder_shift) {
      const int q = remainder_state(b);
      states[kGroup - 1] = q;
      words[layout_.words - 1] = static_cast<uint16_t>((q - layout_.state_min) << layout_.remainder_shift);
    }
  }

 private:
  int remainder_state(int b) const {
    const int q = (remainder_[b] + (1 << (layout_.fraction - 1))) >> layout_.fraction;
    return std::min(std::max(q, layout_.state_min), layout_.state_max);
  }

  const Layout& layout_;
  int size_ = 0;
  // Unused lanes keep zeros; their scores are never summed.
  alignas(64) int32_t x01_[4][kMaxBatch * kLanes] = {};
  alignas(64) int32_t x23_[4][kMaxBatch * kLanes] = {};
  alignas(64) int32_t best_[4][kMaxBatch * kLanes] = {};
  int32_t remainder_[kMaxBatch] = {};
};

// Local scales and their gain for one choice of pair and super scale.
struct Choice {
  double gain = -1;
  std::vector<int> scales;
};

class ChannelEncoder {
 public:
  ChannelEncoder(const Kernels& kernels, const Layout& layout, const Recipe& recipe,
                 const PairBooks& pairs, int64_t k)
      : kernels_(kernels), layout_(layout), recipe_(recipe), pairs_(pairs), groups_(k / kGroup),
        rms_(groups_), batch_(layout) {}

  void run(const float* w, uint16_t* words, uint16_t* scales, float* super_out, int32_t* pair_out,
           double* sums) {
    w_ = w;
    const double total = group_rms(w, rms_);
    const double channel_rms = std::sqrt(total / (static_cast<double>(groups_) * kGroup));
    const std::vector<float> supers =
        super_candidates(recipe_.kappas, recipe_.nominal * reference_rms(channel_rms));
    sums[0] = total;
    sums[1] = sums[2] = 0;
    if (supers.empty()) {
      std::fill(words, words + groups_ * layout_.words, 0);
      std::fill(scales, scales + groups_, 0);
      *super_out = 0;
      *pair_out = 0;
      return;
    }

    float super = 0;
    int pair = 0;
    Choice best;
    const std::vector<int> candidates = screen(supers[0]);
    for (float s : supers) {
      std::vector<Choice> choices = recipe_.ratios.empty() ? search_window(s, candidates)
                                                           : search_ratios(s, candidates);
      for (size_t c = 0; c < candidates.size(); ++c) {
        if (choices[c].gain > best.gain) {
          best = std::move(choices[c]);
          super = s;
          pair = candidates[c];
        }
      }
    }
    *super_out = super;
    *pair_out = pair;
    finish(super, pairs_[pair], best.scales, words, scales, sums);
  }

 private:
  const float* group(int g) const { return w_ + static_cast<int64_t>(g) * kGroup; }

  // Coarse scales: super scales relate to the channel's rms. Fine ones: the largest group must fit.
  double reference_rms(double channel_rms) const {
    return recipe_.ratios.empty() ? channel_rms : *std::max_element(rms_.begin(), rms_.end());
  }

  int clamp_scale(double s) const {
    return static_cast<int>(std::min(std::max(std::nearbyint(s), 1.0), static_cast<double>(layout_.scale_max)));
  }
  int nominal_scale(int g, float super) const { return clamp_scale(recipe_.nominal * rms_[g] / super); }

  static double gain(float scale, int64_t score) {
    return static_cast<double>(scale) * static_cast<double>(scale) * static_cast<double>(score);
  }

  // Pairs worth a full search: the best few on every group's nominal scale.
  std::vector<int> screen(float super) {
    const int count = static_cast<int>(pairs_.size());
    std::vector<int> order(count);
    for (int p = 0; p < count; ++p) order[p] = p;
    if (count <= recipe_.keep_pairs) return order;
    std::vector<double> gains(count, 0);
    float scale[kMaxBatch];
    int64_t score[kMaxBatch];
    for (int g = 0; g < groups_;) {
      batch_.clear();
      for (; g < groups_ && batch_.size() < kMaxBatch; ++g) {
        if (rms_[g] == 0) continue;
        scale[batch_.size()] = static_cast<float>(nominal_scale(g, super)) * super;
        batch_.add(group(g), scale[batch_.size()]);
      }
      for (int p = 0; p < count; ++p) {
        batch_.score(kernels_, pairs_[p], score);
        for (int b = 0; b < batch_.size(); ++b) gains[p] += gain(scale[b], score[b]);
      }
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return gains[a] > gains[b]; });
    order.resize(recipe_.keep_pairs);
    return order;
  }

  std::vector<Choice> empty_choices(size_t count) const {
    return std::vector<Choice>(count, Choice{0, std::vector<int>(groups_, 0)});
  }

  // Coarse local scales: every integer of the window around the nominal one.
  std::vector<Choice> search_window(float super, const std::vector<int>& candidates) {
    std::vector<Choice> choices = empty_choices(candidates.size());
    int local[kMaxBatch];
    int64_t score[kMaxBatch];
    for (int g = 0; g < groups_; ++g) {
      if (rms_[g] == 0) continue;
      const int nominal = nominal_scale(g, super);
      const int high = std::min(nominal + recipe_.window_high, layout_.scale_max);
      std::vector<double> best(candidates.size(), -1);
      for (int s = std::max(nominal + recipe_.window_low, 1); s <= high;) {
        batch_.clear();
        for (; s <= high && batch_.size() < kMaxBatch; ++s) {
          local[batch_.size()] = s;
          batch_.add(group(g), static_cast<float>(s) * super);
        }
        for (size_t c = 0; c < candidates.size(); ++c) {
          batch_.score(kernels_, pairs_[candidates[c]], score);
          for (int b = 0; b < batch_.size(); ++b) {
            const double value = gain(static_cast<float>(local[b]) * super, score[b]);
            if (value > best[c]) {
              best[c] = value;
              choices[c].scales[g] = local[b];
            }
          }
        }
      }
      for (size_t c = 0; c < candidates.size(); ++c) choices[c].gain += best[c];
    }
    return choices;
  }

  // Fine local scales: multiples of the nominal one, then eq. (4) and a new search while it helps.
  std::vector<Choice> search_ratios(float super, const std::vector<int>& candidates) {
    std::vector<Choice> choices = empty_choices(candidates.size());
    int local[kMaxBatch];
    int64_t score[kMaxBatch];
    uint16_t words[kGroup];
    int32_t states[kGroup];
    for (int g = 0; g < groups_; ++g) {
      if (rms_[g] == 0) continue;
      for (size_t c = 0; c < candidates.size(); ++c) {
        const std::vector<Codebook>& books = pairs_[candidates[c]];
        batch_.clear();
        for (double ratio : recipe_.ratios) {
          local[batch_.size()] = clamp_scale(recipe_.nominal * rms_[g] * ratio / super);
          batch_.add(group(g), static_cast<float>(local[batch_.size()]) * super);
        }
        batch_.score(kernels_, books, score);
        double best = -1;
        int at = 0;
        for (int b = 0; b < batch_.size(); ++b) {
          const double value = gain(static_cast<float>(local[b]) * super, score[b]);
          if (value > best) {
            best = value;
            at = b;
          }
        }
        int scale = local[at];
        batch_.decode(books, at, words, states);
        for (int round = 0; round < recipe_.refits; ++round) {
          double dot = 0, norm = 0;
          for (int r = 0; r < kGroup; ++r) {
            dot += static_cast<double>(group(g)[r]) * states[r];
            norm += static_cast<double>(states[r]) * states[r];
          }
          if (norm == 0) break;
          const int fitted = clamp_scale(dot / norm / super);
          if (fitted == scale) break;
          batch_.clear();
          batch_.add(group(g), static_cast<float>(fitted) * super);
          batch_.score(kernels_, books, score);
          const double value = gain(static_cast<float>(fitted) * super, score[0]);
          if (!(value > best)) break;
          best = value;
          scale = fitted;
          batch_.decode(books, 0, words, states);
        }
        choices[c].gain += best;
        choices[c].scales[g] = scale;
      }
    }
    return choices;
  }

  // The words of the chosen scales, and the error as the decoder will see it.
  void finish(float super, const std::vector<Codebook>& books, const std::vector<int>& local,
              uint16_t* words, uint16_t* scales, double* sums) {
    int64_t score[kMaxBatch];
    int32_t states[kGroup];
    for (int first = 0; first < groups_;) {
      int members[kMaxBatch];
      batch_.clear();
      int g = first;
      for (; g < groups_ && batch_.size() < kMaxBatch; ++g) {
        scales[g] = static_cast<uint16_t>(local[g]);
        if (local[g] == 0) {
          std::fill(words + g * layout_.words, words + (g + 1) * layout_.words, 0);
          continue;
        }
        members[batch_.size()] = g;
        batch_.add(group(g), static_cast<float>(local[g]) * super);
      }
      first = g;
      batch_.score(kernels_, books, score);
      for (int b = 0; b < batch_.size(); ++b) {
        g = members[b];
        batch_.decode(books, b, words + g * layout_.words, states);
        const float scale = static_cast<float>(local[g]) * super;
        for (int r = 0; r < kGroup; ++r) {
          const double value = static_cast<double>(static_cast<float>(states[r]) * scale);
          sums[1] += static_cast<double>(group(g)[r]) * value;
          sums[2] += value * value;
        }
      }
    }
  }

  const Kernels& kernels_;
  const Layout& layout_;
  const Recipe& recipe_;
  const PairBooks& pairs_;
  const int groups_;
  const float* w_ = nullptr;
  std::vector<double> rms_;
  Batch batch_;
};

}  // namespace

void encode(const Kernels& kernels, const Layout& layout, const Recipe& recipe, const PairBooks& pairs,
            const float* weight, int64_t n, int64_t k, int threads, const Output& out) {
  const int64_t groups = k / kGroup;
  std::atomic<int64_t> next{0};
  auto work = [&] {
    ChannelEncoder channel(kernels, layout, recipe, pairs, k);
    for (int64_t i = next++; i < n; i = next++) {
      channel.run(weight + i * k, out.words + i * groups * layout.words, out.scales + i * groups,
                  out.supers + i, out.pairs + i, out.sums + 3 * i);
    }
  };
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < std::min<int64_t>(threads, n); ++t) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace ccq
