// SPDX-License-Identifier: Apache-2.0
// Products with float activations: matrices of floats or small integers, and attention.
//
// Every output is one chain of fused multiply-adds in the order of the inner index, whatever the
// instruction set, the threads, and the other rows: a token's result is the same bits in any batch.
#pragma once

#include <cstdint>
#include <vector>

#include "matmul.h"

namespace ccq {

constexpr int kFloatLanes = 16;    // floats of one vector
constexpr int kBlockColumns = 64;  // columns of a block, side by side for every input row
constexpr int kDenseRows = 4;      // tokens that share one pass over a block

enum class Store { kFloat32, kBfloat16, kInt8, kInt4 };

// One matrix [k, n] in blocks of 64 columns (the last one of what is left, in whole vectors):
// [block][k][columns of the block]. Two input rows of kInt4 share a byte, the first one low.
struct Dense {
  Dense(Store store, int64_t k, int64_t n);
  int64_t blocks() const { return (n + kBlockColumns - 1) / kBlockColumns; }
  int vectors(int64_t block) const;  // of 16 columns
  size_t row_bytes(int vectors) const;  // of one input row (kInt4: of two)
  const uint8_t* block(int64_t b) const;
  uint8_t* block(int64_t b);

  Store store;
  int64_t k, n;
  Buffer data;
  std::vector<float> scale;  // [n], integers only
};

// Integers to floats: input rows first .. first + count of a block -> out [count][vectors * 16].
using DecodeFn = void (*)(Store store, const uint8_t* block, int vectors, int64_t first, int64_t count,
                          float* out);
// sums [rows][vectors * 16] += x [rows] (stride in floats) times w [count][vectors * 16];
// rows <= kDenseRows, vectors <= 4.
using AccumulateFn = void (*)(const float* x, int64_t stride, int rows, const float* w, int vectors,
                              int64_t count, float* sums, int64_t sums_stride);

// Queries of one sequence that share a key head, at most kQueries of them.
constexpr int kQueries = 8;
struct Queries {
  const float* query[kQueries];  // [dim], scaled
  float* out[kQueries];          // [dim]
  int64_t seen[kQueries];        // keys 0 .. seen - 1, at least one
  int count;
};
// keys [places / 16][dim][16], values [places][padded dim] of the sequence, from its first place on.
// scratch [kQueries][longest seen, rounded up to 16].
using AttendFn = void (*)(const Queries& q, const float* keys, const float* values, int64_t dim,
                          int64_t padded, float* scratch, int64_t scratch_stride);

struct FloatKernels {
  const char* name;
  DecodeFn decode;
  AccumulateFn accumulate;
  AttendFn attend;
};
const FloatKernels* floats_plain();
const FloatKernels* floats_avx2();
const FloatKernels* floats_avx512();
// nullptr if the processor or build has no such instruction set.
const FloatKernels* pick_floats(const char* name);

// y [rows, n] = x [rows, k] times w
void multiply_dense(const FloatKernels& kernels, const Dense& w, const float* x, int64_t rows, float* y,
                    int threads);
// Columns of w as rows of out [count, k]: the embeddings of tokens whose matrix is also the output head.
void gather_columns(const Dense& w, const int64_t* columns, int64_t count, float* out);

// Tokens of one sequence: rows first .. first + count of a step, the first at position `start` of
// the sequence, whose places begin at `base` (a multiple of 16).
struct Piece {
  int64_t first, count, start, base;
};
struct Heads {
  int64_t query, key, dim, padded;  // padded: dim rounded up to 16
};
// Rotates queries and keys (neighbouring pairs), writes keys and values to their places, and attends.
// qkv [tokens, (query + 2 key) * dim]; cosines and sines [tokens, dim / 2];
// keys [key heads, places / 16, dim, 16]; values [key heads, places, padded]; out [tokens, query * dim].
void attend(const FloatKernels& kernels, const Heads& heads, const std::vector<Piece>& pieces,
            const float* qkv, int64_t tokens, const float* cosines, const float* sines, float* keys,
            float* values, int64_t places, float* out, int threads);

}  // namespace ccq
