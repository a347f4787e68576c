// SPDX-License-Identifier: Apache-2.0
// Main loop of some_stream.cuh with integers: up to 16 rows, four at a time.
#pragma once

#include "some_schedule.cuh"

namespace ccq {

// Two words of shared memory, and the same again: of accumulators' four registers, without moves.
__device__ inline int4 load_twice(const void* from) {
  int4 v;
  const uint32_t at = shared_address(from);
  asm volatile("ld.volatile.shared.v2.b32 {%0, %1}, [%4];\nld.volatile.shared.v2.b32 {%2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}

// What a warp reads of shared memory for a group of 64 input rows besides the weights: the digits of its rows, and what accumulators
// begin with.
template <int kFours>
struct DigitRows {
  uint4 digits[kFours];
  int4 begin[kFours];
  template <typename C>
  __device__ void load(const char* unit, int half, int lane) {
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      const char* const from = unit + j / 2 * (C::kUnits * kRowsUnitBytes);
      digits[j] = *reinterpret_cast<const uint4*>(from + 128 + j % 2 * 1024 + half * 512 + lane * 16);
      begin[j] = load_twice(from + j % 2 * 64 + half * 32 + lane % 4 * 8);
    }
  }
};

// Units `kb` to `kb_end` of one tile; kFours: blocks of four rows that it really has. A lane has row t of each four.
template <typename C, int kFours>
__device__ void some_integer_loop(SomeConsumer<C>& w, int kb, int kb_end, const char* columns, Accumulator<C, (kFours + 1) / 2>& acc) {
  constexpr int kR = C::kR;
  const int g = w.lane / 4, t = w.lane % 4;
  uint32_t four = 4;
  asm volatile("" : "+r"(four));
  int o[kR][kFours][4] = {};
  float sum[kR][kFours][2] = {};  // of columns g and g + 8
  Column<C::kPairs> column[kR][2];
  load_warp_columns(w, columns, column);
#pragma unroll 1
  while (kb < kb_end) {
    const int units = units_of_stage<C>(kb, kb_end - kb);
    StagePart<C> at(w);
    SomeShared<C>::full()[w.stage].wait(w.parity);
    UnitWeights<kR> unit;
    DigitRows<kFours> rows;
    unit.load(at.codes, at.scales);
    rows.template load<C>(at.rows, 0, w.lane);
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
      const bool more = u + 1 < units;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t steps[kR][2][4];
        int f[kR][2];
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          const uint32_t low = half ? unit.q[r].z : unit.q[r].x, high = half ? unit.q[r].w : unit.q[r].y;
          const ByteWindows v(column[r][0].template codes<0>(low), four), e(column[r][1].template codes<0>(high), four);
          steps[r][0][0] = v.even, steps[r][0][1] = e.even, steps[r][0][2] = v.odd, steps[r][0][3] = e.odd;
          const ByteWindows y(column[r][0].template codes<1>(low), four), z(column[r][1].template codes<1>(high), four);
          steps[r][1][0] = y.even, steps[r][1][1] = z.even, steps[r][1][2] = y.odd, steps[r][1][3] = z.odd;
#pragma unroll
          for (int i = 0; i < 2; ++i) f[r][i] = unit.scale[r] >> (8 * i + 4 * half) & 15;
        }
        if (half == 1 && more) at.codes += 2048, at.scales += 64, unit.load(at.codes, at.scales);
        int d[kFours][kR][4];
#pragma unroll
        for (int j = 0; j < kFours; ++j)
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            const uint32_t(&v)[2][4] = steps[r];
            mma_bytes(d[j][r], v[0][0], v[0][1], v[0][2], v[0][3], rows.digits[j].x, rows.digits[j].y, rows.begin[j]);
            mma_bytes(d[j][r], v[1][0], v[1][1], v[1][2], v[1][3], rows.digits[j].z, rows.digits[j].w);
          }
        if (half == 0) rows.template load<C>(at.rows, 1, w.lane);
        else if (more) at.rows += kRowsUnitBytes, rows.template load<C>(at.rows, 0, w.lane);
#pragma unroll
        for (int j = 0; j < kFours; ++j)
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            o[r][j][0] += f[r][0] * d[j][r][0], o[r][j][1] += f[r][0] * d[j][r][1];
            o[r][j][2] += f[r][1] * d[j][r][2], o[r][j][3] += f[r][1] * d[j][r][3];
          }
      }
    }
    kb += units;
    if (kb % 8 == 0 || kb == kb_end) {  // the end of 1024 values, which have a scale
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        const char* const scales = at.rows + j / 2 * (C::kUnits * kRowsUnitBytes) + kRowsScaleAt;
        const float back = 8.f * reinterpret_cast<const float*>(scales)[j % 2 * 4 + t];
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i) {  // digits together: 2^8 upper + lower, less three bits so that they fit
            int* const d = o[r][j] + 2 * i;
            sum[r][j][i] = fmaf(static_cast<float>(d[0] * 32 + (d[1] >> 3)), back, sum[r][j][i]);
            d[0] = d[1] = 0;
          }
      }
    }
    w.next_stage();
  }
  // What comes after wants rows 2t and 2t + 1 of each eight.
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int nt = 0; nt < (kFours + 1) / 2; ++nt)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float v[2] = {0.f, 0.f};
#pragma unroll
          for (int f = 0; f < 2 && 2 * nt + f < kFours; ++f) v[f] = __shfl_sync(~0u, sum[r][2 * nt + f][h], g * 4 + t % 2 * 2 + i);
          acc.o[r][nt][2 * h + i] = t < 2 ? v[0] : v[1];
        }
}

}  // namespace ccq
