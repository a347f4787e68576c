// SPDX-License-Identifier: Apache-2.0
// Who computes what in the grouped GEMM: tiles over experts, and the line of units that blocks share.
//
// A tile is (expert, a block's columns, a block's rows); a unit is a tile's next 128 input rows. All units of all tiles
// form one line: experts, then columns, then blocks of rows (so that blocks reading the same weights stand next to each
// other), then K. Each block takes a stretch of it. A unit with more rows takes longer; so units have weights, and
// stretches have equal weight: all SMs end together whatever the routing. A tile that lies in several stretches is summed
// from partial results (output.cuh).
#pragma once

#include "prepare.cuh"

namespace ccq {

// The expert of a block of rows: as many as end at or before it. All lanes of a warp together.
__device__ inline int expert_of_block(const int* blocks, int experts, int block) {
  int expert = 0;
  for (int base = 0; base < experts; base += 32) {
    const int e = base + static_cast<int>(threadIdx.x % 32);
    expert += __popc(__ballot_sync(~0u, e < experts && blocks[e + 1] <= block));
  }
  return expert;
}

// Prefix sums over experts in shared memory: of row blocks (of C::kTileTokens rows), rows, and the weights of one unit of
// each row block. By the first warp for all threads; each lane takes a run of experts.
template <typename C>
__device__ void scan_offsets(const int64_t* offsets, int experts, int all_rows, int* blocks, int* rows, int* weights = nullptr) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x, run = (experts + 31) / 32, first = lane * run, last = min(first + run, experts);
    auto end_of = [&](int e) { return e < 0 ? 0 : offsets ? static_cast<int>(offsets[e]) : all_rows; };
    const int start = first < experts ? end_of(first - 1) : 0;
    int count = 0, weight = 0, before = start;
    auto add = [&](int end) {
      const int full = (end - before) / C::kTileTokens, rest = (end - before) % C::kTileTokens;
      count += full + (rest > 0), weight += full * C::weight(C::kTileTokens) + (rest > 0 ? C::weight(rest) : 0);
      before = end;
    };
#pragma unroll 8
    for (int e = first; e < last; ++e) add(end_of(e));
    int counts = count, all_weights = weight;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, counts, d), others = __shfl_up_sync(~0u, all_weights, d);
      if (lane >= d) counts += other, all_weights += others;
    }
    if (lane == 0) blocks[0] = rows[0] = 0;
    if (lane == 0 && weights) weights[0] = 0;
    count = counts - count, weight = all_weights - weight, before = start;
#pragma unroll 8
    for (int e = first; e < last; ++e) {
      add(end_of(e));
      blocks[e + 1] = count, rows[e + 1] = before;
      if (weights) weights[e + 1] = weight;
    }
  }
  __syncthreads();
}

// A tile's rows.
struct Tile {
  int row, rows, column_tile;
  int block;  // its first block of 8 prepared rows
};

// The line of units; see the head of this file.
template <typename C>
struct Line {
  const int *blocks, *rows, *weights;  // scan_offsets
  int column_tiles, blocks_k, experts, grid;  // grid: blocks that have a stretch
  bool whole;                                 // tiles are not cut: short columns
  int64_t total;

  __device__ Line(const int* blocks_, const int* rows_, const int* weights_, int experts_, int column_tiles_, int blocks_k_)
      : blocks(blocks_), rows(rows_), weights(weights_), column_tiles(column_tiles_), blocks_k(blocks_k_), experts(experts_) {
    total = static_cast<int64_t>(weights[experts]) * column_tiles * blocks_k;
    // At least a unit for each block that takes part, for a tile's owner waits for all that lie between.
    grid = static_cast<int>(min(static_cast<int64_t>(gridDim.x), total / C::kMostWeight));
    grid = total > 0 ? max(grid, 1) : 0;
    whole = blocks_k <= 8 && blocks[experts] * column_tiles >= grid / 2;
  }
  __device__ int rows_of(int expert, int block) const {
    return min(C::kTileTokens, rows[expert + 1] - rows[expert] - block * C::kTileTokens);
  }
  // Position of a unit: the weight of all before it.
  __device__ int64_t position(int expert, int column, int block, int kb) const {
    const int64_t units = static_cast<int64_t>(weights[expert]) * column_tiles + column * (weights[expert + 1] - weights[expert]) +
                          block * C::weight(C::kTileTokens);
    return units * blocks_k + kb * C::weight(rows_of(expert, block));
  }
  // The block in whose stretch a unit lies: the last one that does not begin behind it.
  __device__ int owner(int expert, int column, int block, int kb) const {
    return static_cast<int>(position(expert, column, block, kb) * grid / total);
  }
};

// A place on the line, and how many units are to come from there.
template <typename C>
struct Walk {
  int expert, column, block, count, kb, left;  // count: the expert's blocks of rows

  // The beginning of a block's stretch: the first unit whose position is not before the block's share. In lanes 0 and 1
  // of each warp for this block and the next one.
  __device__ explicit Walk(const Line<C>& line) {
    const int of = static_cast<int>(blockIdx.x + threadIdx.x % 2);
    const int64_t at = (of * line.total + line.grid - 1) / line.grid;
    const int per_weight = line.column_tiles * line.blocks_k, weight = static_cast<int>(at / per_weight);
    int low = 0, high = line.experts;  // the first expert that ends behind `at`
    while (low < high) {
      const int mid = (low + high) / 2;
      if (line.weights[mid + 1] > weight) high = mid; else low = mid + 1;
    }
    expert = low, column = block = count = kb = left = 0;
    int unit;
    if (expert < line.experts) {
      count = line.blocks[expert + 1] - line.blocks[expert];
      const int of_column = (line.weights[expert + 1] - line.weights[expert]) * line.blocks_k;
      int rest = static_cast<int>(at - static_cast<int64_t>(line.weights[expert]) * per_weight);
      column = rest / of_column, rest -= column * of_column;
      const int of_block = C::weight(C::kTileTokens) * line.blocks_k;
      block = min(rest / of_block, count - 1), rest -= block * of_block;
      const int own = C::weight(line.rows_of(expert, block));
      kb = (rest + own - 1) / own;
      if (line.whole && kb > 0) kb = line.blocks_k;
      left = 2, --kb, next(line);  // through the end of a tile, where it has come to that
      unit = ((line.blocks[expert] * line.column_tiles) + column * count + block) * line.blocks_k + kb;
    } else {
      unit = line.blocks[line.experts] * per_weight;
    }
    expert = __shfl_sync(~0u, expert, 0), column = __shfl_sync(~0u, column, 0), block = __shfl_sync(~0u, block, 0);
    count = __shfl_sync(~0u, count, 0), kb = __shfl_sync(~0u, kb, 0);
    left = __shfl_sync(~0u, unit, 1) - __shfl_sync(~0u, unit, 0);
  }

  // To the next unit.
  __device__ void next(const Line<C>& line) {
    --left;
    if (++kb >= line.blocks_k) next_tile(line);
  }
  __device__ void next_tile(const Line<C>& line) {
    kb = 0;
    if (++block < count) return;
    block = 0;
    if (++column < line.column_tiles || left <= 0) return;
    column = 0;
    do {
      if (++expert >= line.experts) return;
      count = line.blocks[expert + 1] - line.blocks[expert];
    } while (count == 0);
  }
  // Over a tile's units up to `kb_end`.
  __device__ void skip(const Line<C>& line, int kb_end) {
    left -= kb_end - kb;
    if (kb_end == line.blocks_k) next_tile(line); else kb = kb_end;
  }
  __device__ Tile tile(const Line<C>& line) const {
    const int start = line.rows[expert];
    return {start + block * C::kTileTokens, line.rows_of(expert, block), column,
            first_prepared_block(start, expert) + block * (C::kTileTokens / 8)};
  }
};

}  // namespace ccq
