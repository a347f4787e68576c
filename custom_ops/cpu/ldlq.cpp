// SPDX-License-Identifier: Apache-2.0
// Which pairs and super scales the calibrated search tries for which channels, and on which threads.
#include "ldlq.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace ccq {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
std::unique_ptr<T[], Free> aligned(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(p));
}

// One channel's best so far.
struct Found {
  double loss = -1;  // none yet
  int pair = 0;
  float super_scale = 0;
  std::vector<uint8_t> words, scales;
};

// Buffers of one thread: up to sixteen channels in lanes. Unused lanes repeat the last channel.
class Lanes {
 public:
  explicit Lanes(int64_t k)
      : k_(k), w_(aligned<float>(k * kChannels)), local_(aligned<float>(k / kRows * kChannels)),
        words_(aligned<int32_t>(k / kBlock * kChannels)), super_(aligned<float>(kChannels)),
        scratch_(aligned<float>(3 * k * kChannels)) {}

  void load(const float* weight, const std::vector<int64_t>& rows) {
    rows_ = &rows;
    for (int l = 0; l < kChannels; ++l) {
      const float* w = weight + row(l) * k_;
      for (int64_t r = 0; r < k_; ++r) w_[r * kChannels + l] = w[r];
    }
  }

  int64_t row(int lane) const { return (*rows_)[std::min<size_t>(lane, rows_->size() - 1)]; }
  int used() const { return static_cast<int>(rows_->size()); }
  float& super_scale(int lane) { return super_[lane]; }
  double loss(int lane) const { return loss_[lane]; }
  Channels view() {
    return {w_.get(), super_.get(), local_.get(), words_.get(), loss_, scratch_.get()};
  }

  void put(int lane, const Found& f) {
    super_[lane] = f.super_scale;
    for (size_t g = 0; g < f.scales.size(); ++g) local_[g * kChannels + lane] = f.scales[g];
    for (size_t b = 0; b < f.words.size(); ++b) words_[b * kChannels + lane] = f.words[b];
  }

  void get(int lane, int pair, Found* f) const {
    f->loss = loss_[lane];
    f->pair = pair;
    f->super_scale = super_[lane];
    f->scales.resize(k_ / kRows);
    f->words.resize(k_ / kBlock);
    for (size_t g = 0; g < f->scales.size(); ++g)
      f->scales[g] = static_cast<uint8_t>(local_[g * kChannels + lane]);
    for (size_t b = 0; b < f->words.size(); ++b)
      f->words[b] = static_cast<uint8_t>(words_[b * kChannels + lane]);
  }

 private:
  const int64_t k_;
  const std::vector<int64_t>* rows_ = nullptr;
  std::unique_ptr<float[], Free> w_, local_;
  std::unique_ptr<int32_t[], Free> words_;
  std::unique_ptr<float[], Free> super_, scratch_;
  double loss_[kChannels] = {};
};

// Up to sixteen channels that use one pair.
struct Unit {
  int pair;
  std::vector<int64_t> rows;
};

std::vector<Unit> units_of(const std::vector<std::vector<int64_t>>& rows_of_pair) {
  std::vector<Unit> units;
  for (size_t p = 0; p < rows_of_pair.size(); ++p) {
    const std::vector<int64_t>& rows = rows_of_pair[p];
    for (size_t i = 0; i < rows.size(); i += kChannels)
      units.push_back({static_cast<int>(p), {rows.begin() + i, rows.begin() + std::min(i + kChannels, rows.size())}});
  }
  return units;
}

void run_all(const std::vector<Unit>& units, int64_t k, int threads,
             const std::function<void(const Unit&, Lanes&)>& task) {
  std::atomic<size_t> next{0};
  auto work = [&] {
    Lanes lanes(k);
    for (size_t i = next++; i < units.size(); i = next++) task(units[i], lanes);
  };
  std::vector<std::thread> workers;
  for (size_t t = 1; t < std::min<size_t>(threads, units.size()); ++t) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

const LdlqKernels* pick_ldlq(const char* name) {
  const LdlqKernels* usable[] = {nullptr, nullptr, ldlq_plain()};
#if defined(__x86_64__) || defined(__i386__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) usable[0] = ldlq_avx512();
  if (__builtin_cpu_supports("avx2")) usable[1] = ldlq_avx2();
#endif
  const std::string wanted(name);
  for (const LdlqKernels* kernels : usable)
    if (kernels && (wanted == "auto" || wanted == kernels->name)) return kernels;
  return nullptr;
}

void ldlq_encode(const LdlqKernels& kernels, const Metric& shared, const LdlqRecipe& recipe,
                 const float* books, int pairs, const float* supers, int candidates,
                 const float* weight, int64_t n, int threads, const LdlqOutput& out) {
  const int64_t k = shared.k;
  auto metric_of = [&](int pair) {
    Metric metric = shared;
    metric.book = books + static_cast<int64_t>(pair) * kWords * kBlock;
    return metric;
  };
  std::vector<int64_t> everyone(n);
  for (int64_t i = 0; i < n; ++i) everyone[i] = i;

  // 1. Which pairs suit a channel? One run each, on nominal scales and the first super scale.
  std::vector<std::vector<int64_t>> rows_of(pairs, everyone);
  if (pairs > recipe.keep_pairs) {
    std::vector<double> loss(static_cast<size_t>(n) * pairs);
    run_all(units_of(rows_of), k, threads, [&](const Unit& unit, Lanes& lanes) {
      lanes.load(weight, unit.rows);
      for (int l = 0; l < kChannels; ++l) lanes.super_scale(l) = supers[lanes.row(l)];
      kernels.feed_back(metric_of(unit.pair), lanes.view(), 0, 0);
      for (int l = 0; l < lanes.used(); ++l) loss[lanes.row(l) * pairs + unit.pair] = lanes.loss(l);
    });
    rows_of.assign(pairs, {});
    std::vector<int> order(pairs);
    for (int64_t i = 0; i < n; ++i) {
      for (int p = 0; p < pairs; ++p) order[p] = p;
      const double* own = loss.data() + i * pairs;
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return own[a] < own[b]; });
      for (int p = 0; p < recipe.keep_pairs; ++p) rows_of[order[p]].push_back(i);
    }
  }

  // 2. Error feedback with every super scale; each unit keeps its channels' best.
  const std::vector<Unit> units = units_of(rows_of);
  std::vector<std::vector<Found>> found(units.size());
  run_all(units, k, threads, [&](const Unit& unit, Lanes& lanes) {
    std::vector<Found>& mine = found[&unit - units.data()];
    mine.resize(unit.rows.size());
    lanes.load(weight, unit.rows);
    for (int s = 0; s < candidates; ++s) {
      for (int l = 0; l < kChannels; ++l) lanes.super_scale(l) = supers[s * n + lanes.row(l)];
      kernels.feed_back(metric_of(unit.pair), lanes.view(), recipe.low, recipe.high);
      for (int l = 0; l < lanes.used(); ++l)
        if (mine[l].loss < 0 || lanes.loss(l) < mine[l].loss) lanes.get(l, unit.pair, &mine[l]);
    }
  });
  std::vector<Found> best(n);
  for (size_t u = 0; u < units.size(); ++u)
    for (size_t l = 0; l < units[u].rows.size(); ++l) {
      Found& old = best[units[u].rows[l]];
      if (old.loss < 0 || found[u][l].loss < old.loss) old = std::move(found[u][l]);
    }
  found.clear();

  // 3. Coordinate descent from there.
  if (recipe.sweeps) {
    rows_of.assign(pairs, {});
    for (int64_t i = 0; i < n; ++i) rows_of[best[i].pair].push_back(i);
    run_all(units_of(rows_of), k, threads, [&](const Unit& unit, Lanes& lanes) {
      lanes.load(weight, unit.rows);
      for (int l = 0; l < kChannels; ++l) lanes.put(l, best[lanes.row(l)]);
      kernels.descend(metric_of(unit.pair), lanes.view(), recipe.sweeps);
      for (int l = 0; l < lanes.used(); ++l) lanes.get(l, unit.pair, &best[lanes.row(l)]);
    });
  }
  for (int64_t i = 0; i < n; ++i) {
    const Found& f = best[i];
    std::copy(f.words.begin(), f.words.end(), out.words + i * (k / kBlock));
    std::copy(f.scales.begin(), f.scales.end(), out.scales + i * (k / kRows));
    out.supers[i] = f.super_scale;
    out.pairs[i] = f.pair;
    out.loss[i] = f.loss;
  }
}

}  // namespace ccq
