// SPDX-License-Identifier: Apache-2.0
// Activations as the grouped GEMM reads them: fp16, a power-of-two scale a row, permuted, with the groups' sums.
//
// The weights are fp16 (decode.cuh), so bf16 activations must become fp16. Scaling each row by a power of two, so that
// its largest value lies in [2^14, 2^15), leaves bf16 values exact down to 2^-24 of the row's largest and their error
// below 2^-32 of it otherwise (both after the factors 1/8 and 1/16 that decode.cuh wants divided out).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode.cuh"
#include "launch.cuh"
#include "moe_gemm.h"

namespace ccq {

constexpr int kPrepareThreads = 512;  // 16 values each: rows up to 8192 are read once

// 128 values of each of 8 rows, as the narrow kernel copies them at a stretch: for each of two groups both halves p of a
// warp's 16-byte pieces (decode.cuh; lane 4 * row + t), then the groups' sums [2][8], each as two halfs (sum_parts).
constexpr int kRowsUnitBytes = 2048 + 64;

struct Prepared {
  char* x;           // [blocks of 8 rows, K/128, kRowsUnitBytes]
  char* rows;        // for moe_wide.cuh instead of x: [rows, K] halfs, in the order of the fragments along K
  float* row_scale;  // [rows]: what the row was divided by, times the caller's row scale
  int* tickets;      // set to zero here, for the split of K
};

template <typename T>
__device__ float to_float(T v);
template <>
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <>
__device__ inline float to_float(__half v) { return __half2float(v); }

// Sixteen stored rows 16t..16t+15 of a 64-group. In FastDeploy's order stored row 16a + 2b + c is input row 8b + 2a + c.
template <typename T>
__device__ void load_chunk(const T* x, int chunk, bool fastdeploy, float (&v)[16]) {
  union { uint32_t words[8]; T values[16]; } raw;
  if (!fastdeploy) {
    const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<size_t>(chunk) * 16);
    uint4 a = from[0], b = from[1];
    raw.words[0] = a.x, raw.words[1] = a.y, raw.words[2] = a.z, raw.words[3] = a.w;
    raw.words[4] = b.x, raw.words[5] = b.y, raw.words[6] = b.z, raw.words[7] = b.w;
  } else {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(x + static_cast<size_t>(chunk / 4) * 64) + chunk % 4;
#pragma unroll
    for (int b = 0; b < 8; ++b) raw.words[b] = from[4 * b];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = to_float(raw.values[i]);
}

// What a row is multiplied by, so that its largest value lies in [2^14, 2^15), and what undoes it. `largest`: bits of the
// largest magnitude. -110 keeps the reciprocal finite. A row with an infinity or a NaN becomes NaN throughout.
struct RowScale {
  float scale, back;
  __device__ explicit RowScale(uint32_t largest) {
    const bool finite = largest < 0x7F800000u;
    const int exponent = largest == 0 || !finite ? 14 : max(static_cast<int>(largest >> 23) - 127, -110);
    scale = __uint_as_float(static_cast<uint32_t>(127 + 14 - exponent) << 23);
    back = finite ? __uint_as_float(static_cast<uint32_t>(127 + exponent - 14) << 23) : __uint_as_float(~0u);
  }
};

// A group's sum of scaled values as the tensor cores take it: kSumScale times it, as high and low part.
__device__ inline __half2 sum_parts(float sum, float odd) {
  const float scaled = sum * odd * kSumScale;
  const __half high = __float2half_rn(scaled);
  return __halves2half2(high, __float2half_rn(scaled - __half2float(high)));
}

// Half p of a chunk's sixteen scaled values, in the order of the fragments.
__device__ inline uint4 fragment_half(const float (&v)[16], int p, float odd) {
  __half2 h[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float f = i % 2 ? 0.125f * odd : odd;
    h[i] = __floats2half2_rn(v[fragment_row(p, i, 0)] * f, v[fragment_row(p, i, 1)] * f);
  }
  return *reinterpret_cast<uint4*>(h);
}

// The first block of 8 rows of an expert. Blocks of different experts never share a place, whatever the routing:
// an expert's ceil(n / 8) blocks end before the next one's floor(start / 8) + 1.
__host__ __device__ inline int first_prepared_block(int start_row, int expert) { return start_row / 8 + expert; }

// Sixteen values of one row in the order that wgmma's fragments have along K: step 2p + i / 2 of 16 values, in it registers
// i even (the first 8) and odd (the last 8, with the factor 1/8), two values a lane.
__device__ inline void store_wide(const float (&v)[16], int chunk, __half* row) {
  const int group = chunk / 4, t = chunk % 4;
  const float odd = group % 2 ? kOddGroup : 1.f;
  __half2* to = reinterpret_cast<__half2*>(row + group * 64) + t;
#pragma unroll
  for (int p = 0; p < 2; ++p)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float f = i % 2 ? 0.125f * odd : odd;
      to[p * 16 + i * 4] = __floats2half2_rn(v[fragment_row(p, i, 0)] * f, v[fragment_row(p, i, 1)] * f);
    }
}

template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
prepare_kernel(const T* x, const int64_t* offsets, int experts, int k, bool fastdeploy, const float* row_scale,
               int tickets, Prepared out) {
  // The GEMM reads weights and offsets as soon as it starts: not before all that comes before this kernel has ended.
  wait_for_prerequisites();
  dependents_may_start();
  __shared__ uint32_t largest_of_warp[kPrepareThreads / 32];
  const int row = blockIdx.x, chunks = k / 16;
  if (row == 0)
    for (int i = threadIdx.x; i < tickets; i += kPrepareThreads) out.tickets[i] = 0;
  const T* from = x + static_cast<size_t>(row) * k;
  int expert = 0;  // experts that end at or before this row
  for (int base = 0; offsets && base < experts; base += kPrepareThreads) {
    const int e = base + threadIdx.x;
    expert += __syncthreads_count(e < experts && offsets[e] <= row);
  }
  if (expert >= experts) return;  // a row behind the last expert's
  const int start = expert && offsets ? static_cast<int>(offsets[expert - 1]) : 0;
  const int place = first_prepared_block(start, expert) * 8 + (row - start);

  float first[16] = {};
  uint32_t largest = 0;
  for (int c = threadIdx.x; c < chunks; c += kPrepareThreads) {
    float v[16];
    load_chunk(from, c, fastdeploy, v);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      largest = max(largest, __float_as_uint(v[i]) & 0x7FFFFFFFu);
      if (c == threadIdx.x) first[i] = v[i];
    }
  }
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) largest_of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = 0;
#pragma unroll
  for (int i = 0; i < kPrepareThreads / 32; ++i) largest = max(largest, largest_of_warp[i]);

  const RowScale scale(largest);
  if (threadIdx.x == 0) out.row_scale[row] = row_scale ? scale.back * row_scale[row] : scale.back;

  char* const to = out.x + static_cast<size_t>(place / 8) * (k / 128) * kRowsUnitBytes + place % 8 * 64;
  // Quads share a group, so whole warps walk the loop together and guard inside it.
  for (int c0 = 0; c0 < chunks; c0 += kPrepareThreads) {
    const int c = c0 + threadIdx.x;
    float v[16];
    if (c0 == 0) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = first[i];
    } else if (c < chunks) {
      load_chunk(from, c, fastdeploy, v);
    }
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      v[i] = c < chunks ? v[i] * scale.scale : 0.f;
      sum += v[i];
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (c >= chunks) continue;
    if (out.rows) {
      store_wide(v, c, reinterpret_cast<__half*>(out.rows) + static_cast<size_t>(row) * k);
      continue;
    }
    const int group = c / 4, t = c % 4;
    const float odd = group % 2 ? kOddGroup : 1.f;
    char* const unit = to + static_cast<size_t>(group / 2) * kRowsUnitBytes;
    if (t == 0)
      *reinterpret_cast<__half2*>(unit + 2048 - place % 8 * 60 + group % 2 * 32) = sum_parts(sum, odd);
#pragma unroll
    for (int p = 0; p < 2; ++p)
      *reinterpret_cast<uint4*>(unit + group % 2 * 1024 + p * 512 + t * 16) = fragment_half(v, p, odd);
  }
}

}  // namespace ccq
