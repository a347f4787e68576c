// SPDX-License-Identifier: Apache-2.0
// Dense products around their kernels: the matrix in memory, tasks for the threads, the scales.
#include <algorithm>
#include <cstring>

#include "floats.h"
#include "parallel.h"

namespace ccq {
namespace {

// Input rows decoded at a time: with 64 columns of floats they stay in the first cache.
constexpr int64_t kDecodedRows = 64;
// Multiplications that are worth a thread.
constexpr int64_t kThreadWork = 1 << 20;

size_t element_bits(Store store) {
  switch (store) {
    case Store::kFloat32: return 32;
    case Store::kBfloat16: return 16;
    case Store::kInt8: return 8;
    case Store::kInt4: return 4;
  }
  return 0;
}

}  // namespace

Dense::Dense(Store s, int64_t rows, int64_t columns)
    : store(s), k(rows), n(columns),
      data(static_cast<size_t>((rows + rows % 2) * ((columns + kFloatLanes - 1) / kFloatLanes * kFloatLanes)) *
           element_bits(s) / 8),
      scale(s == Store::kInt8 || s == Store::kInt4 ? columns : 0) {}

int Dense::vectors(int64_t block) const {
  const int64_t left = n - block * kBlockColumns;
  return static_cast<int>((std::min<int64_t>(left, kBlockColumns) + kFloatLanes - 1) / kFloatLanes);
}

size_t Dense::row_bytes(int vectors) const {
  return static_cast<size_t>(vectors) * kFloatLanes * (store == Store::kInt4 ? 8 : element_bits(store)) / 8;
}

const uint8_t* Dense::block(int64_t b) const {
  const int64_t rows = store == Store::kInt4 ? (k + 1) / 2 : k;
  return data.data() + static_cast<size_t>(b * rows) * row_bytes(kBlockColumns / kFloatLanes);
}

uint8_t* Dense::block(int64_t b) { return const_cast<uint8_t*>(static_cast<const Dense*>(this)->block(b)); }

void multiply_dense(const FloatKernels& kernels, const Dense& w, const float* x, int64_t rows, float* y,
                    int threads) {
  const int64_t chunks = (rows + kTokens - 1) / kTokens;
  const int64_t useful = std::max<int64_t>(1, rows * w.k * w.n / kThreadWork);
  parallel(w.blocks() * chunks, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t task) {
    // All chunks of one block follow each other: its weights stay near.
    const int64_t b = task / chunks, first = task % chunks * kTokens;
    const int64_t count = std::min<int64_t>(kTokens, rows - first);
    const int vectors = w.vectors(b);
    const uint8_t* block = w.block(b);
    const float* from = x + first * w.k;
    alignas(64) float sums[kTokens * kBlockColumns] = {};
    alignas(64) float decoded[kDecodedRows * kBlockColumns];
    for (int64_t i = 0; i < w.k; i += kDecodedRows) {
      const int64_t inner = std::min(kDecodedRows, w.k - i);
      const float* weights = decoded;
      if (w.store == Store::kFloat32)
        weights = reinterpret_cast<const float*>(block + i * w.row_bytes(vectors));
      else
        kernels.decode(w.store, block, vectors, i, inner, decoded);
      for (int64_t r = 0; r < count; r += kDenseRows)
        kernels.accumulate(from + r * w.k + i, w.k, static_cast<int>(std::min<int64_t>(kDenseRows, count - r)),
                           weights, vectors, inner, sums + r * kBlockColumns, kBlockColumns);
    }
    const int64_t column = b * kBlockColumns, width = std::min<int64_t>(kBlockColumns, w.n - column);
    for (int64_t r = 0; r < count; ++r) {
      float* to = y + (first + r) * w.n + column;
      for (int64_t c = 0; c < width; ++c)
        to[c] = w.scale.empty() ? sums[r * kBlockColumns + c] : sums[r * kBlockColumns + c] * w.scale[column + c];
    }
  });
}

void gather_columns(const Dense& w, const int64_t* columns, int64_t count, float* out) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t b = columns[t] / kBlockColumns, column = columns[t] % kBlockColumns;
    const size_t step = w.row_bytes(w.vectors(b));
    const uint8_t* at = w.block(b) + column * (element_bits(w.store) / 8);
    for (int64_t i = 0; i < w.k; ++i, at += step) {
      uint32_t bits = 0;
      if (w.store == Store::kFloat32) {
        std::memcpy(&bits, at, 4);
      } else {
        std::memcpy(&bits, at, 2);
        bits <<= 16;
      }
      std::memcpy(out + t * w.k + i, &bits, 4);
    }
  }
}

}  // namespace ccq
