// SPDX-License-Identifier: Apache-2.0
// Who computes what in the grouped GEMM: tiles over experts, and the line of units that blocks share.
//
// A tile is (expert, a block's columns, a block's rows); a unit is a tile's next 128 input rows. All units of all tiles
// form one line, tile after tile, and each block takes an equal stretch of it, so that all SMs end together whatever the
// routing. A tile that lies in several stretches is summed from partial results (moe_gemm.cuh).
#pragma once

#include "prepare.cuh"

namespace ccq {

// Where a tile lies. Tiles run over experts, then columns, then blocks of rows, so that blocks reading the same weights
// stand next to each other.
struct Tile {
  int expert, column_tile, row, rows;
  int block;  // its first block of 8 prepared rows
};

// Prefix sums over experts, in shared memory.
struct Routing {
  const int* blocks;  // [experts + 1] row blocks before an expert
  const int* rows;    // [experts + 1] rows before an expert
  int column_tiles;

  __device__ Tile find(int tile, int expert, int tile_tokens) const {
    while (tile >= blocks[expert + 1] * column_tiles) ++expert;
    int local = tile - blocks[expert] * column_tiles, count = blocks[expert + 1] - blocks[expert];
    int column = local / count, block = local - column * count;
    int row = rows[expert] + block * tile_tokens;
    return {expert, column, row, min(tile_tokens, rows[expert + 1] - row),
            first_prepared_block(rows[expert], expert) + block * (tile_tokens / 8)};
  }
  __device__ int expert_of(int tile, int experts) const {
    int low = 0, high = experts - 1;
    while (low < high) {
      int mid = (low + high) / 2;
      if (tile < blocks[mid + 1] * column_tiles) high = mid; else low = mid + 1;
    }
    return low;
  }
};

// The expert of a block of rows: as many as end at or before it. All lanes of a warp together.
__device__ inline int expert_of_block(const int* blocks, int experts, int block) {
  int expert = 0;
  for (int base = 0; base < experts; base += 32) {
    const int e = base + static_cast<int>(threadIdx.x % 32);
    expert += __popc(__ballot_sync(~0u, e < experts && blocks[e + 1] <= block));
  }
  return expert;
}

// Prefix sums of row blocks (of kTileRows) and rows, by the first warp for all threads. Each lane takes a run of experts.
template <int kTileRows>
__device__ void scan_offsets(const int64_t* offsets, int experts, int all_rows, int* blocks, int* rows) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x, run = (experts + 31) / 32, first = lane * run, last = min(first + run, experts);
    auto end_of = [&](int e) { return e < 0 ? 0 : offsets ? static_cast<int>(offsets[e]) : all_rows; };
    auto blocks_of = [](int count) { return (count + kTileRows - 1) / kTileRows; };
    const int start = first < experts ? end_of(first - 1) : 0;
    int sum = 0, before = start;
#pragma unroll 8
    for (int e = first; e < last; ++e) {
      const int end = end_of(e);
      sum += blocks_of(end - before), before = end;
    }
    int after = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, after, d);
      if (lane >= d) after += other;
    }
    if (lane == 0) blocks[0] = rows[0] = 0;
    sum = after - sum, before = start;
#pragma unroll 8
    for (int e = first; e < last; ++e) {
      const int end = end_of(e);
      sum += blocks_of(end - before), before = end;
      blocks[e + 1] = sum, rows[e + 1] = end;
    }
  }
  __syncthreads();
}

// Parts that a tile's K may be cut into. Cutting anywhere balances best and costs two partial results a block: right for
// long runs. When there are few tiles, up to 8 parts that give (nearly) every block an equal number, so that a tile's
// last block has few partial results to fetch. Short columns are never cut.
__device__ inline int parts_of(int tiles, int blocks_k, int grid) {
  if (blocks_k <= 8 && tiles >= grid / 2) return 1;
  if (tiles > grid) return blocks_k <= 8 ? 1 : blocks_k;
  for (int parts = 1; parts <= min(blocks_k, 8); ++parts) {
    const int work = tiles * parts, waves = (work + grid - 1) / grid;
    if (work * 100 >= waves * grid * 93) return parts;
  }
  return tiles * 8 <= grid ? min(blocks_k, 8) : blocks_k;
}

// The stretches: of `total` parts each of `grid` blocks takes the same number, the first ones one more.
struct Split {
  int each, longer;
  __device__ Split(int total, int grid) : each(total / grid), longer(total - each * grid) {}
  __device__ int begin(int block) const { return block * each + min(block, longer); }
  __device__ int owner(int part) const {
    const int border = longer * (each + 1);
    return part < border ? part / (each + 1) : longer + (part - border) / each;
  }
};

}  // namespace ccq
