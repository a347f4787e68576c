// SPDX-License-Identifier: Apache-2.0
// The calibrated search of ccq-2t: what paddle_ccq/encoder/trellis_ldlq_reference.py says, with the same bytes.
// Searches are integers; all else is single float32 operations in a fixed order, channels apart from each other.
#include "trellis_ldlq.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "channel.h"
#include "parallel.h"
#include "trellis_run.h"

namespace ccq {
namespace {

constexpr int kBatch = 16;  // channels that share a table of a block
constexpr float kLeastRms = 3.0f / 16.0f;

class Batch {
 public:
  Batch(const TrellisKernels& kernels, const TrellisHessian& h, const TrellisLdlqRecipe& recipe)
      : kernels_(kernels), h_(h), recipe_(recipe), k_(h.k), groups_(static_cast<int>(h.k / kGroup)), t01_(1 << 16),
        t23_(1 << 16) {}

  // Channels first .. first + count.
  void run(const float* weight, const float* supers, int candidates, int64_t n, int64_t first, int count,
           const TrellisLdlqOutput& out) {
    count_ = count;
    w_ = weight + first * k_;
    std::vector<double> least(count, 0);
    for (int j = 0; j < candidates; ++j) {
      start(supers + j * n + first);
      feed_back();
      if (recipe_.sweeps) descend();
      for (int c = 0; c < count; ++c) {
        if (j && !(loss_[c] < least[c])) continue;
        least[c] = loss_[c];
        std::copy(words_.begin() + c * (k_ / 4), words_.begin() + (c + 1) * (k_ / 4), out.words + (first + c) * (k_ / 4));
        std::copy(scales_.begin() + c * groups_, scales_.begin() + (c + 1) * groups_,
                  out.scales + (first + c) * groups_);
        out.supers[first + c] = super_[c];
        out.loss[first + c] = loss_[c];
      }
    }
  }

 private:
  void start(const float* supers) {
    super_.assign(supers, supers + count_);
    words_.assign(count_ * (k_ / 4), 0);
    scales_.assign(static_cast<size_t>(count_) * groups_, 0);
    loss_.assign(count_, 0);
  }

  std::vector<std::unique_ptr<Run>>& runs(int wanted) {
    while (static_cast<int>(runs_.size()) < wanted) runs_.push_back(std::make_unique<Run>());
    return runs_;
  }

  void make_table(const float* root) { kernels_.table(values(), root, t01_.data(), t23_.data()); }

  // x[c] += e[c] M for rows [first, first + 64) of M, from row `from` on.
  void add_rows(std::vector<float>& x, const std::vector<float>& e, const float* m, int64_t first, int64_t rows,
                int64_t from) {
    for (int64_t r = from; r < k_; r += kGroup)
      for (int c = 0; c < count_; ++c)
        kernels_.add_tile(x.data() + c * k_ + r, e.data() + c * kRowsMax, m + first * k_ + r, k_,
                          static_cast<int>(rows));
  }

  struct Trial {
    int channel;
    Run* run;
  };

  void feed_back() {
    std::vector<float> x(w_, w_ + count_ * k_);
    std::vector<std::unique_ptr<Survivors>> start(count_), old(count_);
    std::vector<uint8_t> pending(count_, 0);  // the last group's bytes are not decided yet
    std::vector<int> before(count_, 1);
    std::vector<float> decided(count_ * kRowsMax), zeros(count_ * kRowsMax);
    for (int c = 0; c < count_; ++c) {
      start[c] = std::make_unique<Survivors>();
      start[c]->single(0);
    }
    for (int g = 0; g < groups_; ++g) {
      const int64_t first = static_cast<int64_t>(g) * kGroup;
      std::vector<Trial> trials;
      bool any_zeros = false;
      std::fill(decided.begin(), decided.end(), 0.0f);
      std::fill(zeros.begin(), zeros.end(), 0.0f);
      std::vector<std::vector<Run*>> of(count_);
      for (int c = 0; c < count_; ++c) {
        Survivors& s = *start[c];
        if (pending[c]) keep_errors(c, s);
        for (int i = 0; i < s.count; ++i) {
          std::memcpy(s.rows[i], x.data() + c * k_ + first, sizeof(float) * kGroup);
          if (pending[c]) kernels_.add_tile(s.rows[i], errors_[c][i].data(), h_.all.m + (first - kGroup) * k_ + first, k_, kGroup);
        }
        const float* own = s.rows[s.best()];
        float energy = 0;
        for (int r = 0; r < kGroup; ++r) energy += own[r] * own[r];
        const float ratio = std::sqrt(energy * (1.0f / kGroup)) * static_cast<float>(recipe_.nominal) / super_[c];
        if (!(ratio >= kLeastRms)) continue;
        const int middle = static_cast<int>(std::min(std::max(whole(std::min(ratio, 100.0f)), 1.0f), 15.0f));
        for (int l = std::max(middle + recipe_.window_low, 1); l <= std::min(middle + recipe_.window_high, 15); ++l) {
          Run* run = runs(static_cast<int>(trials.size()) + 1)[trials.size()].get();
          run->local = l;
          run->value = 0;
          trials.push_back({c, run});
          of[c].push_back(run);
          Survivors& t = *run->now;
          t.count = s.count;
          const float factor = g ? static_cast<float>(before[c] * before[c]) / static_cast<float>(l * l) *
                                       h_.all.ratio[first / 4]
                                 : 1.0f;
          for (int i = 0; i < s.count; ++i) {
            t.cost[i] = static_cast<int32_t>(rescaled(s.cost[i], factor));
            t.state[i] = s.state[i];
            std::memcpy(t.rows[i], s.rows[i], sizeof(float) * kGroup);
          }
        }
      }
      for (int b = 0; b < kTrellisBytes && !trials.empty(); ++b) {
        const int64_t block = first / 4 + b;
        make_table(h_.all.root + 16 * block);
        for (const Trial& t : trials) {
          if (b) rescale(*t.run->now, h_.all.ratio[block]);
          t.run->step(kernels_, t01_.data(), t23_.data(), b, kGroup, w_ + t.channel * k_ + first,
                      h_.all.m + first * k_ + first, k_, h_.all.root + 16 * block, h_.all.unit[block],
                      static_cast<float>(t.run->local) * super_[t.channel], beam(h_.all.spread[block]), -1);
        }
      }
      for (int c = 0; c < count_; ++c) {
        Survivors& s = *start[c];
        if (of[c].empty()) {
          // Zeros: what came before is decided, and the chain begins anew.
          if (pending[c]) decide(c, g - 1, s.best(), decided.data() + c * kRowsMax);
          any_zeros = true;
          std::memcpy(zeros.data() + c * kRowsMax, w_ + c * k_ + first, sizeof(float) * kGroup);
          pending[c] = 0;
          before[c] = 1;
          s.single(0);
          continue;
        }
        Run* best = of[c][0];
        for (Run* run : of[c])
          if (run->value < best->value) best = run;
        const int origin = best->now->origin[best->now->best()];
        if (pending[c]) decide(c, g - 1, origin, decided.data() + c * kRowsMax);
        loss_[c] += best->value;
        scales_[static_cast<size_t>(c) * groups_ + g] = static_cast<uint8_t>(best->local);
        before[c] = best->local;
        pending[c] = 1;
        const Survivors& found = *best->now;
        s.count = 0;
        for (int i = 0; i < found.count; ++i) {
          if (found.origin[i] != origin) continue;
          s.cost[s.count] = found.cost[i];
          s.state[s.count] = found.state[i];
          std::memcpy(s.bytes[s.count], found.bytes[i], kTrellisBytes);
          std::memcpy(s.rows[s.count], found.rows[i], sizeof(float) * kGroup);
          ++s.count;
        }
      }
      if (g) add_rows(x, decided, h_.all.m, first - kGroup, kGroup, first + kGroup);
      if (any_zeros) add_rows(x, zeros, h_.all.m, first, kGroup, first + kGroup);
    }
    for (int c = 0; c < count_; ++c)
      if (pending[c]) {
        keep_errors(c, *start[c]);
        decide(c, groups_ - 1, start[c]->best(), decided.data() + c * kRowsMax);
      }
  }

  // Errors and bytes of the last group, while its survivors search the next.
  void keep_errors(int c, const Survivors& s) {
    errors_.resize(std::max<size_t>(errors_.size(), count_));
    bytes_.resize(errors_.size());
    errors_[c].resize(s.count);
    bytes_[c].resize(s.count);
    for (int i = 0; i < s.count; ++i) {
      std::memcpy(errors_[c][i].data(), s.rows[i], sizeof(float) * kGroup);
      std::memcpy(bytes_[c][i].data(), s.bytes[i], kTrellisBytes);
    }
  }

  void decide(int c, int g, int survivor, float* errors) {
    std::memcpy(errors, errors_[c][survivor].data(), sizeof(float) * kGroup);
    std::memcpy(&words_[c * (k_ / 4) + g * kTrellisBytes], bytes_[c][survivor].data(), kTrellisBytes);
  }

  int beam(float spread) const { return static_cast<int>(whole(static_cast<float>(recipe_.beam) * spread)); }

  static void rescale(Survivors& s, float factor) {
    for (int i = 0; i < s.count; ++i) s.cost[i] = static_cast<int32_t>(rescaled(s.cost[i], factor));
  }

  // e = w - w' of all channels.
  void measure_errors(std::vector<float>& e) const {
    const int16_t* v = values();
    for (int c = 0; c < count_; ++c) {
      int before = 0;
      for (int64_t i = 0; i < k_ / 4; ++i) {
        const int byte = words_[c * (k_ / 4) + i], word = before << 8 | byte;
        const float scale = static_cast<float>(scales_[static_cast<size_t>(c) * groups_ + i / kTrellisBytes]) * super_[c];
        for (int d = 0; d < 4; ++d)
          e[c * k_ + 4 * i + d] = w_[c * k_ + 4 * i + d] - scale * static_cast<float>(v[(d << 16) + word]);
        before = byte;
      }
    }
  }

  void times_h(const float* e, std::vector<float>& out) {
    std::fill(out.begin(), out.end(), 0.0f);
    std::vector<float> part(count_ * kRowsMax);
    for (int64_t first = 0; first < k_; first += kGroup) {
      for (int c = 0; c < count_; ++c)
        std::memcpy(part.data() + c * kRowsMax, e + c * k_ + first, sizeof(float) * kGroup);
      add_rows(out, part, h_.h, first, kGroup, 0);
    }
  }

  void descend() {
    std::vector<float> error(count_ * k_), gradient(count_ * k_), target(count_ * k_);
    times_h(w_, target);
    measure_errors(error);
    times_h(error.data(), gradient);
    for (int sweep = 0; sweep < recipe_.sweeps; ++sweep) {
      for (int g = 0; g < groups_; ++g) descend_group(g, error, gradient);
      for (int c = 0; c < count_; ++c) refit(c, error.data() + c * k_, gradient.data() + c * k_, target.data() + c * k_);
      measure_errors(error);
      times_h(error.data(), gradient);
    }
    for (int c = 0; c < count_; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < k_; ++r)
        sum += static_cast<double>(error[c * k_ + r]) * static_cast<double>(gradient[c * k_ + r]);
      loss_[c] = sum;
    }
  }

  // The best factor on w' = w - e is 1 + (w' H e) / (w' H w').
  void refit(int c, const float* e, const float* g, const float* hw) {
    float cross = 0, norm = 0;
    for (int64_t r = 0; r < k_; ++r) {
      const float w = w_[c * k_ + r] - e[r];
      cross += w * g[r];
      norm += w * (hw[r] - g[r]);
    }
    const float old = super_[c];
    const float fitted = bfloat16_of(old + old * (cross / norm));
    const float t = fitted / old - 1.0f;
    if (norm > 0.0f && fitted > 0.0f && t * (t * norm - 2.0f * cross) < 0.0f) super_[c] = fitted;
  }

  // A group anew, its neighbours fixed: behind the byte before it, and up to the first byte of the next group,
  // whose weights its last byte takes part in.
  void descend_group(int g, std::vector<float>& error, std::vector<float>& gradient) {
    const int64_t first = static_cast<int64_t>(g) * kGroup;
    const bool last = g + 1 == groups_;
    const int rows = last ? kGroup : kWindowRows;
    const float* h = h_.h + first * k_ + first;
    const float* inverse = h_.inverse + static_cast<int64_t>(g) * kWindowRows * kWindowRows;
    const float* m = h_.windows.m + static_cast<int64_t>(g) * kWindowRows * kWindowRows;
    const float* root = h_.windows.root + static_cast<int64_t>(g) * kWindowBlocks * 16;
    const float* unit = h_.windows.unit + static_cast<int64_t>(g) * kWindowBlocks;
    const float* ratio = h_.windows.ratio + static_cast<int64_t>(g) * kWindowBlocks;
    const float* spread = h_.windows.spread + static_cast<int64_t>(g) * kWindowBlocks;
    std::vector<Trial> trials;
    std::vector<std::vector<Run*>> of(count_);
    std::vector<float> wanted(count_ * kRowsMax);
    for (int c = 0; c < count_; ++c) {
      const uint8_t* scales = &scales_[static_cast<size_t>(c) * groups_];
      if (!scales[g] || (!last && !scales[g + 1])) continue;
      // Without the window's own errors the gradient is q; its weights would best be w + q H^-1.
      const float *e = error.data() + c * k_ + first, *full = gradient.data() + c * k_ + first;
      float q[kWindowRows];
      float* t = wanted.data() + c * kRowsMax;
      for (int r = 0; r < rows; ++r) {
        float own = 0;
        for (int i = 0; i < rows; ++i) own += e[i] * h[i * k_ + r];
        q[r] = full[r] - own;
      }
      for (int r = 0; r < rows; ++r) {
        float sum = w_[c * k_ + first + r];
        for (int i = 0; i < rows; ++i) sum += q[i] * inverse[i * kWindowRows + r];
        t[r] = sum;
      }
      for (int step : {0, -1, 1}) {
        const int l = scales[g] + step;
        if (l < 1 || l > kTrellisScaleMax) continue;
        Run* run = runs(static_cast<int>(trials.size()) + 1)[trials.size()].get();
        run->local = l;
        run->value = 0;
        trials.push_back({c, run});
        of[c].push_back(run);
        run->now->single(g ? words_[c * (k_ / 4) + first / 4 - 1] : 0);
        std::memcpy(run->now->rows[0], t, sizeof(float) * rows);
      }
    }
    for (int b = 0; b < rows / 4 && !trials.empty(); ++b) {
      make_table(root + 16 * b);
      for (const Trial& t : trials) {
        const uint8_t* scales = &scales_[static_cast<size_t>(t.channel) * groups_];
        const bool next = b == kTrellisBytes;
        float factor = ratio[b];
        if (next)
          factor = static_cast<float>(t.run->local * t.run->local) / static_cast<float>(scales[g + 1] * scales[g + 1]) *
                   factor;
        if (b) rescale(*t.run->now, factor);
        t.run->step(kernels_, t01_.data(), t23_.data(), b, rows, wanted.data() + t.channel * kRowsMax, m, kWindowRows,
                    root + 16 * b, unit[b],
                    static_cast<float>(next ? scales[g + 1] : t.run->local) * super_[t.channel], beam(spread[b]),
                    next ? words_[t.channel * (k_ / 4) + first / 4 + kTrellisBytes] : -1);
      }
    }
    std::vector<float> moves(count_ * kRowsMax);
    bool any = false;
    for (int c = 0; c < count_; ++c) {
      if (of[c].empty()) continue;
      const Run* best = of[c][0];
      for (const Run* run : of[c])
        if (run->value < best->value) best = run;
      const Survivors& found = *best->now;
      const int chosen = found.best();
      float *e = error.data() + c * k_ + first, *move = moves.data() + c * kRowsMax;
      const float *full = gradient.data() + c * k_ + first, *t = wanted.data() + c * kRowsMax;
      // Errors counted from the wanted weights, back to errors of the weights.
      float now[kWindowRows];
      for (int r = 0; r < rows; ++r) {
        now[r] = found.rows[chosen][r] - t[r] + w_[c * k_ + first + r];
        move[r] = now[r] - e[r];
      }
      // Growth of e H e^T: v.(g before + g after) for a move v.
      float growth = 0;
      for (int r = 0; r < rows; ++r) {
        float moved = 0;
        for (int i = 0; i < rows; ++i) moved += move[i] * h[i * k_ + r];
        growth += move[r] * (full[r] + (full[r] + moved));
      }
      if (!(growth < 0.0f)) {
        std::fill(move, move + rows, 0.0f);
        continue;
      }
      any = true;
      for (int r = 0; r < rows; ++r) e[r] = now[r];
      scales_[static_cast<size_t>(c) * groups_ + g] = static_cast<uint8_t>(best->local);
      std::memcpy(&words_[c * (k_ / 4) + first / 4], found.bytes[chosen], kTrellisBytes);
    }
    if (any) add_rows(gradient, moves, h_.h, first, rows, 0);
  }

  const TrellisKernels& kernels_;
  const TrellisHessian& h_;
  const TrellisLdlqRecipe& recipe_;
  const int64_t k_;
  const int groups_;
  int count_ = 0;
  const float* w_ = nullptr;
  std::vector<uint32_t> t01_, t23_;
  std::vector<std::unique_ptr<Run>> runs_;
  std::vector<float> super_;
  std::vector<uint8_t> words_, scales_;
  std::vector<double> loss_;
  std::vector<std::vector<std::array<float, kGroup>>> errors_;
  std::vector<std::vector<std::array<uint8_t, kTrellisBytes>>> bytes_;
};

}  // namespace

void trellis_ldlq_encode(const TrellisKernels& kernels, const TrellisHessian& hessian, const TrellisLdlqRecipe& recipe,
                         const float* supers, int candidates, const float* weight, int64_t n, int threads,
                         const TrellisLdlqOutput& out) {
  parallel((n + kBatch - 1) / kBatch, threads, [&](int64_t i) {
    Batch batch(kernels, hessian, recipe);
    batch.run(weight, supers, candidates, n, i * kBatch, static_cast<int>(std::min<int64_t>(kBatch, n - i * kBatch)), out);
  });
}

}  // namespace ccq
