// SPDX-License-Identifier: Apache-2.0
// A lane decodes four neighbouring columns of 128, for up to kRows rows at a time. Split K: the 64-groups
// fall into 32 splits, a warp sums one split after the other, and the splits are added up in shared memory in order: the same
// additions for any number of warps and rows. Weights are decoded in registers, never written.
#include "linear_ccq.h"

#include <algorithm>

#include "half8.cuh"

namespace ccq_spare_kernel {

constexpr int kGroup = 64;
constexpr int kSplits = 32;
constexpr int kColumns = 4;  // of a lane
constexpr int kBlockColumns = 32 * kColumns;
constexpr int kRowTiles = 16;  // grid size along rows; more rows are walked through

struct Format25 {
  using Word = uint16_t;
  using Words = uint2;  // four columns
  static constexpr int kWords = 10, kPerWord = 7, kBits = 3, kScaleBits = 13;
  // Codes (3, 3, 2) above (3, 4, 2): the step between states is 2 bits except at the seam.
  static __device__ constexpr int shift(int i) { return i < 3 ? 13 - 2 * i : 12 - 2 * i; }
  static __device__ void split(Words w, int* word) {
    word[0] = w.x & 0xFFFF, word[1] = w.x >> 16, word[2] = w.y & 0xFFFF, word[3] = w.y >> 16;
  }
};

struct Format275 {
  using Word = uint8_t;
  using Words = uint32_t;
  static constexpr int kWords = 22, kPerWord = 3, kBits = 4, kScaleBits = 4;
  static __device__ constexpr int shift(int i) { return 4 - 2 * i; }
  static __device__ void split(Words w, int* word) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) word[c] = w >> (8 * c) & 0xFF;
  }
};

// Input row that stored row s of a group multiplies (paddle_ccq/codec/row_order.py).
__device__ inline int input_row(int s, int row_order) {
  return row_order == CCQ_ROWS_FASTDEPLOY ? 8 * (s / 2 % 8) + 2 * (s / 16) + s % 2 : s;
}

// sums[r][c] += x[r] of one stored row times the state in `shift` of every column's word.
template <typename Format, int kRows>
__device__ inline void add_state(const int* word, int shift, const float* x, float (*sums)[kColumns]) {
  constexpr int kHalf = 1 << (Format::kBits - 1);
  float state[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) state[c] = static_cast<float>((word[c] >> shift & (2 * kHalf - 1)) - kHalf);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float value = x[r];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[r][c] = fmaf(state[c], value, sums[r][c]);
  }
}

// total[r][c] = what the groups split, split + 32, ... add; `staged` is this warp's.
template <typename Format, int kDtype, int kRows>
__device__ inline void add_part(const ccq_spare_gemm_args& a, const typename Format::Word* words, int64_t first, int rows,
                                int split, float (*staged)[kRows], float (*total)[kColumns]) {
  using Words = typename Format::Words;
  const auto* x = static_cast<const uint16_t*>(a.x);
  const int lane = threadIdx.x % 32, groups = a.k / kGroup;
  for (int g = split; g < groups; g += kSplits) {
    for (int i = lane; i < kGroup * kRows; i += 32) {
      const int r = i / kGroup, s = i % kGroup;
      const int64_t at = (first + r) * a.k + g * kGroup + input_row(s, a.row_order);
      staged[s][r] = r < rows ? ccq_half8::to_float<kDtype>(x[at]) : 0.0f;
    }
    __syncwarp();
    const auto* group = words + static_cast<int64_t>(g) * Format::kWords * a.n;
    float sums[kRows][kColumns] = {};
    int word[kColumns];
#pragma unroll 4
    for (int w = 0; w < Format::kWords - 1; ++w) {
      Format::split(*reinterpret_cast<const Words*>(group + static_cast<int64_t>(w) * a.n), word);
#pragma unroll
      for (int i = 0; i < Format::kPerWord; ++i)
        add_state<Format, kRows>(word, Format::shift(i), staged[w * Format::kPerWord + i], sums);
    }
    Format::split(*reinterpret_cast<const Words*>(group + static_cast<int64_t>(Format::kWords - 1) * a.n), word);
    add_state<Format, kRows>(word, Format::shift(0), staged[kGroup - 1], sums);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float scale = static_cast<float>(word[c] & ((1 << Format::kScaleBits) - 1));
#pragma unroll
      for (int r = 0; r < kRows; ++r) total[r][c] = fmaf(scale, sums[r][c], total[r][c]);
    }
    __syncwarp();
  }
}

template <typename Format, int kDtype, int kRows, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) spare_gemm(const __grid_constant__ ccq_spare_gemm_args a) {
  constexpr int kThreads = 32 * kWarps, kOutputs = (kRows * kBlockColumns + kThreads - 1) / kThreads;
  __shared__ alignas(16) float staged[kWarps][kGroup][kRows];
  __shared__ alignas(16) float partial[kWarps][kRows * kBlockColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t expert = blockIdx.y;
  const int column = blockIdx.x * kBlockColumns + lane * kColumns;
  const int64_t begin = a.offsets && expert > 0 ? a.offsets[expert - 1] : 0, end = a.offsets ? a.offsets[expert] : a.rows;
  const auto* words = static_cast<const typename Format::Word*>(a.quant_weight) +
                      expert * (a.k / kGroup) * Format::kWords * a.n + (column < a.n ? column : 0);
  auto* out = static_cast<uint16_t*>(a.out);
  for (int64_t first = begin + blockIdx.z * kRows; first < end; first += gridDim.z * kRows) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), end - first));
    float sum[kOutputs] = {};
    for (int round = 0; round < kSplits; round += kWarps) {
      float total[kRows][kColumns] = {};
      add_part<Format, kDtype, kRows>(a, words, first, rows, round + warp, staged[warp], total);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        *reinterpret_cast<float4*>(&partial[warp][r * kBlockColumns + lane * kColumns]) =
            make_float4(total[r][0], total[r][1], total[r][2], total[r][3]);
      __syncthreads();
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int i = o * kThreads + threadIdx.x;
        if (i < kRows * kBlockColumns)
          for (int w = 0; w < kWarps; ++w) sum[o] += partial[w][i];
      }
      __syncthreads();
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int i = o * kThreads + threadIdx.x, r = i / kBlockColumns, n = blockIdx.x * kBlockColumns + i % kBlockColumns;
      if (r >= rows || n >= a.n) continue;
      float value = sum[o] * __uint_as_float(static_cast<uint32_t>(a.super_scales[expert * a.n + n]) << 16);
      if (a.row_scale) value *= a.row_scale[first + r];
      out[(first + r) * a.n + n] = ccq_half8::from_float<kDtype>(value);
    }
  }
}

template <typename Format, int kDtype, int kRows, int kWarps>
void launch(const ccq_spare_gemm_args& a, cudaStream_t stream) {
  const dim3 grid((a.n + kBlockColumns - 1) / kBlockColumns, a.experts, std::min((a.rows + kRows - 1) / kRows, kRowTiles));
  spare_gemm<Format, kDtype, kRows, kWarps><<<grid, 32 * kWarps, 0, stream>>>(a);
}

// Few rows an expert: few at a time and more warps, as many as registers and shared memory allow.
template <typename Format, int kDtype>
void choose(const ccq_spare_gemm_args& a, cudaStream_t stream) {
  if (a.rows <= a.experts) launch<Format, kDtype, 1, 32>(a, stream);
  else if (a.rows <= 4 * a.experts) launch<Format, kDtype, 4, 16>(a, stream);
  else launch<Format, kDtype, 8, 8>(a, stream);
}

}  // namespace ccq_spare_kernel

extern "C" cudaError_t ccq_spare_gemm(const ccq_spare_gemm_args* args, cudaStream_t stream) {
  using namespace ccq_spare_kernel;
  const ccq_spare_gemm_args& a = *args;
  const bool enums = (a.format == CCQ_CCQ25 || a.format == CCQ_CCQ275) && (a.dtype == CCQ_BF16 || a.dtype == CCQ_FP16) &&
                     (a.row_order == CCQ_ROWS_PLAIN || a.row_order == CCQ_ROWS_FASTDEPLOY);
  if (!enums || a.rows < 0 || a.k < kGroup || a.k % kGroup || a.n < kColumns || a.n % kColumns || a.experts < 1 ||
      a.experts > 1024 || (!a.offsets && a.experts != 1))
    return cudaErrorInvalidValue;
  if (a.rows == 0) return cudaSuccess;
  const bool bf16 = a.dtype == CCQ_BF16;
  auto multiply = a.format == CCQ_CCQ25 ? (bf16 ? choose<Format25, CCQ_BF16> : choose<Format25, CCQ_FP16>)
                                        : (bf16 ? choose<Format275, CCQ_BF16> : choose<Format275, CCQ_FP16>);
  multiply(a, stream);
  return cudaGetLastError();
}
