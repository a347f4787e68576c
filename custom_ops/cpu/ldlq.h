// SPDX-License-Identifier: Apache-2.0
// Interface of the calibrated WINT2 search: error feedback (LDLQ) and coordinate descent on e H e^T.
//
// Sixteen output channels run side by side, one in each lane of a vector. No lane ever looks at another
// and no operation is fused or reordered, so every build, batch and thread count gives the same bytes.
#pragma once

#include <cstdint>

namespace ccq {

constexpr int kChannels = 16;     // channels of one run
constexpr int kBlock = 4;         // weights of one byte
constexpr int kRows = 64;         // weights that share a local scale
constexpr int kWords = 256;       // vectors a byte can stand for
constexpr int kMaxScales = 8;     // local scales tried side by side
constexpr int kScaleMax = 15;

// The metric of one matrix and the vectors of one code pair, all float32.
struct Metric {
  int64_t k = 0;
  const float* h = nullptr;         // [K, K]: second moments of the inputs, damped
  const float* feedback = nullptr;  // [K, K]: transposed M of H = M D M^T, unit block upper triangular
  const float* d_root = nullptr;    // [K/4, 4, 4]: upper R with D_b = R R^T
  const float* h_root = nullptr;    // [K/4, 4, 4]: upper R with H_bb = R R^T
  const float* h_inverse = nullptr; // [K/4, 4, 4]: inverse of H_bb
  const float* book = nullptr;      // [4, 256]: signed states of every byte, row by row
  float nominal = 0;                // best scale of a group as a multiple of its rms
};

// Sixteen channels, lane by lane: element r of lane l stands at r * kChannels + l.
struct Channels {
  const float* w;      // [K, 16]
  float* super_scale;  // [16], bfloat16 values
  float* local;        // [K/64, 16], whole numbers
  int32_t* words;      // [K/4, 16]
  double* loss;        // [16]: e H e^T
  float* scratch;      // [3 K, 16], 64-byte aligned
};

struct LdlqKernels {
  const char* name;
  // Chooses words and local scales by error feedback, trying nominal + low .. nominal + high.
  void (*feed_back)(const Metric& metric, const Channels& channels, int low, int high);
  // Improves them (and the super scale) block by block; the loss never grows.
  void (*descend)(const Metric& metric, const Channels& channels, int sweeps);
};

const LdlqKernels* ldlq_plain();
const LdlqKernels* ldlq_avx2();
const LdlqKernels* ldlq_avx512();
const LdlqKernels* pick_ldlq(const char* name);

struct LdlqRecipe {
  int low = 0;         // window of local scales
  int high = 0;
  int keep_pairs = 1;  // pairs that survive a run on nominal scales
  int sweeps = 0;
};

struct LdlqOutput {    // for all channels
  uint16_t* words;     // [N, K/4]
  uint16_t* scales;    // [N, K/64]
  float* supers;       // [N]
  int32_t* pairs;      // [N]
  double* loss;        // [N]
};

// books float32 [pairs, 4, 256]; supers float32 [candidates, n]; weight float32 [n, k], rows as stored.
void ldlq_encode(const LdlqKernels& kernels, const Metric& metric, const LdlqRecipe& recipe,
                 const float* books, int pairs, const float* supers, int candidates,
                 const float* weight, int64_t n, int threads, const LdlqOutput& out);

}  // namespace ccq
