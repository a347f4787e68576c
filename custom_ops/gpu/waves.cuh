// SPDX-License-Identifier: Apache-2.0
// Who computes what when there are many rows an expert: tiles in waves, so that blocks share what they read.
//
// With several tiles a block the line of schedule.cuh would set the blocks down far apart, each with an expert of its own,
// and every tile would come from memory. Here each wave of blocks takes the next tiles of the line: neighbours read the
// same weights and the same rows at the same time, and the cache serves all but the first. What is left after the last
// full wave is cut along K into equal stretches, as on the line.
#pragma once

#include "schedule.cuh"

namespace ccq {

template <typename C>
struct Waves {
  int expert, column, block, count, kb, left;  // as in Walk
  int tile, whole;                             // number on the line; whole tiles to come, this one included

  __device__ static int tiles(const Line<C>& line) { return line.blocks()[line.experts] * line.column_tiles; }
  // Tiles after the last full wave. Short columns are not cut: the first blocks take one more.
  __device__ static int rest(const Line<C>& line) {
    return line.blocks_k <= 8 ? 0 : tiles(line) % static_cast<int>(gridDim.x);
  }
  // Blocks that share them: each has a unit at least, a tile's owner waits for them, and not more than 8 a tile.
  __device__ static int sharers(const Line<C>& line) {
    return min(static_cast<int>(gridDim.x), rest(line) * min(8, line.blocks_k));
  }
  // Where a sharer's stretch begins, in units.
  __device__ static int stretch(const Line<C>& line, int of) {
    return static_cast<int>(static_cast<int64_t>(of) * rest(line) * line.blocks_k / sharers(line));
  }
  // The block that has a unit of a part's tile, which is cut.
  __device__ static int owner(const Line<C>& line, const Part& part, int kb) {
    const int in_expert = line.blocks()[part.expert + 1] - line.blocks()[part.expert];
    const int tile = line.blocks()[part.expert] * line.column_tiles + part.column * in_expert + part.block;
    const int unit = (tile - (tiles(line) - rest(line))) * line.blocks_k + kb;
    return static_cast<int>((static_cast<int64_t>(unit + 1) * sharers(line) - 1) / (rest(line) * line.blocks_k));
  }

  __device__ explicit Waves(const Line<C>& line) {
    const int grid = gridDim.x, own = blockIdx.x, cut = rest(line), all = tiles(line) - cut;
    whole = all / grid + (own < all % grid), left = whole * line.blocks_k, kb = 0, tile = own;
    if (cut > 0 && own < sharers(line)) left += stretch(line, own + 1) - stretch(line, own);
    expert = column = block = count = 0;
    if (whole > 0) go_to(line);
    else if (left > 0) begin_stretch(line);
  }
  __device__ void go_to(const Line<C>& line) {
    int low = 0, high = line.experts - 1;
    while (low < high) {
      const int mid = (low + high) / 2;
      if (tile < line.blocks()[mid + 1] * line.column_tiles) high = mid; else low = mid + 1;
    }
    expert = low, count = line.blocks()[low + 1] - line.blocks()[low];
    const int local = tile - line.blocks()[low] * line.column_tiles;
    column = local / count, block = local - column * count;
  }
  __device__ void begin_stretch(const Line<C>& line) {
    const int unit = stretch(line, blockIdx.x), tiles_in = unit / line.blocks_k;
    tile = tiles(line) - rest(line) + tiles_in, kb = unit - tiles_in * line.blocks_k;
    go_to(line);
  }
  __device__ void next_tile(const Line<C>& line) {
    kb = 0;
    if (left <= 0) return;
    if (whole == 0) ++tile, go_to(line);
    else if (--whole > 0) tile += gridDim.x, go_to(line);
    else begin_stretch(line);
  }
  __device__ void next(const Line<C>& line) {
    --left;
    if (++kb >= line.blocks_k) next_tile(line);
  }
  // What this block has of the tile from here on.
  __device__ Part part(const Line<C>& line) const {
    const int start = line.rows()[expert];
    return {expert, column, block, kb, min(line.blocks_k, kb + left), start + block * C::kTileTokens,
            line.rows_of(expert, block), first_prepared_block(start, expert) + block * (C::kTileTokens / 8)};
  }
};

}  // namespace ccq
