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

// Blocks that share a tile, about: its owner reads all their sums.
constexpr int kMostShares = 16;

// The line of units, see the head of this file. What it needs to know lies in shared memory and in the kernel's parameters,
// so that a Line costs no registers where it is not used.
template <typename C>
struct Line {
  struct Header {
    int64_t total;  // weight of all units
    int grid;       // blocks that have a stretch
    int whole;      // tiles are not cut: short columns
  };
  char* const memory;  // shared_bytes
  const int experts, column_tiles, blocks_k;

  static constexpr size_t shared_bytes(int experts) { return sizeof(Header) + 3 * sizeof(int) * (experts + 1); }
  __device__ Header& header() const { return *reinterpret_cast<Header*>(memory); }
  // Prefix sums over experts: of row blocks (of C::kTileTokens rows), rows, the weights of one unit of each row block.
  __device__ int* blocks() const { return reinterpret_cast<int*>(memory + sizeof(Header)); }
  __device__ int* rows() const { return blocks() + experts + 1; }
  __device__ int* weights() const { return rows() + experts + 1; }

  // Once, by all threads: the first warp works it out, each lane for a run of experts.
  __device__ void prepare(const int64_t* offsets, int all_rows) const {
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
      if (lane == 31) {
        Header& h = header();
        h.total = static_cast<int64_t>(all_weights) * column_tiles * blocks_k;
        // At least a unit for each block that takes part, for a tile's owner waits for all that lie between.
        const int64_t most = min(static_cast<int64_t>(gridDim.x), static_cast<int64_t>(counts) * column_tiles * kMostShares);
        h.grid = static_cast<int>(min(most, h.total / C::kMostWeight));
        h.grid = h.total > 0 ? max(h.grid, 1) : 0;
        h.whole = blocks_k <= 8 && counts * column_tiles >= h.grid / 2;
      }
      if (lane == 0) blocks()[0] = rows()[0] = weights()[0] = 0;
      count = counts - count, weight = all_weights - weight, before = start;
#pragma unroll 8
      for (int e = first; e < last; ++e) {
        add(end_of(e));
        blocks()[e + 1] = count, rows()[e + 1] = before, weights()[e + 1] = weight;
      }
    }
    __syncthreads();
  }

  __device__ int rows_of(int expert, int block) const {
    return min(C::kTileTokens, rows()[expert + 1] - rows()[expert] - block * C::kTileTokens);
  }
  // The block in whose stretch a unit lies: the last one that does not begin behind it.
  __device__ int owner(int expert, int column, int block, int kb) const {
    const int before = weights()[expert];
    const int64_t units = static_cast<int64_t>(before) * column_tiles + column * (weights()[expert + 1] - before) +
                          block * C::weight(C::kTileTokens);
    return static_cast<int>((units * blocks_k + kb * C::weight(rows_of(expert, block))) * header().grid / header().total);
  }
};

// A part of a tile: `kb` to `kb_end` of its blocks of 128 input rows.
struct Part {
  int expert, column, block, kb, kb_end;
  int row, rows;       // of the tile
  int prepared_block;  // its first block of 8 prepared rows
};

// A place on the line, and how many units are to come from there. All of it is the same in all lanes, and worked out so
// that the compiler sees it (no lane works for another one): such values have registers and an arithmetic of their own.
template <typename C>
struct Walk {
  int expert, column, block, count, kb, left;  // count: the expert's blocks of rows

  // The beginning of a block's stretch: the first unit whose position is not before the block's share.
  __device__ explicit Walk(const Line<C>& line) {
    const int end = go_to(line, blockIdx.x + 1);
    left = end - go_to(line, blockIdx.x);
  }
  // Returns the number of the unit on the line.
  __device__ int go_to(const Line<C>& line, int64_t of) {
    const typename Line<C>::Header& header = line.header();
    const int64_t at = (of * header.total + header.grid - 1) / header.grid;
    const int per_weight = line.column_tiles * line.blocks_k, weight = static_cast<int>(at / per_weight);
    int low = 0, high = line.experts;  // the first expert that ends behind `at`
    while (low < high) {
      const int mid = (low + high) / 2;
      if (line.weights()[mid + 1] > weight) high = mid; else low = mid + 1;
    }
    expert = low, column = block = count = kb = 0, left = 2;
    if (expert == line.experts) return line.blocks()[line.experts] * per_weight;
    count = line.blocks()[expert + 1] - line.blocks()[expert];
    const int of_column = (line.weights()[expert + 1] - line.weights()[expert]) * line.blocks_k;
    int rest = static_cast<int>(at - static_cast<int64_t>(line.weights()[expert]) * per_weight);
    column = rest / of_column, rest -= column * of_column;
    const int of_block = C::weight(C::kTileTokens) * line.blocks_k;
    block = min(rest / of_block, count - 1), rest -= block * of_block;
    const int own = C::weight(line.rows_of(expert, block));
    kb = (rest + own - 1) / own;
    if (header.whole && kb > 0) kb = line.blocks_k;
    if (kb == line.blocks_k) next_tile(line);
    return ((line.blocks()[expert] * line.column_tiles) + column * count + block) * line.blocks_k + kb;
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
      count = line.blocks()[expert + 1] - line.blocks()[expert];
    } while (count == 0);
  }
  // What this stretch has of the tile from here on.
  __device__ Part part(const Line<C>& line) const {
    const int start = line.rows()[expert];
    return {expert, column, block, kb, min(line.blocks_k, kb + left), start + block * C::kTileTokens,
            line.rows_of(expert, block), first_prepared_block(start, expert) + block * (C::kTileTokens / 8)};
  }
};

}  // namespace ccq
