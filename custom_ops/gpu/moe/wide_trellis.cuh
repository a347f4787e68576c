// SPDX-License-Identifier: Apache-2.0
// CCQ-2T bytes to wgmma's A operand, in the order that the input rows themselves have; moe_wide.cuh's weights, as PairWeights.
//
// A step of 16 input rows has four code bytes of a column, eight pairs of rows: pair i is hash word i % 2 of byte i / 2. The tensor
// cores want of lane t pairs t and t + 4; so a lane makes one hash of two bytes, t / 2 and t / 2 + 2, and activations need no other
// order. Every lane of a quad reads all 16 bytes of a column's group, at one address: the byte before each is there too.
//
// A byte b in the low half of a 16-bit float is a subnormal, b * 2^-133 in bfloat16 (up to 255 linear: the exponents 0 and 1 count
// alike), b * 2^-24 in float16. Differences of two are exact in both. Times the group's scale they are integers up to 3825, rounded
// to 8 bits in bfloat16 (1.1e-3 of the weights' norm) and 11 in float16.
#pragma once

#include "trellis.cuh"
#include "wide_weights.cuh"

namespace ccq {

struct TrellisWeights {
  static constexpr bool kHalves = false;
  static constexpr int kFour = 4 * 512 + 4 * 32;  // bytes of a unit of four tiles (trellis_repack.h)
  __host__ __device__ static constexpr int unit_bytes(int tiles) { return (tiles + 3) / 4 * kFour; }
  __host__ __device__ static constexpr int columns_bytes(int tiles) { return (tiles + 3) / 4 * 256; }

  template <int kTiles>
  __device__ static void request_unit(const GemmParams& p, int expert, int first, int there, int kb, char* to, Barrier* full) {
    static_assert(kTiles % 4 == 0, "a block's tiles are whole units");
    const int unit = threadIdx.x % 32;
    if (unit * 4 >= there) return;
    const size_t four = static_cast<size_t>(expert) * ((p.n + 63) / 64) + first / 4 + unit;
    bulk_copy(to + unit * kFour, p.quant + (four * (p.k / 128) + kb) * kFour, kFour, full);
  }
  template <int kTiles>
  __device__ static void request_columns(const GemmParams& p, int expert, int first, int there, char* to, Barrier* full) {
    if (threadIdx.x % 32 > 0) return;
    const size_t four = static_cast<size_t>(expert) * ((p.n + 63) / 64) + first / 4;
    bulk_copy(to, p.columns + four * 64, columns_bytes(there), full);
  }
  // Super scales, and what undoes the factors of decoding.
  template <bool kBf16>
  __device__ static float2 supers(const char* columns, int tile, int g) {
    constexpr float kBack = kBf16 ? 8192.f : 262144.f;
    const float* const own = reinterpret_cast<const float*>(columns) + tile * 16 + g;
    return make_float2(own[0] * kBack, own[8] * kBack);
  }

  template <bool kBf16, int kR, int kTiles, int kUnits>
  struct Decoder {
    using T = Two<kBf16>;
    static constexpr uint32_t kOnes = T::kOne, kMinusOnes = T::kOne ^ T::kMinus;
    const int first;  // tile
    // Of the lane: its hash, and which bytes of a word (and of the word before) are (byte, byte before, byte, byte before).
    uint32_t multiplier, addend, low_bytes, high_bytes;
    const char* at;
    uint32_t side;

    __device__ Decoder(const GemmParams&, int first_) : first(first_) {
      const int t = threadIdx.x % 4;
      multiplier = t % 2 ? kTrellisDoubled1 : kTrellisDoubled0, addend = t % 2 ? kTrellisAddend1 : kTrellisAddend0;
      low_bytes = t < 2 ? 0x7070u : 0x0101u, high_bytes = t < 2 ? 0x1212u : 0x2323u;
      asm volatile("" : "+r"(multiplier), "+r"(addend), "+r"(low_bytes), "+r"(high_bytes));
    }
    __device__ void begin(const char*) {}
    __device__ void load(const char* stage, int u, int r) {
      const int tile = first + r, g = threadIdx.x % 32 / 4;
      const char* const unit = stage + tile / 4 * ((kUnits - 1) * kFour) + u * kFour;
      at = unit + tile / 4 * kFour + tile % 4 * 512 + g * 16;
      side = *reinterpret_cast<const uint32_t*>(unit + tile / 4 * kFour + 2048 + tile % 4 * 32 + g * 4);
    }
    // Two weights of a hash word, times the scale.
    __device__ static uint32_t weights(uint32_t x, uint32_t scale) {
      const uint32_t difference = T::multiply_add(__byte_perm(x, 0, 0x4341), kMinusOnes, x & 0x00FF00FFu);
      return T::multiply_add(difference, scale, T::kMinus);  // + -0
    }
    __device__ void decode(int half, int, uint32_t (&v)[4][4]) const {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const uint4 words = *reinterpret_cast<const uint4*>(at + half * 256 + c * 128);
        // The byte before the group, as the highest one of a word.
        uint32_t before = c ? side : side << 8;
        if (half == 1) before = *reinterpret_cast<const uint32_t*>(at + c * 128 + 12);
        // n * 2^120 in bfloat16, n * 2^6 in float16.
        constexpr uint32_t kUp = kBf16 ? 0x7F007F00u : 0x78007800u, kUpAgain = kBf16 ? 0x7E807E80u : 0x78007800u;
        uint32_t scale = __byte_perm(side, 0, c ? 0x4141 : 0x4040) >> 4 * half & 0x000F000Fu;
        scale = T::multiply_add(T::multiply_add(scale, kUp, T::kMinus), kUpAgain, T::kMinus);
        const uint32_t w[5] = {before, words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j][c] = weights(__byte_perm(w[j + 1], w[j], low_bytes) * multiplier + addend, scale);
          v[j][2 + c] = weights(__byte_perm(w[j + 1], 0, high_bytes) * multiplier + addend, scale);
        }
      }
    }
  };
};

}  // namespace ccq
