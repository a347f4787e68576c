// SPDX-License-Identifier: Apache-2.0
// The kernel of linear_w8.h for few rows, from Hopper on: weights stay bytes, activations become integers of 16 bits.
//
// A tile is 16 columns and all of K; blocks take equal numbers of whole tiles, side by side. A tile's K is cut into a slice for
// each warp, always the same one, so a warp converts the activations of its slice once in its life, with scales of its own, and
// nobody else reads them. Each warp fetches its weights through its own ring of bulk copies (ring.cuh), which runs on
// across tiles and begins while the kernel before still runs. Nothing but a tile's sums ties warps together; they go through
// kSlots buffers, and the warp that adds them up does so while the others are at the next tile.
//
// The integer tensor cores multiply bytes of weights (states plus 128) by two signed digits of each activation, exactly: 3
// instructions a KiB and lane, where decoding to bfloat16 takes 80. 128 times the sum of a slice's digits is taken off at the end.
#pragma once

#include "linear_slice.cuh"
#include "linear_w8.h"

namespace ccq_w8 {

// kRows: 1, 2, 4 or 8; kUnits: units of 1 KiB that one copy brings.
template <int kRows_, int kStages_>
struct FewConfig {
  static constexpr int kRows = kRows_, kStages = kStages_, kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kUnits = 2, kSlots = 3, kDigits = 2 * kRows;
  static constexpr int kParts = kRows > 4 ? 2 : 1;  // products of 8 columns
  static constexpr int kEntries = 16 * kRows;       // a tile's sums
  static constexpr size_t shared_bytes(int k) {
    return size_t{1} * kWarps * kStages * kUnits * 1024 + size_t{2} * kRows * k + size_t{4} * kSlots * kWarps * kEntries +
           8 * (kWarps * kStages + 2 * kSlots);
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kRows <= 2 ? 2 : 1)
    few(const __grid_constant__ ccq_linear_w8_args a) {
#if CCQ_BULK
  using namespace ccq;
  constexpr int R = C::kRows, kStages = C::kStages, kUnits = C::kUnits, kWarps = C::kWarps;
  extern __shared__ __align__(128) char shared[];
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int steps = a.k / 64, tiles = a.n / 16;
  const int begin = static_cast<int>(static_cast<int64_t>(tiles) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(tiles) * (blockIdx.x + 1) / gridDim.x);
  // This warp's slice of K, in units.
  const int first = steps * warp / kWarps, units = steps * (warp + 1) / kWarps - first;

  char* const ring = shared + warp * (kStages * kUnits * 1024);
  char* const x = shared + kWarps * kStages * kUnits * 1024 + static_cast<size_t>(first) * (128 * R);
  float* const sums = reinterpret_cast<float*>(shared + kWarps * kStages * kUnits * 1024 + static_cast<size_t>(steps) * (128 * R));
  Barrier* const barriers = reinterpret_cast<Barrier*>(sums + C::kSlots * kWarps * C::kEntries);
  Barrier *const full = barriers + warp * kStages, *const ready = barriers + kWarps * kStages, *const free = ready + C::kSlots;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) full[i].init(1);
    if (warp < C::kSlots) ready[warp].init(kWarps * kWarpArrivals), free[warp].init(kWarpArrivals);
    publish_barriers();
  }
  __syncwarp();

  SliceRequests<kStages, kUnits> requests(ring, full, units, end - begin,
                                          static_cast<const char*>(a.weight) + (static_cast<int64_t>(begin) * steps + first) * 1024);
  const int copies = requests.copies;
  auto request = [&] { requests.request([&](const char*& from) { from += static_cast<int64_t>(steps - units) * 1024; }); };
  // The weights are nobody's result: the first are fetched while the kernel before may still run.
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) request();
  __syncthreads();  // all barriers stand
  wait_for_prerequisites();

  // This slice of x as digits: [unit][2 * row + digit][t], 16 bytes each.
  float back[(R + 3) / 4] = {};
  int offset[(R + 3) / 4][2] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const char* const row = static_cast<const char*>(a.x) + (static_cast<int64_t>(min(r, a.rows - 1)) * a.k + first * 64) * 2;
    const SliceDigits made = SliceDigits::make<C::kDigits>(row, units, x + 2 * r * 64, [](const Chunk& chunk) { return chunk; });
    if (t == r % 4) back[r / 4] = made.back, offset[r / 4][0] = made.sum[0] * 128, offset[r / 4][1] = made.sum[1] * 128;
  }
  __syncwarp();

  // Adds up the warps' sums of a tile in the order of the warps. One warp.
  auto epilogue = [&](int i) {
    const int slot = i % C::kSlots;
    ready[slot].wait((i / C::kSlots) & 1);
    const float* const parts = sums + slot * (kWarps * C::kEntries);
#pragma unroll
    for (int e0 = 0; e0 < C::kEntries; e0 += 32) {
      const int e = e0 + lane, column = (begin + i) * 16 + e % 16, row = e / 16;
      if (e >= C::kEntries || row >= a.rows) continue;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += parts[w * C::kEntries + e];
      const float scale = __bfloat162float(static_cast<const __nv_bfloat16*>(a.scale)[column]);
      static_cast<__nv_bfloat16*>(a.out)[static_cast<int64_t>(row) * a.n + column] = __float2bfloat16_rn(sum * scale);
    }
    free[slot].arrive_together();
  };

  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    const int i = tile - begin, slot = i % C::kSlots;
    int sum[C::kParts][4] = {};
    const char* digits = x;
#pragma unroll 1
    for (int c = 0; c < copies; ++c) {
      full[stage].wait(parity);
      const char* const unit = ring + stage * (kUnits * 1024) + lane * 16;
      const int here = min(kUnits, units - c * kUnits);
      uint4 q[kUnits][2];
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int h = 0; h < 2; ++h) q[u][h] = *reinterpret_cast<const uint4*>(unit + (2 * u + h) * 512);
      if (++stage == kStages) stage = 0, parity ^= 1;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (u >= here) break;
#pragma unroll
        for (int p = 0; p < C::kParts; ++p) {
          uint4 b = make_uint4(0, 0, 0, 0);
          if (C::kDigits >= 8 || g < C::kDigits) b = *reinterpret_cast<const uint4*>(digits + (8 * p + g) * 64 + t * 16);
          mma_bytes(sum[p], q[u][0].x, q[u][1].x, q[u][0].y, q[u][1].y, b.x, b.y);
          mma_bytes(sum[p], q[u][0].z, q[u][1].z, q[u][0].w, q[u][1].w, b.z, b.w);
        }
        digits += 128 * R;
      }
      // Now every lane has what it needs of the stage; loads that were only issued might come after the copy.
      __syncwarp();
      request();
    }
    if (i >= C::kSlots) free[slot].wait((i / C::kSlots + 1) & 1);
    float* const to = sums + (slot * kWarps + warp) * C::kEntries;
#pragma unroll
    for (int p = 0; p < C::kParts; ++p)
      if (t < R)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          to[(4 * p + t) * 16 + 8 * h + g] = fmaf(static_cast<float>(sum[p][2 * h] - offset[p][0]), 256.f,
                                                   static_cast<float>(sum[p][2 * h + 1] - offset[p][1])) * back[p];
    ready[slot].arrive_together();
    if (i > 0 && (i - 1) % kWarps == warp) epilogue(i - 1);
    if (tile + 1 == end && i % kWarps == warp) epilogue(i);
  }
#endif
}

}  // namespace ccq_w8
