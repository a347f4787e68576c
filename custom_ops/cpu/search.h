// SPDX-License-Identifier: Apache-2.0
// Interface of the data-free code search: integers in, integers out, so every build gives the same bytes.
#pragma once

#include <cstdint>

namespace ccq {

constexpr int kGroup = 64;       // weights that share a local scale
constexpr int kLanes = 16;       // vectors searched side by side
constexpr int kMaxBatch = 8;     // scale candidates searched in one walk over a code book

// Fixed point. A weight divided by its scale becomes an int16 with `fraction` bits after the point;
// a code book entry is multiplied by 2^index_bits. The products then have index_bits zero low bits, and
// the entry's index is put there: one signed 32-bit maximum finds score and index together.
//   |x| <= 2^15, |c| * 2^index_bits <= 2^13, four terms: below 2^30, no overflow.
struct Codebook {
  int count = 0;            // entries, at most 2^index_bits
  int index_bits = 0;
  const int32_t* c01 = nullptr;   // two int16: entry's coordinates 0 (low half) and 1
  const int32_t* c23 = nullptr;   // coordinates 2 and 3; zero where the vector is shorter
  const int32_t* bias = nullptr;  // (-|c|^2/2 in fixed point) << index_bits | index
};

// best[b][lane] = max over entries of (x . c - |c|^2/2) << index_bits | index, for `batch` sets of 16
// vectors. x01/x23 hold the vectors' coordinates as int16 pairs, [batch][16].
using ScoreFn = void (*)(const Codebook& book, const int32_t* x01, const int32_t* x23, int32_t* best,
                         int batch);

// One channel's inner loops for one instruction set.
struct Kernels {
  const char* name;
  ScoreFn score;
};

// The builds of score.cpp; each returns nullptr where the compiler could not build it.
const Kernels* kernels_plain();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512vnni();

// What the CPU can run, fastest first; `name` picks one ("auto" the first). nullptr if it can't run.
const Kernels* pick_kernels(const char* name);

}  // namespace ccq
