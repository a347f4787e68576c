// SPDX-License-Identifier: Apache-2.0
// The end of a tile in the kernels that cut tiles across blocks: partial results added up in order, scales, rounding.
#pragma once

#include "decode.cuh"
#include "prepare.cuh"
#include "schedule.cuh"

namespace ccq {

struct GemmParams {
  const int64_t* offsets;
  const uint8_t* quant;
  const uint8_t* scales;
  const uint32_t* columns;
  Prepared prepared;
  float4* partial;
  void* out;
  int rows, k, n, experts, dtype;
};

template <typename C, int kNT>
struct Accumulator {
  float o[C::kR][kNT][4];
};

// A finished tile: super scale (and the 2^24 of the subnormals), the row's scale, rounding, output.
template <typename C, int kNT, typename W>
__device__ void write_out(W& w, const Tile& tile, const float (&super)[C::kR][2], Accumulator<C, kNT>& acc) {
  const GemmParams& p = w.p;
  const int g = w.lane / 4, t = w.lane % 4;
#pragma unroll
  for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = nt * 8 + 2 * t + i;
      if (token >= tile.rows) continue;
      const float row_scale = p.prepared.row_scale[tile.row + token];
      const size_t base = static_cast<size_t>(tile.row + token) * p.n;
#pragma unroll
      for (int r = 0; r < C::kR; ++r) {
        const int t16 = w.tile16(tile.column_tile) + r;
        if (t16 >= w.tiles_n) continue;
        store(p.out, p.dtype, base + t16 * 16 + g, acc.o[r][nt][i] * super[r][0] * row_scale);
        store(p.out, p.dtype, base + t16 * 16 + g + 8, acc.o[r][nt][2 + i] * super[r][1] * row_scale);
      }
    }
}

// Leaves this block's share of a tile in the workspace. True in the last block to do so, with the tile's sum in `acc`.
template <typename C, int kNT, typename W>
__device__ bool combine(W& w, int rows, int first_block, int last_block, Accumulator<C, kNT>& acc) {
  const GemmParams& p = w.p;
  // A block has at most two shared tiles: the one that its stretch begins in (slot 0) and the one it ends in (slot 1).
  auto at = [&](int block) {
    return p.partial + (static_cast<size_t>(block * 2 + (block == first_block)) * C::kWarps + w.warp) *
                           (C::kPartialFloat4 / C::kWarps) + w.lane;
  };
  float4* mine = at(blockIdx.x);
  // Only the rows that the tile has: most tiles of a decoding step have one or two.
  auto has = [&](int nt) { return nt * 8 + w.lane % 4 * 2 < rows; };
#pragma unroll
  for (int r = 0; r < C::kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      const float* o = acc.o[r][nt];
      if (has(nt)) __stcg(mine + (r * kNT + nt) * 32, make_float4(o[0], o[1], o[2], o[3]));
    }
  __threadfence();
  __syncwarp();
  int arrived = 0;
  if (w.lane == 0) arrived = atomicAdd(p.prepared.tickets + first_block * C::kWarps + w.warp, 1);
  arrived = __shfl_sync(~0u, arrived, 0);
  if (arrived != last_block - first_block) return false;
  __threadfence();
#pragma unroll
  for (int r = 0; r < C::kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc.o[r][nt][i] = 0.f;
  // Several blocks' results on their way at once; added in order.
  constexpr int kBatch = kNT == 1 ? 4 : 1;
  for (int base = first_block; base <= last_block; base += kBatch) {
    float4 v[kBatch][C::kR * kNT];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float4* from = at(min(base + i, last_block));
#pragma unroll
      for (int j = 0; j < C::kR * kNT; ++j) v[i][j] = __ldcg(from + j * 32);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < C::kR * kNT; ++j) {
        float* o = acc.o[j / kNT][j % kNT];
        if (base + i <= last_block) o[0] += v[i][j].x, o[1] += v[i][j].y, o[2] += v[i][j].z, o[3] += v[i][j].w;
      }
  }
  return true;
}

}  // namespace ccq
