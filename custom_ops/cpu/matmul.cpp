// SPDX-License-Identifier: Apache-2.0
// Around the block kernels: fixed-point activations, tasks for the threads, SwiGLU.
#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel.h"
#include "search.h"

namespace ccq {

const FormatInfo& info(Format format) {
  static const FormatInfo table[] = {
      {"wint2", 16, 1, 32, 4}, {"ccq-2.5", 10, 2, 4, 13}, {"ccq-2.75", 22, 1, 8, 4}, {"ccq-2t", 16, 1, 0, 4}};
  return table[static_cast<int>(format)];
}

constexpr size_t kHugePage = 2 << 20;

Buffer::Buffer(size_t bytes) : size_(bytes) {
  const size_t rounded = (std::max<size_t>(bytes, 1) + 63) / 64 * 64;
  void* memory = nullptr;
  if (posix_memalign(&memory, rounded >= kHugePage ? kHugePage : 64, rounded)) throw std::bad_alloc();
  data_.reset(static_cast<uint8_t*>(memory));
#if defined(__linux__)
  // Streaming touches a new 4 KB page every few hundred cycles; large pages spare the lookups.
  if (rounded >= kHugePage) madvise(data_.get(), rounded, MADV_HUGEPAGE);
#endif
  std::memset(data_.get(), 0, rounded);
}

Packed::Packed(Format f, int64_t rows, int64_t columns)
    : format(f), k(rows), n(columns),
      words(static_cast<size_t>(rows / kRows * info(f).words * info(f).word_bytes * columns)),
      scales(has_scales(f) ? static_cast<size_t>(rows / 128 * columns) : 0), super(columns),
      before(f == Format::kCcq2t ? static_cast<size_t>(columns) : 0) {}

const MatmulKernels* pick_matmul(const char* name) {
  const MatmulKernels* all[] = {matmul_avx512vnni(), matmul_avx512(), matmul_avx2(), matmul_plain()};
#if defined(__x86_64__) || defined(__i386__)
  const bool fma = __builtin_cpu_supports("fma");
#else
  const bool fma = false;
#endif
  for (const MatmulKernels* k : all) {
    // What the processor runs is the encoder's question too; only avx2 needs one flag more here.
    if (!k || !pick_kernels(k->name) || (k == matmul_avx2() && !fma)) continue;
    if (!std::strcmp(name, "auto") || !std::strcmp(name, k->name)) return k;
  }
  return nullptr;
}

Level::Level(int64_t count)
    : pairs(static_cast<int32_t*>(std::calloc(std::max<int64_t>(count, 1) * kPairs, sizeof(int32_t)))),
      scale(count), sum(count) {
  if (!pairs) throw std::bad_alloc();
}

namespace {

// Rounds the values of one group into `level` and returns the sum of the integers' magnitudes;
// v becomes what is left over.
int64_t round_group(float* v, Level& level, int64_t at) {
  uint32_t top = 0;
  for (int s = 0; s < kRows; ++s) {
    uint32_t bits;
    std::memcpy(&bits, v + s, 4);
    top = std::max(top, bits & 0x7FFFFFFFu);
  }
  float largest;
  std::memcpy(&largest, &top, 4);
  if (top >= 0x7F800000u) {
    // An infinity or NaN has no fixed-point form; the whole sum becomes NaN.
    level.scale[at] = std::numeric_limits<float>::quiet_NaN();
    return 0;
  }
  if (largest < 7.9e-31f) return 0;  // the reciprocal would leave float32: taken as zeros
  const float inverse = 32767.0f / largest, scale = largest / 32767.0f;
  int32_t q[kRows], sum = 0, magnitude = 0;
  for (int s = 0; s < kRows; ++s) {
    // Adding and taking away 1.5 * 2^23 rounds to nearest even, in any instruction set.
    const float x = (v[s] * inverse + 12582912.0f) - 12582912.0f;
    q[s] = static_cast<int32_t>(x);
    v[s] -= x * scale;
    sum += q[s];
    magnitude += q[s] < 0 ? -q[s] : q[s];
  }
  level.scale[at] = scale;
  level.sum[at] = sum;
  int32_t* pairs = level.pairs.get() + at * kPairs;
  for (int j = 0; j < kPairs; ++j)
    pairs[j] = static_cast<int32_t>((static_cast<uint32_t>(q[low_row(j)]) & 0xFFFFu) |
                                    (static_cast<uint32_t>(q[high_row(j)]) << 16));
  return magnitude;
}

}  // namespace

Activations quantize(const float* x, int64_t rows, int64_t k, const int* order, bool fine, int threads) {
  // Mean below a sixteenth of the largest: never on Gaussian rows (a quarter), always with an outlier.
  constexpr int64_t kOutlier = 32767 * kRows / 16;
  Activations a(rows, k / kRows);
  parallel(rows, rows * k >= 1 << 15 ? threads : 1, [&](int64_t r) {
    for (int64_t g = 0; g < a.groups; ++g) {
      float v[kRows];
      for (int s = 0; s < kRows; ++s) v[s] = x[r * k + g * kRows + order[s]];
      const int64_t at = g * rows + r, magnitude = round_group(v, a.main, at);
      if (magnitude > 0 && (fine || magnitude < kOutlier)) round_group(v, a.rest, at);
    }
  });
  return a;
}

void multiply(const MatmulKernels& kernels, const std::vector<const Packed*>& matrices,
              const int64_t* ends, const float* x, const int* order, bool fine, float* y, int threads) {
  const Packed& shape = *matrices[0];
  const int64_t rows = ends[matrices.size() - 1];
  int paired[kRows];
  for (int j = 0; j < kPairs; ++j) {
    const bool neighbours = shape.format == Format::kCcq2t;
    paired[low_row(j)] = order[neighbours ? 2 * j : low_row(j)];
    paired[high_row(j)] = order[neighbours ? 2 * j + 1 : high_row(j)];
  }
  const Activations a = quantize(x, rows, shape.k, paired, fine, threads);
  // Columns of one task: large enough to amortise its start, small enough to share out evenly.
  constexpr int64_t kBlocksPerTask = 4;
  struct Task {
    const Packed* matrix;
    int64_t block, first;
    int count;
  };
  std::vector<Task> tasks;
  for (size_t e = 0; e < matrices.size(); ++e) {
    const int64_t end = ends[e];
    for (int64_t first = e ? ends[e - 1] : 0; first < end; first += kTokens)
      for (int64_t block = 0; block < shape.blocks(); block += kBlocksPerTask)
        tasks.push_back({matrices[e], block, first, static_cast<int>(std::min<int64_t>(kTokens, end - first))});
  }
  parallel(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i) {
    const Task& t = tasks[i];
    const int64_t last = std::min(t.block + kBlocksPerTask, shape.blocks());
    for (int64_t b = t.block; b < last; ++b)
      kernels.block(*t.matrix, b, a, t.first, t.count, y + t.first * shape.n + b * kColumns, shape.n);
  });
}

void swiglu(const float* x, int64_t rows, int64_t half, float* y, int threads) {
  parallel(rows, rows * half >= 1 << 14 ? threads : 1, [&](int64_t r) {
    const float *gate = x + r * 2 * half, *up = gate + half;
    for (int64_t i = 0; i < half; ++i) y[r * half + i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  });
}

}  // namespace ccq
