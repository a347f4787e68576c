// SPDX-License-Identifier: Apache-2.0
// Stream-K scheduler of the grouped GEMM (moe_gemm.cuh): which thread block computes which part of which tile.
//
// A tile is (expert, a block's columns, a block's rows); a unit is a tile's next 128 input rows, one iteration of the main
// loop. All units of all tiles have one order: experts, then columns, then blocks of rows (so that blocks that read the same
// weights are neighbours), then K. Each thread block takes a contiguous range of units. A unit with more rows takes longer;
// so units have weights, and ranges have equal weight: all SMs end together whatever the routing. A tile that lies in several
// ranges is split along K: its partial results are added up in the epilogue (epilogue.cuh).
#pragma once

#include "prepare.cuh"

namespace ccq {

// The most blocks that split a tile, about: its owner reads all their partial results.
constexpr int kMaxSplits = 16;

// The order of the units, see the head of this file. Its state lies in shared memory and in the kernel's parameters, so that
// a StreamK costs no registers where it is not used.
template <typename C>
struct StreamK {
  struct Header {
    int64_t total;  // weight of all units
    int grid;       // blocks that have a range of units
    int whole;      // tiles are not split: K is short
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
        const int64_t most = min(static_cast<int64_t>(gridDim.x), static_cast<int64_t>(counts) * column_tiles * kMaxSplits);
        h.grid = static_cast<int>(min(most, h.total / C::kMaxWeight));
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
  // The block in whose range a unit lies: the last one that does not begin after it.
  __device__ int owner(int expert, int column, int block, int kb) const {
    const int before = weights()[expert];
    const int64_t units = static_cast<int64_t>(before) * column_tiles + column * (weights()[expert + 1] - before) +
                          block * C::weight(C::kTileTokens);
    return static_cast<int>((units * blocks_k + kb * C::weight(rows_of(expert, block))) * header().grid / header().total);
  }
};

// What one block computes of a tile: the units `kb` to `kb_end` of its K, all of them unless the tile is split.
struct WorkTile {
  int expert, column, block, kb, kb_end;
  int row, rows;       // of the tile
  int prepared_block;  // its first block of 8 prepared rows
};

// A position in the order of the units, and how many units of the block's range are left from there. All members are the same
// in all lanes, and are computed so that the compiler sees it (no lane works for another one): the compiler keeps such values
// in uniform registers.
template <typename C>
struct UnitIterator {
  int expert, column, block, count, kb, left;  // count: the expert's blocks of rows

  // The beginning of a block's range: the first unit whose position is not before the block's part of the total weight.
  __device__ explicit UnitIterator(const StreamK<C>& schedule) {
    const int end = seek(schedule, blockIdx.x + 1);
    left = end - seek(schedule, blockIdx.x);
  }
  // Returns the number of the unit in the order of all units.
  __device__ int seek(const StreamK<C>& schedule, int64_t of) {
    const typename StreamK<C>::Header& header = schedule.header();
    const int64_t at = (of * header.total + header.grid - 1) / header.grid;
    const int per_weight = schedule.column_tiles * schedule.blocks_k, weight = static_cast<int>(at / per_weight);
    int low = 0, high = schedule.experts;  // the first expert that ends behind `at`
    while (low < high) {
      const int mid = (low + high) / 2;
      if (schedule.weights()[mid + 1] > weight) high = mid; else low = mid + 1;
    }
    expert = low, column = block = count = kb = 0, left = 2;
    if (expert == schedule.experts) return schedule.blocks()[schedule.experts] * per_weight;
    count = schedule.blocks()[expert + 1] - schedule.blocks()[expert];
    const int of_column = (schedule.weights()[expert + 1] - schedule.weights()[expert]) * schedule.blocks_k;
    int rest = static_cast<int>(at - static_cast<int64_t>(schedule.weights()[expert]) * per_weight);
    column = rest / of_column, rest -= column * of_column;
    const int of_block = C::weight(C::kTileTokens) * schedule.blocks_k;
    block = min(rest / of_block, count - 1), rest -= block * of_block;
    const int own = C::weight(schedule.rows_of(expert, block));
    kb = (rest + own - 1) / own;
    if (header.whole && kb > 0) kb = schedule.blocks_k;
    if (kb == schedule.blocks_k) next_tile(schedule);
    return ((schedule.blocks()[expert] * schedule.column_tiles) + column * count + block) * schedule.blocks_k + kb;
  }

  // To the next unit.
  __device__ void next(const StreamK<C>& schedule) {
    --left;
    if (++kb >= schedule.blocks_k) next_tile(schedule);
  }
  __device__ void next_tile(const StreamK<C>& schedule) {
    kb = 0;
    if (++block < count) return;
    block = 0;
    if (++column < schedule.column_tiles || left <= 0) return;
    column = 0;
    do {
      if (++expert >= schedule.experts) return;
      count = schedule.blocks()[expert + 1] - schedule.blocks()[expert];
    } while (count == 0);
  }
  // What this block's range has of the tile from here on.
  __device__ WorkTile work_tile(const StreamK<C>& schedule) const {
    const int start = schedule.rows()[expert];
    return {expert, column, block, kb, min(schedule.blocks_k, kb + left), start + block * C::kTileTokens,
            schedule.rows_of(expert, block), first_prepared_block(start, expert) + block * (C::kTileTokens / 8)};
  }
};

}  // namespace ccq
