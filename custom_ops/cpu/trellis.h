// SPDX-License-Identifier: Apache-2.0
// The data-free encoder of ccq-2t: Viterbi over bytes, defined in paddle_ccq/encoder/trellis_reference.py.
#pragma once

#include <cstdint>
#include <vector>

namespace ccq {

constexpr int kTrellisStates = 256;
constexpr int kTrellisBytes = 16;   // positions of a group
constexpr int kTrellisClip = 767;   // |u| in units of the code's values
constexpr int kTrellisScaleMax = 15;

// best[b] = min over the keys of key + (|u - v|^2 << 8), v being the values of word (key & 255) << 8 | b.
// A key is a survivor's cost << 8 | its state, so the least one holds the cost and the lowest state of
// that cost. Costs and |u - v|^2 are below 2^22: sums stay inside 32 unsigned bits. count >= 1.
using TrellisStepFn = void (*)(const uint32_t* keys, int count, const int32_t* u, uint32_t* best);

// The values in the metric of a block: t01[word], t23[word] hold 16 rint(v root) in halves, root upper [4, 4] with
// columns of norm 1 on average; v planar, [4][65536].
using TrellisTableFn = void (*)(const int16_t* v, const float* root, uint32_t* t01, uint32_t* t23);
// As step, with a target of its own for every key (two words of halves, 16 u) and values from a table.
using TrellisMetricStepFn = void (*)(const uint32_t* keys, const uint32_t* targets, int count, const uint32_t* t01,
                                     const uint32_t* t23, uint32_t* best);
// out[r] = x[r] + e[0] m[0][r] + .. + e[3] m[3][r], in this order; rows of m lie `stride` apart.
using AddFourFn = void (*)(float* out, const float* x, const float* e, const float* m, int64_t stride, int count);
// x[0..64) += sum over i of e[i] m[i], from i = 0 on.
using AddTileFn = void (*)(float* x, const float* e, const float* m, int64_t stride, int count);

struct TrellisKernels {
  const char* name;
  TrellisStepFn step;
  TrellisTableFn table;
  TrellisMetricStepFn step_in_metric;
  AddFourFn add_four;
  AddTileFn add_tile;
};
const TrellisKernels* trellis_plain();
const TrellisKernels* trellis_avx2();
const TrellisKernels* trellis_avx512();
const TrellisKernels* trellis_avx512vnni();
// Names as in pick_kernels(); nullptr if the processor or build has no such instruction set.
const TrellisKernels* pick_trellis(const char* name);

// TrellisRecipe of paddle_ccq/encoder/recipes.py, where the numbers' sources are told.
struct TrellisRecipe {
  double nominal = 0;
  std::vector<double> kappas;
  int window_low = 0;
  int window_high = 0;
  int beam = 0;
};

struct TrellisOutput {  // for all channels
  uint8_t* words;       // [N, K/4]
  uint8_t* scales;      // [N, K/64]
  float* supers;        // [N], bfloat16 values
  double* sums;         // [N, 3]: sum w^2, sum w*w', sum w'^2
};

// weight float32 [n, k], 64 | k, finite. Channels are independent, so the thread count changes nothing.
void trellis_encode(const TrellisKernels& kernels, const TrellisRecipe& recipe, const float* weight, int64_t n,
                    int64_t k, int threads, const TrellisOutput& out);

// Four values of a word of two bytes.
void trellis_values(int word, int32_t* v);

}  // namespace ccq
