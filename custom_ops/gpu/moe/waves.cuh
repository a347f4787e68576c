// SPDX-License-Identifier: Apache-2.0
// Tile scheduler for many rows an expert (moe_wide.cuh): whole tiles in waves, the longest first, and stream-K for the rest.
//
// A tile multiplies its rows in steps of kN / kClasses, so tiles with few rows take less time. The tiles are ordered by that: first
// those of the most steps, in the order of experts, columns and blocks of rows, then those of one step less, and so on. Each
// wave of blocks takes the next tiles in this order. So neighbours read the same weights and the same rows at the same time, and
// the cache serves all but the first; and the blocks' sums of time differ by less than one tile, for what a block takes
// costs no less than what the block after it takes, and that no less than what it takes in the next wave. The tiles that are left
// after the last full wave are split along K: blocks take equal ranges of their units (stream-K).
#pragma once

#include "stream_k.cuh"
#include "warp_scan.cuh"

namespace ccq {

// A work tile (stream_k.cuh), and the number of its tile in the order of the tiles.
struct WideWorkTile : WorkTile {
  int tile;
};

// The order of the tiles. Its state lies in shared memory and in the kernel's parameters.
template <typename C>
struct WaveSchedule {
  static constexpr int kClasses = C::kClasses, kStep = C::kN / kClasses;
  char* const memory;  // shared_bytes
  const int experts, column_tiles, blocks_k;

  static constexpr size_t shared_bytes(int experts) { return sizeof(int) * (kClasses + 1) * (experts + 1); }
  // Prefix sums over experts: blocks of rows in class c (0: the most steps), and rows.
  __device__ int* blocks(int c) const { return reinterpret_cast<int*>(memory) + c * (experts + 1); }
  __device__ int* rows() const { return blocks(kClasses); }
  __device__ static int class_of(int rows) { return kClasses - (rows + kStep - 1) / kStep; }

  // Once, by all threads: the first warp works it out, each lane for a run of experts.
  __device__ void prepare(const int64_t* offsets, int all_rows) const {
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x, run = (experts + 31) / 32, first = lane * run, last = min(first + run, experts);
      auto end_of = [&](int e) { return e < 0 ? 0 : offsets ? static_cast<int>(offsets[e]) : all_rows; };
      const int start = first < experts ? end_of(first - 1) : 0;
      int count[kClasses] = {}, before = start;
      auto add = [&](int end) {
        const int full = (end - before) / C::kN, rest = (end - before) % C::kN, own = rest > 0 ? class_of(rest) : -1;
#pragma unroll
        for (int c = 0; c < kClasses; ++c) count[c] += (c == 0 ? full : 0) + (c == own);
        before = end;
      };
#pragma unroll 4
      for (int e = first; e < last; ++e) add(end_of(e));
#pragma unroll
      for (int c = 0; c < kClasses; ++c) {
        const int sum = prefix_sum(lane, count[c]);
        count[c] = sum - count[c];
        if (lane == 0) blocks(c)[0] = 0;
      }
      if (lane == 0) rows()[0] = 0;
      before = start;
#pragma unroll 4
      for (int e = first; e < last; ++e) {
        add(end_of(e));
#pragma unroll
        for (int c = 0; c < kClasses; ++c) blocks(c)[e + 1] = count[c];
        rows()[e + 1] = before;
      }
    }
    __syncthreads();
  }
  __device__ int tiles() const {
    int sum = 0;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) sum += blocks(c)[experts];
    return sum * column_tiles;
  }
};

// A block's position in the order of the tiles.
template <typename C>
struct WaveIterator {
  int expert, column, block, kb, left;  // as in UnitIterator
  int tile, whole;                      // number in the order of the tiles; whole tiles to come, this one included

  // Tiles after the last full wave. They are not split where K is short: the first blocks take one more.
  __device__ static int remainder(const WaveSchedule<C>& schedule) {
    return schedule.blocks_k <= 8 ? 0 : schedule.tiles() % static_cast<int>(gridDim.x);
  }
  // Blocks that split them: each has a unit at least, since a tile's owner waits for them, and a tile has at most 8.
  __device__ static int stream_k_blocks(const WaveSchedule<C>& schedule) {
    return min(static_cast<int>(gridDim.x), remainder(schedule) * min(8, schedule.blocks_k));
  }
  // Where the range of block `of` begins, in units of the remaining tiles.
  __device__ static int first_unit(const WaveSchedule<C>& schedule, int of) {
    return static_cast<int>(static_cast<int64_t>(of) * remainder(schedule) * schedule.blocks_k / stream_k_blocks(schedule));
  }
  // The block that has a unit of a split tile.
  __device__ static int owner(const WaveSchedule<C>& schedule, const WideWorkTile& work, int kb) {
    const int split_tiles = remainder(schedule), unit = (work.tile - (schedule.tiles() - split_tiles)) * schedule.blocks_k + kb;
    return static_cast<int>((static_cast<int64_t>(unit + 1) * stream_k_blocks(schedule) - 1) / (split_tiles * schedule.blocks_k));
  }

  __device__ explicit WaveIterator(const WaveSchedule<C>& schedule) {
    const int grid = gridDim.x, own = blockIdx.x, split_tiles = remainder(schedule), all = schedule.tiles() - split_tiles;
    whole = all / grid + (own < all % grid), left = whole * schedule.blocks_k, kb = 0, tile = own;
    if (split_tiles > 0 && own < stream_k_blocks(schedule)) left += first_unit(schedule, own + 1) - first_unit(schedule, own);
    expert = column = block = 0;
    if (whole > 0) seek(schedule);
    else if (left > 0) begin_split(schedule);
  }
  __device__ void seek(const WaveSchedule<C>& schedule) {
    int local = tile, c = 0;
    while (c < C::kClasses - 1 && local >= schedule.blocks(c)[schedule.experts] * schedule.column_tiles)
      local -= schedule.blocks(c++)[schedule.experts] * schedule.column_tiles;
    const int* const blocks = schedule.blocks(c);
    int low = 0, high = schedule.experts - 1;
    while (low < high) {
      const int mid = (low + high) / 2;
      if (local < blocks[mid + 1] * schedule.column_tiles) high = mid; else low = mid + 1;
    }
    const int count = blocks[low + 1] - blocks[low];
    expert = low, local -= blocks[low] * schedule.column_tiles;
    column = local / count, block = local - column * count;
    if (c > 0) block = (schedule.rows()[low + 1] - schedule.rows()[low]) / C::kN;  // an expert's last
  }
  __device__ void begin_split(const WaveSchedule<C>& schedule) {
    const int unit = first_unit(schedule, blockIdx.x), tiles_in = unit / schedule.blocks_k;
    tile = schedule.tiles() - remainder(schedule) + tiles_in, kb = unit - tiles_in * schedule.blocks_k;
    seek(schedule);
  }
  __device__ void next_tile(const WaveSchedule<C>& schedule) {
    kb = 0;
    if (left <= 0) return;
    if (whole == 0) ++tile, seek(schedule);
    else if (--whole > 0) tile += gridDim.x, seek(schedule);
    else begin_split(schedule);
  }
  __device__ void next(const WaveSchedule<C>& schedule) {
    --left;
    if (++kb >= schedule.blocks_k) next_tile(schedule);
  }
  // What this block has of the tile from here on.
  __device__ WideWorkTile work_tile(const WaveSchedule<C>& schedule) const {
    const int start = schedule.rows()[expert], rows = schedule.rows()[expert + 1] - start;
    WideWorkTile p;
    p.expert = expert, p.column = column, p.block = block, p.kb = kb, p.kb_end = min(schedule.blocks_k, kb + left);
    p.row = start + block * C::kN, p.rows = min(C::kN, rows - block * C::kN);
    p.prepared_block = 0, p.tile = tile;
    return p;
  }
};

}  // namespace ccq
