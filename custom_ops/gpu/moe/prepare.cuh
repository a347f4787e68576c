// SPDX-License-Identifier: Apache-2.0
// Prologue kernels of the grouped GEMM, and activations as its main loop reads them: fp16, a power-of-two scale a row, permuted,
// with the groups' sums.
//
// The weights are fp16 (decode.cuh), so bf16 activations must become fp16. Scaling each row by a power of two, so that
// its largest value lies in [2^14, 2^15), leaves bf16 values exact down to 2^-24 of the row's largest and their error
// below 2^-32 of it otherwise (both after the factors 1/8 and 1/16 that decode.cuh wants divided out).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode.cuh"
#include "../common/launch.cuh"
#include "moe_gemm.h"

namespace ccq {

constexpr int kPrepareThreads = 512;  // 16 values each: rows up to 8192 are read once

// What moe_gemm.cuh and some_stream.cuh copy at once: 128 values of each of 8 rows, as both of two groups' pieces of 16 bytes. First
// what accumulators begin with in each group (windows are 32 less than they are stored), as a lane t wants it; then the pieces; then
// what undoes the scales of parts of rows, float [8 rows].
//   Tiles of few rows: integers; int [2 halves of the rows][2 groups][4 rows][2 digits], then [2 halves][2 groups][4 rows]
//   [2 digits][4 t]. For some_stream.cuh with a scale for each 1024 values of a row.
//   Larger tiles: fp16; float [2][4 t][rows 2t, 2t + 1, 2t, 2t + 1], then [2][both halves p (decode.cuh)][8 rows][4 t].
//   For weights that are scaled when they are decoded (some_stream.cuh): fp16 for all tiles, nothing divided out.
constexpr int kRowsScaleAt = 128 + 2048, kRowsUnitBytes = kRowsScaleAt + 32, kFourRowsBytes = 128 + 1024;
constexpr int kMostIntegerRows = 4;  // of moe_gemm.cuh

struct Prepared {
  char* x;           // [blocks of 8 rows, K/128, kRowsUnitBytes]
  float* row_scale;  // [rows]: what the row was divided by, times the caller's row scale
  int* counters;     // partial results that are ready, by owner (epilogue.cuh); set to zero here
};

__device__ inline void store(void* to, int dtype, size_t at, float v) {
  if (dtype == CCQ_BF16) static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(v);
  else static_cast<__half*>(to)[at] = __float2half_rn(v);
}

// Sixteen values of a row: of a 64-group, which a quad of lanes has, those that meet stored rows 16t..16t+15 of the weights.
struct Chunk {
  uint32_t words[8];

  // As they lie in memory.
  __device__ void load(const void* row, int chunk) {
    const uint4* from = static_cast<const uint4*>(row) + 2 * chunk;
    const uint4 a = from[0], b = from[1];
    words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
    words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
  }
  // From input order to FastDeploy's, whose stored row 16a + 2b + c is input row 8b + 2a + c: lane s of the quad has the
  // words (b, a) of b = 2s and 2s + 1, lane t wants those of a = t. So the quad transposes 4 x 4 pairs of words. (Loading
  // them where they are wanted would take eight loads that each touch every line.) All lanes of a warp together.
  __device__ void arrange() {
    uint32_t e[4][2];  // [a], afterwards [s]
#pragma unroll
    for (int a = 0; a < 4; ++a) e[a][0] = words[a], e[a][1] = words[4 + a];
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = threadIdx.x & bit;
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        if (a & bit) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t got = __shfl_xor_sync(~0u, upper ? e[a][j] : e[a + bit][j], bit);
          if (upper) e[a][j] = got; else e[a + bit][j] = got;
        }
      }
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) words[2 * s] = e[s][0], words[2 * s + 1] = e[s][1];
  }
  // All values. One branch: choosing for each of them would cost more than the conversion.
  __device__ void values(int dtype, float (&v)[16]) const {
    if (dtype == CCQ_BF16) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = value(i, dtype);
    }
  }
  __device__ float value(int i, int dtype) const {
    const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
    return dtype == CCQ_BF16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16) : __half2float(__ushort_as_half(bits));
  }
  // Bits of the largest magnitude, as float32. Those of 16-bit values sort like the values.
  __device__ uint32_t largest(int dtype) const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = __vmaxu2(most, words[i] & 0x7FFF7FFFu);
    const uint16_t bits = static_cast<uint16_t>(max(most >> 16, most & 0xFFFFu));
    return dtype == CCQ_BF16 ? static_cast<uint32_t>(bits) << 16 : __float_as_uint(__half2float(__ushort_as_half(bits)));
  }
};

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

// Half p of a chunk's sixteen scaled values, in the order of the fragments.
__device__ inline uint4 fragment_half(const float (&v)[16], int p, float odd, float upper) {
  __half2 h[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float f = i % 2 ? upper * odd : odd;
    h[i] = __floats2half2_rn(v[fragment_row(p, i, 0)] * f, v[fragment_row(p, i, 1)] * f);
  }
  return *reinterpret_cast<uint4*>(h);
}

// The first block of 8 rows of an expert. Blocks of different experts never share a place, whatever the routing:
// an expert's ceil(n / 8) blocks end before the next one's floor(start / 8) + 1.
__host__ __device__ inline int first_prepared_block(int start_row, int expert) { return start_row / 8 + expert; }

// A row's scale to integers of 16 bits, from the bits of its largest magnitude. A row with an infinity or a NaN becomes NaN.
struct IntegerScale {
  float scale, back;
  __device__ explicit IntegerScale(uint32_t largest) {
    constexpr float kLargest = 32512.f;  // of two signed digits it leaves the upper one at most 127
    const float top = fmaxf(__uint_as_float(largest), 1e-30f);
    const bool finite = largest < 0x7F800000u;
    float inverse;  // near enough: a row may be multiplied by any number
    asm("rcp.approx.f32 %0, %1;\n" : "=f"(inverse) : "f"(top));
    scale = finite ? kLargest * inverse : 0.f;
    back = finite ? top * (1.f / kLargest) : __uint_as_float(~0u);
  }
};

// A chunk as integers: upper and lower digits as the bytes that a lane's steps want (decode.cuh, ByteWindows), and what
// accumulators begin with, for windows are 32 less than they are stored. Of the four values that a byte of weights meets,
// the last two are quartered.
struct Digits {
  uint4 bytes[2];
  int offset[2];

  __device__ Digits(const Chunk& chunk, int dtype, float scale) {
    offset[0] = offset[1] = 0;
    uint32_t words[2][4];
    float v[16];
    chunk.values(dtype, v);
    // To the nearest integer, in the low bits of 1.5 * 2^23 (conversions run at a quarter of the rate); 128 more, so that
    // the upper byte is the upper digit and the lower one, less 128, the lower digit.
    auto rounded = [&](int i) {
      return __float_as_uint(__fmaf_rn(v[i], i % 4 < 2 ? scale : scale * 0.25f, 12582912.f + 128.f));
    };
    auto both = [&](int i, int j) { return __byte_perm(rounded(i), rounded(j), 0x4051); };  // upper digits, lower digits
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // the weights' bytes h and h + 2 of a lane's four
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int a = 4 * h + odd, b = a + 8, word = 2 * h + odd;
        const uint32_t lower = both(a + 2, a), upper = both(b + 2, b);
        words[0][word] = __byte_perm(lower, upper, 0x5410);
        words[1][word] = __byte_perm(lower, upper, 0x7632) ^ 0x80808080u;
#pragma unroll
        for (int d = 0; d < 2; ++d)  // -32 times each digit, -128 times where four times the window meets it
          offset[d] = __dp4a(static_cast<int>(words[d][word]), static_cast<int>(0xE080E080u), offset[d]);
      }
    }
#pragma unroll
    for (int d = 0; d < 2; ++d) bytes[d] = make_uint4(words[d][0], words[d][1], words[d][2], words[d][3]);
  }
};

__device__ inline int quad_sum(int v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// A row of a kernel that prepares activations, a row a block of kPrepareThreads: its expert and its place.
struct RowToPrepare {
  const int row;
  const int64_t* const offsets;
  const char* const from;
  int expert;  // == experts: a row behind the last expert's

  // All threads.
  __device__ RowToPrepare(const void* x, const int64_t* offsets_, int experts, int k)
      : row(blockIdx.x), offsets(offsets_), from(static_cast<const char*>(x) + static_cast<size_t>(row) * k * 2), expert(0) {
    for (int base = 0; offsets && base < experts; base += kPrepareThreads) {  // experts that end at or before this row
      const int e = base + threadIdx.x;
      expert += __syncthreads_count(e < experts && offsets[e] <= row);
    }
  }
  // The expert's first row, and the row's place in blocks of 8.
  __device__ int start() const { return expert && offsets ? static_cast<int>(offsets[expert - 1]) : 0; }
  __device__ int place(int start) const { return first_prepared_block(start, expert) * 8 + (row - start); }

  // Bits of the row's largest magnitude; `first`: each thread's first chunk of it, `of_warp` in shared memory. All threads.
  __device__ uint32_t largest(const Chunk& first, int chunks, int dtype, uint32_t (&of_warp)[kPrepareThreads / 32]) const {
    uint32_t most = first.largest(dtype);
    for (int c = threadIdx.x + kPrepareThreads; c < chunks; c += kPrepareThreads) {
      Chunk other;
      other.load(from, c);
      most = max(most, other.largest(dtype));
    }
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
    __syncthreads();
    most = 0;
#pragma unroll
    for (int i = 0; i < kPrepareThreads / 32; ++i) most = max(most, of_warp[i]);
    return most;
  }
};

// What activations become: for moe_gemm.cuh, for some_stream.cuh with integers, or with weights that are scaled when they are decoded.
enum class Prepare { kSome, kBlocks, kScaled };

// static: more than one source launches it.
static __global__ void __launch_bounds__(kPrepareThreads)
prepare_kernel(const void* x, const int64_t* offsets, int experts, int k, int dtype, bool fastdeploy, const float* row_scale,
               int tile_rows, Prepare what, int counters, Prepared out) {
  // The GEMM reads weights and offsets as soon as it starts: not before all that comes before this kernel has ended.
  wait_for_prerequisites();
  dependents_may_start();
  __shared__ uint32_t largest_of_warp[kPrepareThreads / 32];
  const int row = blockIdx.x, chunks = k / 16;
  if (row == 0)
    for (int i = threadIdx.x; i < counters; i += kPrepareThreads) out.counters[i] = 0;
  Chunk first{};
  if (static_cast<int>(threadIdx.x) < chunks) first.load(static_cast<const char*>(x) + static_cast<size_t>(row) * k * 2, threadIdx.x);
  const RowToPrepare own_row(x, offsets, experts, k);
  const char* const from = own_row.from;
  const int expert = own_row.expert;
  if (expert >= experts) return;
  const int start = own_row.start(), place = own_row.place(start);

  uint32_t largest = what == Prepare::kBlocks ? 0 : own_row.largest(first, chunks, dtype, largest_of_warp);

  // Rows of a tile; its mode goes by how many there are.
  const int end = offsets ? static_cast<int>(offsets[expert]) : static_cast<int>(gridDim.x);
  const int in_tile = (row - start) % tile_rows, count = min(tile_rows, end - (row - in_tile));
  const bool blocks = what == Prepare::kBlocks, scaled = what == Prepare::kScaled;
  const bool integers = blocks || (count <= kMostIntegerRows && !scaled);
  const RowScale half_scale(largest);
  IntegerScale integer_scale(largest);
  if (threadIdx.x == 0) {
    const float back = blocks ? 1.f : integers ? integer_scale.back : half_scale.back;
    out.row_scale[row] = row_scale ? back * row_scale[row] : back;
  }

  char* const to = out.x + static_cast<size_t>(place / 8) * (k / 128) * kRowsUnitBytes;
  // Quads share a group, so whole warps walk the loop together and guard inside it.
  for (int c0 = 0; c0 < chunks; c0 += kPrepareThreads) {
    const int c = c0 + threadIdx.x, group = c / 4, t = c % 4;
    if (c0 > 0) {
      first = Chunk{};
      if (c < chunks) first.load(from, c);
    }
    char* const unit = to + static_cast<size_t>(group / 2) * kRowsUnitBytes;
    if (blocks) {  // a warp has 512 values, two side by side have a scale
      largest = __reduce_max_sync(~0u, first.largest(dtype));
      if (c0 > 0) __syncthreads();
      if (threadIdx.x % 32 == 0) largest_of_warp[threadIdx.x / 32] = largest;
      __syncthreads();
      integer_scale = IntegerScale(max(largest, largest_of_warp[threadIdx.x / 32 ^ 1]));
      if (c < chunks && c % 8 == 0) reinterpret_cast<float*>(unit + kRowsScaleAt)[place % 8] = integer_scale.back;
    }
    if (fastdeploy) first.arrange();
    if (integers) {
      const Digits digits(first, dtype, integer_scale.scale);
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        const int offset = quad_sum(digits.offset[d]), half = place % 8 / 4, column = 2 * (place % 4) + d;
        if (c >= chunks) continue;
        if (t == 0) reinterpret_cast<int*>(unit)[half * 16 + group % 2 * 8 + column] = offset;
        *reinterpret_cast<uint4*>(unit + 128 + half * 1024 + group % 2 * 512 + column * 64 + t * 16) = digits.bytes[d];
      }
      continue;
    }
    float v[16], sum = 0.f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      v[i] = c < chunks ? first.value(i, dtype) * half_scale.scale : 0.f;
      sum += v[i];
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (c >= chunks) continue;
    const float odd = group % 2 && !scaled ? kOddGroup : 1.f, upper = scaled ? 1.f : 0.125f;
    const int own = place % 8;
    if (t < 2) reinterpret_cast<float*>(unit)[group % 2 * 16 + own / 2 * 4 + t * 2 + own % 2] = sum * odd * kOffset;
#pragma unroll
    for (int p = 0; p < 2; ++p)
      *reinterpret_cast<uint4*>(unit + 128 + group % 2 * 1024 + p * 512 + own * 64 + t * 16) = fragment_half(v, p, odd, upper);
  }
}

// A quad's 4 x 4 words, transposed: lane t has word t of every lane. All lanes of a warp together.
__device__ inline void transpose_quad(uint32_t (&e)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      if (a & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? e[a] : e[a + bit], bit);
      if (upper) e[a] = got; else e[a + bit] = got;
    }
  }
}

// What moe_wide.cuh needs before it: counters set to zero and, if weights have their rows in plain order, activations in the order
// in which such weights stand in fragments (`to` [rows, k], from `x`): of a 64-group, words (pairs of rows) 8t + q to 4q + t.
// Without them (`to` NULL) one block will do.
static __global__ void __launch_bounds__(kPrepareThreads)
arrange_kernel(const uint4* x, uint4* to, int64_t chunks, int* counter, int counters) {
  wait_for_prerequisites();
  dependents_may_start();
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < counters; i += kPrepareThreads) counter[i] = 0;
  if (!to) return;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x;  // of 16 values; 4 a 64-group
  const bool there = chunk < chunks;
  const uint4 a = there ? x[2 * chunk] : uint4{}, b = there ? x[2 * chunk + 1] : uint4{};
  uint32_t low[4] = {a.x, a.y, a.z, a.w}, high[4] = {b.x, b.y, b.z, b.w};
  transpose_quad(low), transpose_quad(high);
  if (!there) return;
  uint4* const group = to + chunk / 4 * 8 + chunk % 4;
  group[0] = make_uint4(low[0], low[1], low[2], low[3]), group[4] = make_uint4(high[0], high[1], high[2], high[3]);
}

}  // namespace ccq
