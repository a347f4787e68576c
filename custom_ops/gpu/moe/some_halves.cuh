// SPDX-License-Identifier: Apache-2.0
// Main loops of some_stream.cuh in fp16: up to 48 rows, eight at a time. Up to kMostHalfRows a group's scale multiplies its sums, four
// accumulators for each eight rows; with more it multiplies the weights.
#pragma once

#include "some_schedule.cuh"

namespace ccq {

template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

// What a warp reads of shared memory for a group of 64 input rows besides the weights: its rows, and what accumulators begin with.
template <int kNT>
struct HalfRows {
  uint4 x[kNT][2];
  float4 begin[kNT];
  template <typename C>
  __device__ void load(const char* unit, int half, int lane) {
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      const char* const from = unit + nt * (C::kUnits * kRowsUnitBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) x[nt][i] = *reinterpret_cast<const uint4*>(from + 128 + half * 1024 + i * 512 + lane * 16);
      begin[nt] = *reinterpret_cast<const float4*>(from + half * 64 + lane % 4 * 16);
    }
  }
};

// Units `kb` to `kb_end` of one tile; kNT: blocks of eight rows that it really has.
template <typename C, int kNT>
__device__ void some_half_loop(SomeConsumer<C>& w, int kb, int kb_end, const char* columns, Accumulator<C, kNT>& acc) {
  constexpr int kR = C::kR;
  const uint32_t magic = kMagic | (w.p.k & 0x80000000u);  // in a register: p.k is positive, but the compiler does not know
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc.o[r][nt][i] = 0.f;
  Column<C::kPairs> column[kR][2];
  load_warp_columns(w, columns, column);
#pragma unroll 1
  while (kb < kb_end) {
    const int units = units_of_stage<C>(kb, kb_end - kb);
    StagePart<C> at(w);
    SomeShared<C>::full()[w.stage].wait(w.parity);
    UnitWeights<kR> unit;
    HalfRows<kNT> rows;
    unit.load(at.codes, at.scales);
    rows.template load<C>(at.rows, 0, w.lane);
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
      const bool more = u + 1 < units;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float d[kR][kNT][4], f[kR][2];
        auto add = [&](int r) {
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
            float* const o = acc.o[r][nt];
            o[0] = fmaf(f[r][0], d[r][nt][0], o[0]), o[1] = fmaf(f[r][0], d[r][nt][1], o[1]);
            o[2] = fmaf(f[r][1], d[r][nt][2], o[2]), o[3] = fmaf(f[r][1], d[r][nt][3], o[3]);
          }
        };
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          const uint32_t low = half ? unit.q[r].z : unit.q[r].x, high = half ? unit.q[r].w : unit.q[r].y;
          f[r][0] = half ? nibble<1>(unit.scale[r], magic) : nibble<0>(unit.scale[r], magic);
          f[r][1] = half ? nibble<3>(unit.scale[r], magic) : nibble<2>(unit.scale[r], magic);
          const Windows a(column[r][0].template codes<0>(low)), c(column[r][1].template codes<0>(high));
          const Windows e(column[r][0].template codes<1>(low)), g(column[r][1].template codes<1>(high));
          if (half == 1 && r == kR - 1 && more) at.codes += 2048, at.scales += 64, unit.load(at.codes, at.scales);
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) mma(d[r][nt], a.w[0], c.w[0], a.w[1], c.w[1], rows.x[nt][0].x, rows.x[nt][0].y, rows.begin[nt]);
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) mma(d[r][nt], a.w[2], c.w[2], a.w[3], c.w[3], rows.x[nt][0].z, rows.x[nt][0].w);
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) mma(d[r][nt], e.w[0], g.w[0], e.w[1], g.w[1], rows.x[nt][1].x, rows.x[nt][1].y);
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) mma(d[r][nt], e.w[2], g.w[2], e.w[3], g.w[3], rows.x[nt][1].z, rows.x[nt][1].w);
          if (r > 0) add(r - 1);
        }
        if (half == 0) rows.template load<C>(at.rows, 1, w.lane);
        else if (more) at.rows += kRowsUnitBytes, rows.template load<C>(at.rows, 0, w.lane);
        add(kR - 1);
      }
    }
    kb += units;
    w.next_stage();
  }
}

// Two fp16 in a register.
__device__ inline uint32_t multiply_add_half2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t v;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  return v;
}

// What turns a column's windows, subnormals w * 2^-24 or eight times that (decode.cuh), into weights (w - 32) * n * 2^-19 with the
// group's scale n: multiplications by `one` or `eighth` and an addition. All of it is exact in fp16.
struct HalfScale {
  uint32_t one, eighth, offset;
  HalfScale() = default;
  // `both`: the column's byte of scales in both halves of a word; kGroup: which of its nibbles.
  template <int kGroup>
  __device__ static HalfScale of(uint32_t both, uint32_t magic) {
    HalfScale s;
    if (kGroup == 0) {  // 2^10 + n: times 2^5, 2^2 and -2^-14
      const uint32_t v = (both & 0x000F000Fu) | magic;
      s.one = multiply_add_half2(v, 0x50005000u, 0xF800F800u), s.eighth = multiply_add_half2(v, 0x44004400u, 0xEC00EC00u);
      s.offset = multiply_add_half2(v, 0x84008400u, 0x2C002C00u);
    } else {  // 2^10 + 16 n: times 2, 2^-2 and -2^-18
      const uint32_t v = (both & 0x00F000F0u) | magic;
      s.one = multiply_add_half2(v, 0x40004000u, 0xE800E800u), s.eighth = multiply_add_half2(v, 0x34003400u, 0xDC00DC00u);
      s.offset = multiply_add_half2(v, 0x80408040u, 0x1C001C00u);
    }
    return s;
  }
};

// The same for more rows: a group's scale is multiplied into its weights, so that the accumulators run through all of K.
template <typename C, int kNT>
__device__ void some_scaled_loop(SomeConsumer<C>& w, int kb, int kb_end, const char* columns, Accumulator<C, kNT>& acc) {
  constexpr int kR = C::kR;
  const uint32_t magic = 0x64006400u | (w.p.k & 0x80000000u);  // in a register, as above
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc.o[r][nt][i] = 0.f;
  Column<C::kPairs> column[kR][2];
  load_warp_columns(w, columns, column);
#pragma unroll 1
  while (kb < kb_end) {
    const int units = units_of_stage<C>(kb, kb_end - kb);
    StagePart<C> at(w);
    SomeShared<C>::full()[w.stage].wait(w.parity);
    UnitWeights<kR> unit;
    unit.load(at.codes, at.scales);
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
      const char* const rows = at.rows + 128 + w.lane * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        HalfScale scale[kR][2];
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t both = __byte_perm(unit.scale[r], 0, i ? 0x4141 : 0x4040);
            scale[r][i] = half ? HalfScale::of<1>(both, magic) : HalfScale::of<0>(both, magic);
          }
        auto step = [&](auto pair) {
          constexpr int kPair = decltype(pair)::value;
          uint32_t a[kR][2][4];  // [..][step]
#pragma unroll
          for (int r = 0; r < kR; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const uint32_t word = half ? (i ? unit.q[r].w : unit.q[r].z) : i ? unit.q[r].y : unit.q[r].x;
              const Windows v(column[r][i].template codes<kPair>(word));
              const HalfScale& s = scale[r][i];
#pragma unroll
              for (int j = 0; j < 4; ++j)
                a[r][j / 2][j % 2 * 2 + i] = multiply_add_half2(v.w[j], j % 2 ? s.eighth : s.one, s.offset);
            }
          if (half == 1 && kPair == 1 && u + 1 < units) at.codes += 2048, at.scales += 64, unit.load(at.codes, at.scales);
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
            const uint4 b = *reinterpret_cast<const uint4*>(rows + nt * (C::kUnits * kRowsUnitBytes) + half * 1024 + kPair * 512);
#pragma unroll
            for (int r = 0; r < kR; ++r) mma(acc.o[r][nt], a[r][0][0], a[r][0][1], a[r][0][2], a[r][0][3], b.x, b.y);
#pragma unroll
            for (int r = 0; r < kR; ++r) mma(acc.o[r][nt], a[r][1][0], a[r][1][1], a[r][1][2], a[r][1][3], b.z, b.w);
          }
        };
        step(Number<0>{}), step(Number<1>{});
      }
      at.rows += kRowsUnitBytes;
    }
    kb += units;
    w.next_stage();
  }
}

}  // namespace ccq
