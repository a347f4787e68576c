// SPDX-License-Identifier: Apache-2.0
// What the products with 8-bit and 4-bit weights share: a warp's slice of K, its activations as digits, its weights on their way.
//
// A warp always has the same slice of K, counted in units of 64 input rows, so it converts the activations of its slice with scales
// of its own, and nobody else reads them. Activations become integers of 16 bits, off by at most 2^-16 of a slice's largest
// value: below 4e-4 of the slice's norm for any 1024 values.
#pragma once

#include "prepare.cuh"
#include "ring.cuh"

namespace ccq_w8 {

// Sums of bytes and digits over a warp's slice stay within 32 bits up to here.
constexpr int kFewMostK = 16 * 65536;

// Sixteen values as two signed digits each: 256 * upper + lower, rounded.
struct PlainDigits {
  uint4 bytes[2];
  int sum[2];
  __device__ PlainDigits(const ccq::Chunk& chunk, float scale) {
    float v[16];
    chunk.values(CCQ_BF16, v);
    uint32_t words[2][4];
    // See Digits in prepare.cuh: the integer in the low bits of 1.5 * 2^23, plus 128.
    auto rounded = [&](int i) { return __float_as_uint(__fmaf_rn(v[i], scale, 12582912.f + 128.f)); };
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t a = rounded(4 * w), b = rounded(4 * w + 1), c = rounded(4 * w + 2), d = rounded(4 * w + 3);
      const uint32_t ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);  // low a, low b, high a, high b
      words[0][w] = __byte_perm(ab, cd, 0x7632);
      words[1][w] = __byte_perm(ab, cd, 0x5410) ^ 0x80808080u;
#pragma unroll
      for (int digit = 0; digit < 2; ++digit)
        sum[digit] = __dp4a(static_cast<int>(words[digit][w]), 0x01010101, sum[digit]);
    }
#pragma unroll
    for (int d = 0; d < 2; ++d) bytes[d] = make_uint4(words[d][0], words[d][1], words[d][2], words[d][3]);
  }
};

// A row's slice as digits, made by one warp.
struct SliceDigits {
  float back;  // undoes the scale
  int sum[2];  // of each digit, over the slice

  // `row`: `units` units of bfloat16. Of unit u and chunk t the digits go to `to` + (u * kDigits + digit) * 64 + t * 16. `order`: what a
  // chunk becomes before. All lanes of a warp together.
  template <int kDigits, typename F>
  __device__ static SliceDigits make(const char* row, int units, char* to, F&& order) {
    const int lane = threadIdx.x % 32;
    ccq::Chunk kept{};
    if (lane < 4 * units) kept.load(row, lane);
    uint32_t largest = kept.largest(CCQ_BF16);
#pragma unroll 1
    for (int c = lane + 32; c < 4 * units; c += 32) {
      ccq::Chunk other;
      other.load(row, c);
      largest = max(largest, other.largest(CCQ_BF16));
    }
    const ccq::IntegerScale scale(__reduce_max_sync(~0u, largest));
    SliceDigits made{scale.back, {0, 0}};
#pragma unroll 1
    for (int c = lane; c < 4 * units; c += 32) {
      if (c >= 32) kept.load(row, c);
      const PlainDigits digits(order(kept), scale.scale);
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        *reinterpret_cast<uint4*>(to + (c / 4 * kDigits + d) * 64 + c % 4 * 16) = digits.bytes[d];
        made.sum[d] += digits.sum[d];
      }
    }
#pragma unroll
    for (int d = 0; d < 2; ++d) made.sum[d] = __reduce_add_sync(~0u, made.sum[d]);
    return made;
  }
};

// A warp's bulk copies of its slice of one tile of 8-bit weights after another into its ring. A copy brings kUnits units of 1 KiB, a
// tile's last one perhaps fewer.
template <int kStages, int kUnits>
struct SliceRequests {
  char* const ring;
  ccq::Barrier* const full;      // one for each stage
  const int units, copies, all;  // units and copies of a slice; copies of all tiles
  const char* from;              // the next copy's source
  int asked = 0, in_tile = 0, stage = 0;

  __device__ SliceRequests(char* ring_, ccq::Barrier* full_, int units_, int tiles, const char* from_)
      : ring(ring_), full(full_), units(units_), copies((units_ + kUnits - 1) / kUnits), all(copies * tiles), from(from_) {}

  // The next copy, if there is one. `next_tile` moves `from` from the end of a tile's slice to the next one's beginning.
  template <typename F>
  __device__ void request(F&& next_tile) {
    if (asked >= all) return;
    const int size = min(kUnits, units - in_tile * kUnits) * 1024;
    if (threadIdx.x % 32 == 0) {
      full[stage].arrive_and_expect(size);
      ccq::bulk_copy(ring + stage * (kUnits * 1024), from, size, full + stage, ccq::streaming_policy());
    }
    from += size, ++asked;
    if (++stage == kStages) stage = 0;
    if (++in_tile == copies) in_tile = 0, next_tile(from);
  }
};

}  // namespace ccq_w8
