// SPDX-License-Identifier: Apache-2.0
// The code of ccq-2t: four weights of every word of two bytes. The constants of paddle_ccq/codec/trellis.py.
#pragma once

#include <cstdint>

namespace ccq {

// x_j = word * kTrellisMultiplier[j] + kTrellisAddend[j], modulo 2^32, for word = previous byte << 8 | byte.
constexpr uint32_t kTrellisMultiplier[2] = {2205301807u, 2589985801u};
constexpr uint32_t kTrellisAddend[2] = {3398453655u, 2169544712u};

// Byte b of x_j, 0 the lowest: weight 2j is byte 0 - byte 1, weight 2j + 1 is byte 2 - byte 3.
constexpr int kTrellisLargest = 255;

}  // namespace ccq
