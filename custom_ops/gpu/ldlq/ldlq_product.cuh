// SPDX-License-Identifier: Apache-2.0
// c[r][l] += sum over i of a[i][r] * b[i][l], one i after the other, each product and each sum rounded: the order that
// the CPU takes. Two instructions a term instead of one, so the float32 pipes, not shared memory, are the limit.
#pragma once

#include <cuda_pipeline.h>

#include "ldlq_math.cuh"

namespace ccq_ldlq {

constexpr int kTileLanes = 128;
constexpr int kDepth = 16;   // terms of one stage
constexpr int kStages = 3;

struct Product {
  const float* a;       // [depth, a_stride], 16-byte aligned rows
  int a_stride;
  const float* b;       // [depth, stride]
  float* c;             // [rows, stride]
  int stride;           // a multiple of kTileLanes
  int rows;             // of c; columns of a
  int first;            // rows from here on ...
  int skip_from, skip;  // ... but for `skip` rows from skip_from on; both whole tiles behind `first`
  int depth;            // a multiple of kDepth
  bool fresh;           // c starts at zero
};

// One thread has two times four rows, and two times four lanes: 64 sums.
template <int kTileRows>
struct ProductShared {
  float a[kStages][kDepth][kTileRows];
  float b[kStages][kDepth][kTileLanes];
};

template <int kTileRows>
__global__ void __launch_bounds__(kTileRows * 2, kTileRows == 128 ? 2 : 3)
add_product(const __grid_constant__ Product p) {
  constexpr int kThreads = kTileRows * 2;
  __shared__ __align__(16) ProductShared<kTileRows> s;
  int row0 = p.first + static_cast<int>(blockIdx.x) * kTileRows;
  if (row0 >= p.skip_from) row0 += p.skip;
  const int lane0 = static_cast<int>(blockIdx.y) * kTileLanes;
  // Four by eight threads a warp: its reads of both operands are single rows of banks.
  const int warp = threadIdx.x / 32, in_warp = threadIdx.x % 32;
  const int lane = (warp % 2 * 8 + in_warp % 8) * 4, row = (warp / 2 * 4 + in_warp / 8) * 4;

  // Each thread copies the same places of every stage: only the addresses of the sources move on.
  constexpr int kFoursA = kTileRows / 4, kFoursB = kTileLanes / 4;
  constexpr int kLoadsA = kDepth * kFoursA / kThreads, kLoadsB = kDepth * kFoursB / kThreads;
  const int term_a = threadIdx.x / kFoursA, row_a = threadIdx.x % kFoursA * 4;
  const int term_b = threadIdx.x / kFoursB, lane_b = threadIdx.x % kFoursB * 4;
  const bool inside = row0 + row_a < p.rows;  // rows come in fours
  const float* from_a = p.a + static_cast<int64_t>(term_a) * p.a_stride + (inside ? row0 + row_a : 0);
  const float* from_b = p.b + static_cast<int64_t>(term_b) * p.stride + lane0 + lane_b;
  auto load = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kLoadsA; ++i) {
      constexpr int kTerms = kThreads / kFoursA;
      __pipeline_memcpy_async(&s.a[stage][term_a + i * kTerms][row_a], from_a, 16, inside ? 0 : 16);
      from_a += kTerms * p.a_stride;
    }
#pragma unroll
    for (int i = 0; i < kLoadsB; ++i) {
      constexpr int kTerms = kThreads / kFoursB;
      __pipeline_memcpy_async(&s.b[stage][term_b + i * kTerms][lane_b], from_b, 16, 0);
      from_b += kTerms * p.stride;
    }
  };

  const int steps = p.depth / kDepth;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    __pipeline_commit();
  }
  float sum[8][8];
  auto row_of = [&](int i) -> int64_t { return row0 + row + i % 4 + i / 4 * (kTileRows / 2); };
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4 v = make_float4(0, 0, 0, 0);
      if (!p.fresh && row_of(i) < p.rows)
        v = *reinterpret_cast<const float4*>(p.c + row_of(i) * p.stride + lane0 + lane + half * (kTileLanes / 2));
      sum[i][4 * half] = v.x, sum[i][4 * half + 1] = v.y, sum[i][4 * half + 2] = v.z, sum[i][4 * half + 3] = v.w;
    }
  int stage = 0, loading = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // this stage is there for all, and nobody reads the one that is loaded next
    if (step + kStages - 1 < steps) load(loading);
    __pipeline_commit();
#pragma unroll 4
    for (int term = 0; term < kDepth; ++term) {
      float a[8], b[8];
      const float* rows = &s.a[stage][term][row];
      const float* lanes = &s.b[stage][term][lane];
      *reinterpret_cast<float4*>(a) = *reinterpret_cast<const float4*>(rows);
      *reinterpret_cast<float4*>(a + 4) = *reinterpret_cast<const float4*>(rows + kTileRows / 2);
      *reinterpret_cast<float4*>(b) = *reinterpret_cast<const float4*>(lanes);
      *reinterpret_cast<float4*>(b + 4) = *reinterpret_cast<const float4*>(lanes + kTileLanes / 2);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int l = 0; l < 8; ++l) sum[i][l] = plus_product(sum[i][l], b[l], a[i]);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    loading = loading + 1 == kStages ? 0 : loading + 1;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row_of(i) < p.rows)
        *reinterpret_cast<float4*>(p.c + row_of(i) * p.stride + lane0 + lane + half * (kTileLanes / 2)) =
            make_float4(sum[i][4 * half], sum[i][4 * half + 1], sum[i][4 * half + 2], sum[i][4 * half + 3]);
}

}  // namespace ccq_ldlq
