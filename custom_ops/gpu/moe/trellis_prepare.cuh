// SPDX-License-Identifier: Apache-2.0
// Activations as trellis_some.cuh reads them: digits of integers with one scale a row, four rows of an expert side by side.
//
// A block makes four rows of an expert. The digits of four rows for four lanes are 64 bytes: a quad of threads, each of which has
// one lane's words of all four rows, exchanges them, so that each stores 16 bytes of one row and the quad a whole piece.
#pragma once

#include "gemm_launch.cuh"
#include "trellis.cuh"
#include "warp_scan.cuh"

namespace ccq {

// Of 4 rows and 256 input rows: [4 groups][4 code bytes of a lane][2 hash words][upper digits of 4 rows, lower digits][4 lanes][4 bytes].
constexpr int kTrellisFourRows = kTrellisRowsBytes / 2;

// Rows of an expert from `row` on, `count` of them, at most four; `place`: in blocks of 8 (first_prepared_block).
struct FourRows {
  int row, count, place;

  // The `four`th of all experts' blocks of four rows; count 0 where there are less. All lanes of a warp together.
  __device__ FourRows(const int64_t* offsets, int rows, int experts, int four) : row(0), count(0), place(0) {
    constexpr int kAhead = 8;  // offsets are asked for together: one after another each would wait for the cache
    const int lane = threadIdx.x % 32;
    auto end_of = [&](int e) { return e < 0 ? 0 : offsets ? static_cast<int>(offsets[e]) : rows; };
    for (int base = 0; base < experts; base += 32 * kAhead) {
      int start[kAhead], end[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int e = base + 32 * i + lane;
        start[i] = e < experts ? end_of(e - 1) : 0, end[i] = e < experts ? end_of(e) : 0;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (base + 32 * i >= experts) break;
        const int own = (end[i] - start[i] + 3) / 4, upto = prefix_sum(lane, own);
        const uint32_t beyond = __ballot_sync(~0u, upto > four);
        if (beyond) {
          const int at = __ffs(beyond) - 1, before = four - __shfl_sync(~0u, upto - own, at);
          const int first = __shfl_sync(~0u, start[i], at), last = __shfl_sync(~0u, end[i], at);
          row = first + 4 * before, count = min(4, last - row);
          place = first_prepared_block(first, base + 32 * i + at) * 8 + 4 * before;
          return;
        }
        four -= __shfl_sync(~0u, upto, 31);
      }
    }
  }
};

// Blocks of the kernel: as many as there may be blocks of four rows.
inline int trellis_prepare_blocks(int rows, int experts) { return std::min(rows, rows / 4 + experts); }

template <bool kBf16>
__global__ void __launch_bounds__(kPrepareThreads)
trellis_prepare_kernel(const void* x, const int64_t* offsets, int rows, int experts, int k, const float* row_scale, int counters, Prepared out) {
  wait_for_prerequisites();
  dependents_may_start();
  constexpr int kType = kBf16 ? CCQ_BF16 : CCQ_FP16, kWarps = kPrepareThreads / 32;
  __shared__ uint32_t largest_of_warp[4][kWarps];
  const int chunks = k / 16, warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < counters; i += kPrepareThreads) out.counters[i] = 0;
  const FourRows four(offsets, rows, experts, blockIdx.x);
  if (four.count == 0) return;
  const char* const from = static_cast<const char*>(x) + static_cast<size_t>(four.row) * k * 2;
  Chunk kept[4];
  auto load = [&](int c) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      kept[r] = Chunk{};
      if (r < four.count && c < chunks) kept[r].load(from + static_cast<size_t>(r) * k * 2, c);
    }
  };
  load(threadIdx.x);
  uint32_t largest[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) largest[r] = kept[r].largest(kType);
#pragma unroll 1
  for (int c = threadIdx.x + kPrepareThreads; c < chunks; c += kPrepareThreads)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r >= four.count) break;
      Chunk other;
      other.load(from + static_cast<size_t>(r) * k * 2, c);
      largest[r] = max(largest[r], other.largest(kType));
    }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    largest[r] = __reduce_max_sync(~0u, largest[r]);
    if (lane == 0) largest_of_warp[r][warp] = largest[r];
  }
  __syncthreads();
  float scale[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const IntegerScale own(__reduce_max_sync(~0u, largest_of_warp[r][lane % kWarps]));
    scale[r] = own.scale;
    if (static_cast<int>(threadIdx.x) == r && r < four.count)
      out.row_scale[four.row + r] = row_scale ? own.back * row_scale[four.row + r] : own.back;
  }
  char* const to = out.x + static_cast<size_t>(four.place / 8) * ((k + 255) / 256) * kTrellisRowsBytes + four.place % 8 / 4 * kTrellisFourRows;
  // Whole stages: what lies behind the last input row is zero, for weights there are whatever shared memory held.
  const int all = (chunks + 15) / 16 * 16;
#pragma unroll 1
  for (int c0 = warp * 32; c0 < all; c0 += kPrepareThreads) {
    const int c = c0 + lane;
    if (c0 >= kPrepareThreads) load(c);
    char* const at = to + static_cast<size_t>(c / 16) * kTrellisRowsBytes + c / 4 % 4 * 1024 + t * 16;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t upper[4], lower[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const TrellisDigits digits(kept[r].value(2 * j, kType), kept[r].value(2 * j + 1, kType), scale[r]);
        upper[r] = digits.upper, lower[r] = digits.lower;
      }
      transpose_quad(upper), transpose_quad(lower);
      if (c < all && t < four.count) {
        *reinterpret_cast<uint4*>(at + j * 128) = make_uint4(upper[0], upper[1], upper[2], upper[3]);
        *reinterpret_cast<uint4*>(at + j * 128 + 64) = make_uint4(lower[0], lower[1], lower[2], lower[3]);
      }
    }
  }
}

}  // namespace ccq
