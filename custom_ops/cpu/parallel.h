// SPDX-License-Identifier: Apache-2.0
// Independent tasks on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace ccq {

// Runs work(i) for i in 0..count-1, each exactly once, on up to `threads` threads.
template <typename Work>
void parallel(int64_t count, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto loop = [&] {
    for (int64_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < std::min<int64_t>(threads, count); ++t) workers.emplace_back(loop);
  loop();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace ccq
