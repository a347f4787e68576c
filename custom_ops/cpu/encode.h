// SPDX-License-Identifier: Apache-2.0
// The data-free encoder: per output channel, choose code-cluster pair, super scale, local scales, words.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "search.h"

namespace ccq {

// Up to 16 vectors of one group that share a code book: lane l holds rows first + l*stride ...
struct LaneSet {
  int book = 0;    // index among the books of one pair
  int lanes = 0;   // vectors in use, at most 16
  int first = 0;   // first row of lane 0
  int stride = 0;  // rows from one lane to the next
  int dims = 0;    // rows per vector, at most 4
  int word = 0;    // word of lane 0 inside the group; lane l belongs to word + l
  int shift = 0;   // the entry index stands this far up in the word
};

// How a group of 64 rows is cut into words.
struct Layout {
  std::vector<LaneSet> sets;
  int words = 0;            // words per group
  int fraction = 0;         // fixed-point bits of a scaled weight
  int state_min = 0;        // smallest signed state
  int state_max = 0;        // largest signed state
  int remainder_shift = 0;  // row 63 alone stands this far up in the last word; 0: no remainder row
  int scale_max = 0;        // largest local scale
};

// What to try. Every number comes from paddle_ccq/encoder/recipes.py, where its source is told.
struct Recipe {
  double nominal = 0;              // best scale of a group, as a multiple of its rms
  std::vector<double> kappas;      // local scale of a group of average rms; one super scale for each
  int window_low = 0;              // local scales tried, relative to the nominal one ...
  int window_high = 0;
  std::vector<double> ratios;      // ... or as multiples of it (formats with fine local scales)
  int refits = 0;                  // rounds of eq. (4) followed by a new search (fine scales only)
  int keep_pairs = 1;              // pairs that survive the screening on nominal scales
};

struct Output {                    // for all channels
  uint16_t* words;                 // [N, K/64, words]; local scales are not inserted
  uint16_t* scales;                // [N, K/64]
  float* supers;                   // [N], bfloat16 values
  int32_t* pairs;                  // [N]
  double* sums;                    // [N, 3]: sum w^2, sum w*w', sum w'^2
};

// pairs[p] holds the books of pair p, as many as the layout's sets refer to.
using PairBooks = std::vector<std::vector<Codebook>>;

// weight float32 [n, k], 64 | k, finite. Channels are independent, so the thread count changes nothing.
void encode(const Kernels& kernels, const Layout& layout, const Recipe& recipe, const PairBooks& pairs,
            const float* weight, int64_t n, int64_t k, int threads, const Output& out);

}  // namespace ccq
