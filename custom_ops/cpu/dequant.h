// SPDX-License-Identifier: Apache-2.0
// Stored tensors (checkpoint layout) back to floats, with the rounding of the engine they stand in for.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace ccq {

enum class Runtime { kFloat32, kBfloat16, kFloat16 };

// The stored tensors of one matrix [k, n]; pointers a format lacks are null.
struct Stored {
  Format format;
  int64_t k, n;
  const uint8_t* words;    // [k/64 * words, n] of word_bytes each
  const uint8_t* scales;   // WINT2, ccq-2t: [k/128, n]
  const float* super;      // [n]
  const float* code_scale; // WINT2: [n]
  const float* code_zp;
  const uint8_t* before;   // ccq-2t: [n], the byte before each column's first one; null for zeros
};

// All codes of all columns are whole numbers in 0..32767 and their pairs are integers.
bool integer_pairs(const float* code_scale, const float* code_zp, int64_t n);

// out [k, n]: float32, or the bits of bfloat16 or float16.
void dequantize(const Stored& t, Runtime runtime, void* out, int threads);

// Exact both ways.
void repack(const Stored& t, Packed& out);
void unpack(const Packed& w, uint8_t* words, uint8_t* scales);

}  // namespace ccq
