// SPDX-License-Identifier: Apache-2.0
// The calibrated encoder of ccq-2t: Viterbi over bytes in the metric of the Hessian, every survivor with the errors
// of its own sequence fed back. Defined in paddle_ccq/encoder/trellis_ldlq_reference.py.
#pragma once

#include <cstdint>

#include "trellis.h"

namespace ccq {

// A factorization M D M^T of a Hessian or of one of its diagonal blocks, by blocks of four rows
// (paddle_ccq/encoder/trellis_metric.py).
struct TrellisFactors {
  const float* m;      // [rows, rows], unit block upper triangular
  const float* root;   // [rows/4, 4, 4], upper: D_b = root root^T * unit[b]
  const float* unit;   // [rows/4]
  const float* ratio;  // [rows/4]: unit[b - 1] / unit[b]
  const float* spread; // [rows/4]: what part of the recipe's beam a block takes, at most 1
};

struct TrellisHessian {
  int64_t k;
  const float* h;          // [k, k]
  TrellisFactors all;      // of h
  // Of the window of each group: its 64 rows and the next four, but 64 rows at the end. Arrays of all groups stand
  // one behind the other, each of kWindowRows rows.
  TrellisFactors windows;
  const float* inverse;    // [k/64, kWindowRows, kWindowRows]
};
constexpr int kWindowRows = 68;
constexpr int kWindowBlocks = kWindowRows / 4;

struct TrellisLdlqRecipe {
  double nominal = 0;
  int window_low = 0, window_high = 0;
  int beam = 0;
  int sweeps = 0;
};

struct TrellisLdlqOutput {  // for all channels
  uint8_t* words;           // [N, K/4]
  uint8_t* scales;          // [N, K/64]
  float* supers;            // [N]
  double* loss;             // [N]
};

// weight float32 [n, k] of about unit rms (ldlq.py), supers [candidates, n].
void trellis_ldlq_encode(const TrellisKernels& kernels, const TrellisHessian& hessian, const TrellisLdlqRecipe& recipe,
                         const float* supers, int candidates, const float* weight, int64_t n, int threads,
                         const TrellisLdlqOutput& out);

}  // namespace ccq
