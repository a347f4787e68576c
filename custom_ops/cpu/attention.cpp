// SPDX-License-Identifier: Apache-2.0
// Attention around its kernel: rotary positions, the cache, tasks for the threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "floats.h"
#include "parallel.h"
#include "search.h"

namespace ccq {
namespace {

constexpr int64_t kThreadWork = 1 << 20;  // multiplications that are worth a thread

// Neighbouring pairs (2i, 2i + 1) of one head.
void rotate(const float* head, const float* cosines, const float* sines, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float a = head[2 * i], b = head[2 * i + 1];
    out[2 * i] = a * cosines[i] - b * sines[i];
    out[2 * i + 1] = a * sines[i] + b * cosines[i];
  }
}

struct Task {
  const Piece* piece;
  int64_t head, first;
  int count;
};

}  // namespace

const FloatKernels* pick_floats(const char* name) {
  const FloatKernels* all[] = {floats_avx512(), floats_avx2(), floats_plain()};
#if defined(__x86_64__) || defined(__i386__)
  const bool fma = __builtin_cpu_supports("fma");
#else
  const bool fma = false;
#endif
  for (const FloatKernels* k : all) {
    if (!k || !pick_kernels(k->name) || (k == floats_avx2() && !fma)) continue;
    if (!std::strcmp(name, "auto") || !std::strcmp(name, k->name)) return k;
  }
  return nullptr;
}

void attend(const FloatKernels& kernels, const Heads& h, const std::vector<Piece>& pieces, const float* qkv,
            int64_t tokens, const float* cosines, const float* sines, float* keys, float* values,
            int64_t places, float* out, int threads) {
  const int64_t group = h.query / h.key, half = h.dim / 2, width = (h.query + 2 * h.key) * h.dim;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(h.dim)));
  std::vector<float> queries(static_cast<size_t>(tokens * h.query * h.dim)), key(h.dim);
  std::vector<Task> tasks;
  int64_t work = 0;
  for (const Piece& piece : pieces) {
    for (int64_t i = 0; i < piece.count; ++i) {
      const int64_t token = piece.first + i, place = piece.base + piece.start + i;
      const float *row = qkv + token * width, *c = cosines + token * half, *s = sines + token * half;
      float* query = queries.data() + token * h.query * h.dim;
      for (int64_t n = 0; n < h.query; ++n) rotate(row + n * h.dim, c, s, h.dim, query + n * h.dim);
      for (int64_t d = 0; d < h.query * h.dim; ++d) query[d] *= scale;
      for (int64_t n = 0; n < h.key; ++n) {
        rotate(row + (h.query + n) * h.dim, c, s, h.dim, key.data());
        float* tile = keys + ((n * places + place) / kFloatLanes * h.dim) * kFloatLanes + place % kFloatLanes;
        for (int64_t d = 0; d < h.dim; ++d) tile[d * kFloatLanes] = key[d];
        std::copy_n(row + (h.query + h.key + n) * h.dim, h.dim, values + (n * places + place) * h.padded);
      }
    }
    // Queries of one key head in the order of their tokens, so that those of a task see alike many keys.
    for (int64_t n = 0; n < h.key; ++n)
      for (int64_t first = 0; first < piece.count * group; first += kQueries)
        tasks.push_back({&piece, n, first, static_cast<int>(std::min<int64_t>(kQueries, piece.count * group - first))});
    work += piece.count * h.query * h.dim * (piece.start + piece.count);
  }
  const int64_t useful = std::max<int64_t>(1, work / kThreadWork);
  parallel(static_cast<int64_t>(tasks.size()), static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t t) {
    const Task& task = tasks[t];
    const Piece& piece = *task.piece;
    Queries q;
    q.count = task.count;
    int64_t longest = 0;
    for (int r = 0; r < task.count; ++r) {
      const int64_t i = (task.first + r) / group, head = task.head * group + (task.first + r) % group;
      const int64_t at = ((piece.first + i) * h.query + head) * h.dim;
      q.query[r] = queries.data() + at;
      q.out[r] = out + at;
      q.seen[r] = piece.start + i + 1;
      longest = std::max(longest, q.seen[r]);
    }
    const int64_t stride = (longest + kFloatLanes - 1) / kFloatLanes * kFloatLanes;
    std::vector<float> scratch(static_cast<size_t>(kQueries * stride));
    const int64_t begin = task.head * places + piece.base;
    kernels.attend(q, keys + begin * h.dim, values + begin * h.padded, h.dim, h.padded, scratch.data(), stride);
  });
}

}  // namespace ccq
