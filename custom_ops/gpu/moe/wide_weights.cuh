// SPDX-License-Identifier: Apache-2.0
// WINT2 bytes to wgmma's A operand, in the order that the input rows themselves have.
//
// FastDeploy's order of rows (repack.h) gives the four weights of a byte to one lane in just the places that a step of 16 input
// rows wants: byte j of a lane's four is step j, its weights rows 2t, 2t + 1, 2t + 8 and 2t + 9. So activations need no
// preparation, and one code becomes two registers of two weights. A register's halves hold 6-bit windows that stand three bits
// apart in the code; so the code is put beside itself, shifted by three bits, and one mask takes both.
//
// A weight is (window - 32) * scale nibble, an integer up to 480 in magnitude: exact in float16; in bfloat16, whose operands
// bfloat16 activations need, odd numbers above 256 round to their even neighbours, 1.2e-3 of the weights' norm.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "wide_halves.cuh"

namespace ccq {

// Two 16-bit floats in a register.
template <bool kBf16>
struct Two {
  // 2^7 or 2^10 in both halves: the lowest bits of their mantissas count ones.
  static constexpr uint32_t kMagic = kBf16 ? 0x43004300u : 0x64006400u;
  static constexpr uint32_t kOffset = kBf16 ? 0xC320C320u : 0xE420E420u;  // -(2^7 + 32), -(2^10 + 32)
  static constexpr uint32_t kOne = kBf16 ? 0x3F803F80u : 0x3C003C00u, kMinus = 0x80008000u;
  __device__ static uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t v;
    if constexpr (kBf16) asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
  }
};

// A column's scale in one group, in both halves, and what a window's offset makes of it. Exact.
template <bool kBf16>
struct WideScale {
  uint32_t n, offset;
  // `both`: the column's nibble lowest in both halves, anything above it.
  __device__ static WideScale of(uint32_t both) {
    WideScale s;
    using T = Two<kBf16>;
    s.n = T::multiply_add((both & 0x000F000Fu) | T::kMagic, T::kOne, T::kMagic ^ T::kMinus);
    s.offset = T::multiply_add(s.n, T::kOffset, T::kMinus);  // -0 in both halves
    return s;
  }
  // Of bytes j and j + 2, whose codes are in the halves of `codes`: rows 2t and 2t + 1 of steps j and j + 2, then rows 2t + 8 and
  // 2t + 9. `magic` is Two::kMagic in a register, so that AND and OR are one instruction.
  __device__ void weights(uint32_t codes, uint32_t magic, uint32_t (&first)[2], uint32_t (&second)[2]) const {
    const uint32_t shifted = codes >> 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t apart = __byte_perm(shifted, codes, i ? 0x7632 : 0x5410);
      first[i] = Two<kBf16>::multiply_add((apart >> 6 & 0x003F003Fu) | magic, n, offset);
      second[i] = Two<kBf16>::multiply_add((apart & 0x003F003Fu) | magic, n, offset);
    }
  }
};

// The codes of a unit's tile and its columns' bytes of scales, in both halves of a word; of kR tiles of a warp, of the block's kTiles, in
// stages of kUnits units.
template <Pairs kPairs, int kR, int kTiles, int kUnits>
struct TileCodes {
  const int first;  // tile
  Column<kPairs> column[kR][2];
  uint32_t left, right;
  uint4 q;

  __device__ explicit TileCodes(int first_) : first(first_) {}
  __device__ void begin(const char* columns) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const char* const c = columns + (first + r) * kPlaneBytes;
      load_columns<kPairs>(c, c + kTiles * kPlaneBytes, threadIdx.x % 32 / 4, column[r]);
    }
  }
  // Unit u of the stage at `stage`, of tile r.
  __device__ void load(const char* stage, int u, int r) {
    const int lane = threadIdx.x % 32, tile = first + r, group = tile / 4 * kUnits + u;
    q = *reinterpret_cast<const uint4*>(stage + group * 2048 + tile % 4 * 512 + lane * 16);
    const char* const scales = stage + kUnits * kTiles * 512 + group * 64 + tile % 4 * 16;
    const uint32_t scale = *reinterpret_cast<const uint16_t*>(scales + lane / 4 * 2);
    left = __byte_perm(scale, 0, 0x4040), right = __byte_perm(scale, 0, 0x4141);
  }
};

template <Pairs kPairs, bool kBf16, int kR, int kTiles, int kUnits>
struct WideDecoder : TileCodes<kPairs, kR, kTiles, kUnits> {
  uint32_t magic;
  // K is even: a constant that the compiler does not know, and so leaves in a register.
  __device__ WideDecoder(const GemmParams& p, int first) : TileCodes<kPairs, kR, kTiles, kUnits>(first), magic(Two<kBf16>::kMagic | (p.k & 1)) {}
  // A's registers of the four steps of its group `half`.
  __device__ void decode(int half, int r, uint32_t (&v)[4][4]) const {
    const uint32_t low = half ? this->q.z : this->q.x, high = half ? this->q.w : this->q.y;
    const auto s = WideScale<kBf16>::of(half ? this->left >> 4 : this->left);
    const auto u = WideScale<kBf16>::of(half ? this->right >> 4 : this->right);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t first[2][2], second[2][2];
      s.weights(pair ? this->column[r][0].template codes<1>(low) : this->column[r][0].template codes<0>(low), magic, first[0], second[0]);
      u.weights(pair ? this->column[r][1].template codes<1>(high) : this->column[r][1].template codes<0>(high), magic, first[1], second[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t(&step)[4] = v[pair + 2 * i];
        step[0] = first[0][i], step[1] = first[1][i], step[2] = second[0][i], step[3] = second[1][i];
      }
    }
  }
};

// WINT2 as moe_wide.cuh's weights. Bytes of a unit of `tiles` 16-column tiles and of what is known of their columns; copies of them,
// by all lanes of a producer warp; decoding, by a consumer warp.
//
// kHalves: activations are fp16 in the order of wide_halves.cuh, whatever the outputs' type, and weights are read once.
template <Pairs kPairs, bool kHalves_ = false>
struct PairWeights {
  static constexpr bool kHalves = kHalves_;
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1;
  __host__ __device__ static constexpr int unit_bytes(int tiles) { return tiles * 528; }
  __host__ __device__ static constexpr int columns_bytes(int tiles) { return tiles * kPlaneBytes * kPlanes; }

  // Tiles `first` to `first` + `there` of an expert and their 128 input rows `kb`: codes, then scales.
  template <int kTiles>
  __device__ static void request_unit(const GemmParams& p, int expert, int first, int there, int kb, char* to, Barrier* full) {
    const int tiles_n = p.n / 16, t16 = threadIdx.x % 32 * 4, tiles = min(4, there - t16);  // that lie side by side (repack.h)
    if (tiles <= 0) return;
    const size_t unit = ccq_unit_index(expert, first + t16, kb, tiles_n, p.k / 128);
    bulk_copy(to + t16 * 512, p.quant + unit * 512, tiles * 512, full);
    bulk_copy(to + kTiles * 512 + t16 * 16, p.scales + unit * 16, tiles * 16, full);
  }
  // A stage of several units has of each group of four tiles, which lie side by side (repack.h), the codes of its kUnits units, then their scales.
  // Bytes of those groups that producer `own` requests, every kProducers-th, with `there` tiles and `units` units.
  template <int kProducers>
  __device__ static int own_bytes(int there, int units, int own) {
    int tiles = 0;
    for (int t16 = own * 4; t16 < there; t16 += kProducers * 4) tiles += min(4, there - t16);
    return tiles * units * 528;
  }
  // Tiles `first` to `first` + `there` of an expert and `units` times 128 input rows from `kb` on.
  template <int kTiles, int kUnits, int kProducers>
  __device__ static void request_units(const GemmParams& p, int expert, int first, int there, int kb, int units, int own, char* to,
                                       Barrier* full) {
    static_assert(kUnits > 1, "request_unit serves single units");
    const int group = threadIdx.x % 32 * kProducers + own, t16 = group * 4, tiles = min(4, there - t16);
    if (tiles <= 0) return;
    const size_t unit = ccq_unit_index(expert, first + t16, kb, p.n / 16, p.k / 128);
    char* const codes = to + group * (kUnits * 2048);
    char* const scales = to + kUnits * kTiles * 512 + group * (kUnits * 64);
    const uint64_t policy = streaming_policy(!kHalves);
    auto copy = [&](char* c, char* s, size_t from, int count) {
      bulk_copy(c, p.quant + from * 512, count * 512, full, policy);
      bulk_copy(s, p.scales + from * 16, count * 16, full, policy);
    };
    if (tiles == 4) copy(codes, scales, unit, tiles * units);
    else for (int u = 0; u < units; ++u) copy(codes + u * 2048, scales + u * 64, unit + u * tiles, tiles);
  }
  template <int kTiles>
  __device__ static void request_columns(const GemmParams& p, int expert, int first, int there, char* to, Barrier* full) {
    const int plane = threadIdx.x % 32, tiles_n = p.n / 16;
    if (plane >= kPlanes) return;
    const size_t own = (static_cast<size_t>(expert) * tiles_n + first) * 32;
    bulk_copy(to + plane * (kTiles * kPlaneBytes), p.columns + plane * static_cast<size_t>(p.experts) * tiles_n * 32 + own,
              there * kPlaneBytes, full);
  }
  template <bool kBf16>
  __device__ static float2 supers(const char* columns, int tile, int g) {
    const float2 s = load_supers(columns + tile * kPlaneBytes, g);
    return kHalves ? make_float2(s.x * kHalfWeights, s.y * kHalfWeights) : s;
  }

  template <bool kBf16, int kR, int kTiles, int kUnits>
  using Decoder = std::conditional_t<kHalves, HalfDecoder<kPairs, kR, kTiles, kUnits>, WideDecoder<kPairs, kBf16, kR, kTiles, kUnits>>;
};

}  // namespace ccq
