// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for one row at a time: what a decoding step of one token needs, in a single launch.
//
// With one row there is nothing to share between warps, so nothing is shared: a tile is (row, kWN * kR * 16 columns), its
// K is dealt out block of 128 rows by block to kWK warps, and each warp fetches its own weights through its own ring and
// makes its own fp16 activations, with a scale for each 128 values, when a new row begins. The warps meet once a tile, to
// add kR * 16 numbers each. No kernel runs before (preparing all rows first costs 4 us, a third of a small layer), no
// tile is cut across blocks (summing partial results costs 2 to 3 us), and the ring runs on across tiles.
#pragma once

#include "decode.cuh"
#include "prepare.cuh"

namespace ccq {

struct GemvParams {
  const void* x;
  const int64_t* offsets;
  const uint8_t* quant;
  const uint8_t* scales;
  const uint32_t* columns;
  const float* row_scale;
  void* out;
  int rows, k, n, experts, dtype, fastdeploy;
};

template <Pairs kPairs_, int kR_, int kWarps_, int kWK_>
struct GemvConfig {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = kR_, kWarps = kWarps_, kWK = kWK_, kThreads = kWarps * 32, kMinBlocks = 16 / kWarps;
  static constexpr int kWN = kWarps / kWK, kTiles = kR * kWN;  // 16-column tiles of a block tile
  static constexpr int kStages = kR == 4 ? 5 : kR == 2 ? 8 : 12;  // 10, 8 and 6 KB a warp
  static constexpr int kUnitBytes = kR * 528;                  // weights [r][512], scales [r][16]
  static constexpr int kActivationBytes = 272;                 // of 128 rows: float scale, 2 half2 sums (at 8), pieces (at 16)
  static size_t shared_bytes(int k) {
    return static_cast<size_t>(kWarps) * (kStages * kUnitBytes + (k / 128 + kWK - 1) / kWK * kActivationBytes) +
           2 * kWarps * kR * 16 * sizeof(float);
  }
};

// The expert of a row: as many as end at or before it. All lanes of a warp together.
__device__ inline int expert_of_row(const int64_t* offsets, int experts, int row) {
  if (!offsets) return 0;
  int expert = 0;
  for (int base = 0; base < experts; base += 32) {
    const int e = base + static_cast<int>(threadIdx.x % 32);
    expert += __popc(__ballot_sync(~0u, e < experts && offsets[e] <= row));
  }
  return expert;
}

// The caller's values of 128 rows of one row of x, 4 a lane, become fp16 pieces at `to`.
template <typename T>
__device__ void convert(const uint32_t (&words)[2], char* to) {
  const int lane = threadIdx.x % 32;
  union { uint32_t word; T value[2]; } raw[2];
  raw[0].word = words[0], raw[1].word = words[1];
  float v[4] = {to_float(raw[0].value[0]), to_float(raw[0].value[1]), to_float(raw[1].value[0]), to_float(raw[1].value[1])};
  uint32_t largest = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) largest = max(largest, __float_as_uint(v[e]) & 0x7FFFFFFFu);
  largest = __reduce_max_sync(~0u, largest);
  // As in prepare.cuh: the largest value comes to lie in [2^14, 2^15); an infinity or a NaN makes the whole row NaN.
  int exponent = largest == 0 ? 14 : max(static_cast<int>(largest >> 23) - 127, -110);
  const bool finite = largest < 0x7F800000u;
  if (!finite) exponent = 14;
  const float scale = __uint_as_float(static_cast<uint32_t>(127 + 14 - exponent) << 23);
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] *= scale, sum += v[e];
#pragma unroll
  for (int d = 1; d < 16; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  const int group = lane / 16;
  const float odd = group ? kOddGroup : 1.f;
  if (lane % 16 == 0) {
    const float scaled = sum * odd * kSumScale;
    const __half high = __float2half_rn(scaled);
    reinterpret_cast<__half2*>(to)[2 + group] = __halves2half2(high, __float2half_rn(scaled - __half2float(high)));
  }
  if (lane == 0)
    *reinterpret_cast<float*>(to) =
        finite ? __uint_as_float(static_cast<uint32_t>(127 + exponent - 14) << 23) : __uint_as_float(~0u);
  // The later value of each word is in registers 0 and 2 of its piece, the earlier in 1 and 3, which carry the factor 1/8.
  __half2 h[2] = {__floats2half2_rn(v[1] * odd, v[3] * odd), __floats2half2_rn(v[0] * 0.125f * odd, v[2] * 0.125f * odd)};
  const int half = lane / 8 % 2, t = lane / 2 % 4, j = lane % 2;
  *reinterpret_cast<uint2*>(to + 16 + (group * 2 + half) * 64 + t * 16 + j * 8) = *reinterpret_cast<uint2*>(h);
}

// A warp's blocks of 128 rows wk, wk + kWK, ... of one row of x.
template <typename C>
__device__ void convert_row(const GemvParams& p, int row, int wk, char* to) {
  const int lane = threadIdx.x % 32, blocks_k = p.k / 128;
  // A lane makes half of a 16-byte piece: group, half p, quad lane t, registers 2j and 2j + 1 (fragment_row in decode.cuh).
  const int group = lane / 16, half = lane / 8 % 2, t = lane / 2 % 4, j = lane % 2;
  const int b = 2 * half + 1 - j;  // the word of two values, and the one 4 words on
  const int word = group * 32 + (p.fastdeploy ? 4 * b + t : 8 * t + b), further = p.fastdeploy ? 16 : 4;
  const uint32_t* from = static_cast<const uint32_t*>(p.x) + static_cast<size_t>(row) * (p.k / 2) + word;
  constexpr int kBatch = 8;  // loads on their way at once
  for (int base = wk; base < blocks_k; base += kBatch * C::kWK) {
    uint32_t words[kBatch][2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int kb = min(base + i * C::kWK, blocks_k - 1);
      words[i][0] = from[kb * 64], words[i][1] = from[kb * 64 + further];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (base + i * C::kWK < blocks_k) {
        if (p.dtype == CCQ_BF16) convert<__nv_bfloat16>(words[i], to);
        else convert<__half>(words[i], to);
        to += C::kActivationBytes;
      }
  }
  __syncwarp();
}

// The end of a warp's ring where units are requested.
template <typename C>
struct Fetch {
  const GemvParams& p;
  const int wk, wn, blocks_k, tiles_n, column_tiles, end;
  char* const ring_lane;  // + 16 * lane
  int tile, row, expert, kb, stage, count, first;
  const uint8_t* quant;
  const uint8_t* scales;

  __device__ void aim() {  // at `tile`, this warp's first block of 128 rows
    kb = wk;
    if (tile >= end) return;
    const int its_row = tile / column_tiles, t16 = (tile - its_row * column_tiles) * C::kTiles + wn * C::kR;
    if (its_row != row) row = its_row, expert = expert_of_row(p.offsets, p.experts, row);
    first = t16 % 4, count = min(4, tiles_n - t16 / 4 * 4);
    // Nothing is fetched right of the last column or for rows behind the last expert's: such tiles are not stored.
    if (t16 >= tiles_n || expert >= p.experts) { count = 0; return; }
    const size_t unit = ccq_unit_index(expert, t16, kb, tiles_n, blocks_k);
    quant = p.quant + unit * 512 + threadIdx.x % 32 * 16;
    scales = p.scales + unit * 16 + threadIdx.x % 32 * 16;
  }
  __device__ void request() {  // the next unit, or nothing
    if (tile < end) {
      char* to = ring_lane + stage;
#pragma unroll
      for (int r = 0; r < C::kR; ++r)
        if (first + r < count) copy16(to + r * 512, quant + r * 512);
      const int lane = threadIdx.x % 32;
      if (lane < C::kR && first + lane < count) copy16(to + C::kR * 512, scales);
      quant += C::kWK * count * 512, scales += C::kWK * count * 16;
      stage = stage + C::kUnitBytes == C::kStages * C::kUnitBytes ? 0 : stage + C::kUnitBytes;
      kb += C::kWK;
      if (kb >= blocks_k) ++tile, aim();
    }
    copy_commit();  // an empty group keeps the count of pending groups right at the end
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) gemv_kernel(const GemvParams p) {
  extern __shared__ __align__(16) char shared[];
  constexpr int kR = C::kR;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int wk = warp / C::kWN, wn = warp % C::kWN, blocks_k = p.k / 128, tiles_n = p.n / 16;
  const int activation_bytes = (blocks_k + C::kWK - 1) / C::kWK * C::kActivationBytes;
  char* const ring = shared + warp * (C::kStages * C::kUnitBytes);
  char* const activations = shared + C::kWarps * (C::kStages * C::kUnitBytes) + warp * activation_bytes;
  float* const sums = reinterpret_cast<float*>(shared + C::kWarps * (C::kStages * C::kUnitBytes + activation_bytes));

  const int column_tiles = (tiles_n + C::kTiles - 1) / C::kTiles, tiles = p.rows * column_tiles, grid = gridDim.x;
  const int each = tiles / grid, longer = tiles % grid, block = blockIdx.x;
  const int begin = block * each + min(block, longer), end = begin + each + (block < longer);
  wait_for_prerequisites();  // before any read: an earlier kernel may have written anything, weights included

  Fetch<C> fetch{p, wk, wn, blocks_k, tiles_n, column_tiles, end, ring + lane * 16};
  fetch.tile = begin, fetch.row = -1, fetch.expert = 0, fetch.stage = 0;
  fetch.aim();
#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) fetch.request();

  int row = -1, expert = 0, stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    const int its_row = tile / column_tiles, column_tile = tile - its_row * column_tiles;
    if (its_row != row) {
      row = its_row, expert = expert_of_row(p.offsets, p.experts, row);
      convert_row<C>(p, row, wk, activations);
    }
    const int t16 = min(column_tile * C::kTiles + wn * kR, tiles_n - 1), there = min(expert, p.experts - 1);
    const float* columns = reinterpret_cast<const float*>(p.columns) + (static_cast<size_t>(there) * tiles_n + t16) * 48;
    Column<C::kPairs> column[kR][2];
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* c = columns + min(r, tiles_n - 1 - t16) * 48 + g + 8 * i;
        column[r][i] = Column<C::kPairs>(__ldg(c), __ldg(c + 16));
      }
    // A thread of the first kWN * kR * 16 finishes one column of the tile.
    const int mine = column_tile * C::kTiles * 16 + static_cast<int>(threadIdx.x);
    const bool finishes = threadIdx.x < C::kTiles * 16 && mine < p.n && expert < p.experts;
    float super = 0.f;
    if (finishes) {
      super = __uint_as_float(__ldg(p.columns + (static_cast<size_t>(expert) * tiles_n + mine / 16) * 48 + 32 + mine % 16));
      if (p.row_scale) super *= __ldg(p.row_scale + row);
    }

    float acc[kR][2] = {};
    const uint32_t magic = kMagic | (p.k & 0x80000000u);  // p.k is positive, but the compiler does not know
    const uint32_t sum_weights = t == 0 ? kSumWeights : 0;
    const char* x = activations;
    for (int kb = wk; kb < blocks_k; kb += C::kWK, x += C::kActivationBytes) {
      uint4 b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = *reinterpret_cast<const uint4*>(x + 16 + i * 64 + t * 16);
      const uint2 s = *reinterpret_cast<const uint2*>(x + 8);
      const float unit_scale = *reinterpret_cast<const float*>(x);
      copy_wait<C::kStages - 2>();
      __syncwarp();  // scales were fetched by other lanes
      uint4 q[kR];
      uint32_t scale[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        q[r] = *reinterpret_cast<const uint4*>(ring + stage + r * 512 + lane * 16);
        scale[r] = *reinterpret_cast<const uint16_t*>(ring + stage + kR * 512 + r * 16 + g * 2);
      }
      stage = stage + C::kUnitBytes == C::kStages * C::kUnitBytes ? 0 : stage + C::kUnitBytes;
      // The stage requested now is the one read in the last round, which every lane has left (the barrier above).
      fetch.request();
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          const uint32_t low = half ? q[r].z : q[r].x, high = half ? q[r].w : q[r].y;
          float d[4];
          mma_sums(d, sum_weights, half ? s.y : s.x);
          {
            const Windows a(column[r][0].template codes<0>(low)), c(column[r][1].template codes<0>(high));
            mma(d, a.w[0], c.w[0], a.w[1], c.w[1], b[half * 2].x, b[half * 2].y);
            mma(d, a.w[2], c.w[2], a.w[3], c.w[3], b[half * 2].z, b[half * 2].w);
          }
          {
            const Windows a(column[r][0].template codes<1>(low)), c(column[r][1].template codes<1>(high));
            mma(d, a.w[0], c.w[0], a.w[1], c.w[1], b[half * 2 + 1].x, b[half * 2 + 1].y);
            mma(d, a.w[2], c.w[2], a.w[3], c.w[3], b[half * 2 + 1].z, b[half * 2 + 1].w);
          }
          const float f0 = half ? nibble<1>(scale[r], magic) : nibble<0>(scale[r], magic);
          const float f1 = half ? nibble<3>(scale[r], magic) : nibble<2>(scale[r], magic);
          acc[r][0] = fmaf(f0 * unit_scale, d[0], acc[r][0]);
          acc[r][1] = fmaf(f1 * unit_scale, d[2], acc[r][1]);
        }
    }

    // All 8 columns of B were the same row. Two buffers, so that one barrier a tile is enough: a warp that writes into
    // this buffer again has passed the next tile's barrier, and so has every reader of this one.
    float* const buffer = sums + (tile & 1) * (C::kWarps * kR * 16);
    if (t == 0)
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        buffer[warp * (kR * 16) + r * 16 + g] = acc[r][0];
        buffer[warp * (kR * 16) + r * 16 + 8 + g] = acc[r][1] * kUpperColumns;
      }
    __syncthreads();
    if (finishes) {
      float sum = 0.f;
      const int at = threadIdx.x / (kR * 16), c = threadIdx.x % (kR * 16);
#pragma unroll
      for (int i = 0; i < C::kWK; ++i) sum += buffer[(i * C::kWN + at) * (kR * 16) + c];
      sum *= super * 16777216.f;
      const size_t to = static_cast<size_t>(row) * p.n + mine;
      if (p.dtype == CCQ_BF16) static_cast<__nv_bfloat16*>(p.out)[to] = __float2bfloat16_rn(sum);
      else static_cast<__half*>(p.out)[to] = __float2half_rn(sum);
    }
  }
}

}  // namespace ccq
