// SPDX-License-Identifier: Apache-2.0
// Who computes what when there are many rows an expert: tiles by their number of rows, in waves over the blocks.
//
// A tile multiplies its rows in steps of kN / kClasses, so tiles with few rows take less time. All tiles stand in one line: first
// those of the most steps, in the order of experts, columns and blocks of rows, then those of one step less, and so on. Each
// wave of blocks takes the next tiles of the line. So neighbours read the same weights and the same rows at the same time, and
// the cache serves all but the first; and the blocks' sums of time differ by less than one tile, for what a block takes
// costs no less than what the block after it takes, and that no less than what it takes in the next wave. What is left after the
// last full wave is cut along K into equal stretches.
#pragma once

#include "stream_k.cuh"

namespace ccq {

// A work tile (stream_k.cuh), and the number of its tile in the order of the tiles.
struct WideWorkTile : WorkTile {
  int tile;
};

// The line of tiles. What it needs to know lies in shared memory and in the kernel's parameters.
template <typename C>
struct TileLine {
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
        int sum = count[c];
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
          const int other = __shfl_up_sync(~0u, sum, d);
          if (lane >= d) sum += other;
        }
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

// A block's place on the line.
template <typename C>
struct Waves {
  int expert, column, block, kb, left;  // as in Walk
  int tile, whole;                      // number on the line; whole tiles to come, this one included

  // Tiles after the last full wave. Short columns are not cut: the first blocks take one more.
  __device__ static int rest(const TileLine<C>& line) {
    return line.blocks_k <= 8 ? 0 : line.tiles() % static_cast<int>(gridDim.x);
  }
  // Blocks that share them: each has a unit at least, a tile's owner waits for them, and not more than 8 a tile.
  __device__ static int sharers(const TileLine<C>& line) {
    return min(static_cast<int>(gridDim.x), rest(line) * min(8, line.blocks_k));
  }
  // Where a sharer's stretch begins, in units.
  __device__ static int stretch(const TileLine<C>& line, int of) {
    return static_cast<int>(static_cast<int64_t>(of) * rest(line) * line.blocks_k / sharers(line));
  }
  // The block that has a unit of a split tile.
  __device__ static int owner(const TileLine<C>& line, const WideWorkTile& work, int kb) {
    const int cut = rest(line), unit = (work.tile - (line.tiles() - cut)) * line.blocks_k + kb;
    return static_cast<int>((static_cast<int64_t>(unit + 1) * sharers(line) - 1) / (cut * line.blocks_k));
  }

  __device__ explicit Waves(const TileLine<C>& line) {
    const int grid = gridDim.x, own = blockIdx.x, cut = rest(line), all = line.tiles() - cut;
    whole = all / grid + (own < all % grid), left = whole * line.blocks_k, kb = 0, tile = own;
    if (cut > 0 && own < sharers(line)) left += stretch(line, own + 1) - stretch(line, own);
    expert = column = block = 0;
    if (whole > 0) go_to(line);
    else if (left > 0) begin_stretch(line);
  }
  __device__ void go_to(const TileLine<C>& line) {
    int local = tile, c = 0;
    while (c < C::kClasses - 1 && local >= line.blocks(c)[line.experts] * line.column_tiles)
      local -= line.blocks(c++)[line.experts] * line.column_tiles;
    const int* const blocks = line.blocks(c);
    int low = 0, high = line.experts - 1;
    while (low < high) {
      const int mid = (low + high) / 2;
      if (local < blocks[mid + 1] * line.column_tiles) high = mid; else low = mid + 1;
    }
    const int count = blocks[low + 1] - blocks[low];
    expert = low, local -= blocks[low] * line.column_tiles;
    column = local / count, block = local - column * count;
    if (c > 0) block = (line.rows()[low + 1] - line.rows()[low]) / C::kN;  // an expert's last
  }
  __device__ void begin_stretch(const TileLine<C>& line) {
    const int unit = stretch(line, blockIdx.x), tiles_in = unit / line.blocks_k;
    tile = line.tiles() - rest(line) + tiles_in, kb = unit - tiles_in * line.blocks_k;
    go_to(line);
  }
  __device__ void next_tile(const TileLine<C>& line) {
    kb = 0;
    if (left <= 0) return;
    if (whole == 0) ++tile, go_to(line);
    else if (--whole > 0) tile += gridDim.x, go_to(line);
    else begin_stretch(line);
  }
  __device__ void next(const TileLine<C>& line) {
    --left;
    if (++kb >= line.blocks_k) next_tile(line);
  }
  // What this block has of the tile from here on.
  __device__ WideWorkTile work_tile(const TileLine<C>& line) const {
    const int start = line.rows()[expert], rows = line.rows()[expert + 1] - start;
    WideWorkTile p;
    p.expert = expert, p.column = column, p.block = block, p.kb = kb, p.kb_end = min(line.blocks_k, kb + left);
    p.row = start + block * C::kN, p.rows = min(C::kN, rows - block * C::kN);
    p.prepared_block = 0, p.tile = tile;
    return p;
  }
};

}  // namespace ccq
