// SPDX-License-Identifier: Apache-2.0
// Who computes what in moe_few.cuh, where it lies in shared memory, and which units each warp fetches.
#pragma once

#include "prepare.cuh"
#include "ring.cuh"

namespace ccq {

// Division by a number that the host knows.
struct Divider {
  int by;
  uint32_t inverse;

  Divider() = default;
  explicit Divider(int by_) : by(by_), inverse(by_ == 1 ? ~0u : static_cast<uint32_t>((uint64_t{1} << 32) / by_)) {}
  __device__ int divide(int n) const {  // n >= 0; rounded down, the product is one less at most
    const int q = static_cast<int>(__umulhi(static_cast<uint32_t>(n), inverse));
    return q + (n - q * by >= by);
  }
};

struct FewParams {
  const void* x;
  const int64_t* offsets;
  const uint8_t* quant;
  const uint8_t* scales;
  const uint32_t* columns;
  const float* row_scale;
  void* out;
  int rows, k, n, experts, dtype, fastdeploy;
  Divider column_tiles;  // tiles side by side
  int each, longer;      // tiles a block, and how many blocks take one more; where a block of rows is one row
};

// A block's run of tiles, and the first one's expert.
struct FewStart {
  int begin, end, expert;
};

template <Pairs kPairs_, int kR_, int kWK_, int kWN_, int kRows_, int kStages_>
struct FewConfig {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = kR_, kWK = kWK_, kWN = kWN_, kRows = kRows_, kStages = kStages_;
  static constexpr int kWarps = kWK * kWN, kThreads = kWarps * 32, kTiles = kR * kWN;
  static constexpr int kColumnSlots = 3, kSumsSlots = 3;
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1, kColumnBytes = kTiles * kPlaneBytes * kPlanes;
  static constexpr int kEntries = kTiles * 8 * kRows;  // float2 (columns g and g + 8) that a warp's share of a tile takes
  static constexpr int kBarriers = kWarps * kStages + kColumnSlots + 2 * kSumsSlots;
  // 256 bytes a row and unit of 128 rows; 16 bytes of zeros a unit.
  __host__ __device__ static constexpr int activation_bytes(int blocks_k) { return blocks_k * (256 * kRows + 16); }
  // Offsets of the sums: 8 columns a unit or two with slots, a group without.
  __host__ __device__ static constexpr int offset_bytes(int blocks_k) { return blocks_k * (kRows == 4 ? 64 : 32); }
  static constexpr size_t shared_bytes(int k, int experts) {
    const int blocks_k = k / 128;
    return kWarps * Ring<kR, kStages>::kBytes + kColumnSlots * kColumnBytes + kSumsSlots * kWK * kEntries * 8 +
           activation_bytes(blocks_k) + offset_bytes(blocks_k) + kBarriers * 8 + (kWarps + 1) * kRows * 4 +
           sizeof(FewStart) + (2 * experts + 2) * sizeof(int);
  }
};

// Where things lie in shared memory.
template <typename C>
struct FewShared {
  char *rings, *columns, *activations;
  float2* sums;           // [kSumsSlots][kWK][kEntries]
  int* offsets;           // what accumulators begin with, for windows are 32 less than they are stored: [..][8 columns]
  Barrier *full, *columns_full, *sums_ready, *sums_free;
  float* back;            // [kRows]: undoes a row's scale, times the caller's row scale
  uint32_t* largest;      // [kWarps][kRows]
  FewStart* start;
  int *blocks, *rows;     // prefix sums over experts: blocks of kRows rows, rows

  __device__ FewShared(char* at, int blocks_k, int experts) {
    auto take = [&at](int bytes) { char* p = at; at += bytes; return p; };
    rings = take(C::kWarps * Ring<C::kR, C::kStages>::kBytes);
    columns = take(C::kColumnSlots * C::kColumnBytes);
    sums = reinterpret_cast<float2*>(take(C::kSumsSlots * C::kWK * C::kEntries * 8));
    activations = take(C::activation_bytes(blocks_k));
    offsets = reinterpret_cast<int*>(take(C::offset_bytes(blocks_k)));
    full = reinterpret_cast<Barrier*>(take(C::kWarps * C::kStages * 8));
    columns_full = reinterpret_cast<Barrier*>(take(C::kColumnSlots * 8));
    sums_ready = reinterpret_cast<Barrier*>(take(C::kSumsSlots * 8));
    sums_free = reinterpret_cast<Barrier*>(take(C::kSumsSlots * 8));
    back = reinterpret_cast<float*>(take(C::kRows * 4));
    largest = reinterpret_cast<uint32_t*>(take(C::kWarps * C::kRows * 4));
    start = reinterpret_cast<FewStart*>(take(sizeof(FewStart)));
    blocks = reinterpret_cast<int*>(take(4 * (experts + 1)));
    rows = reinterpret_cast<int*>(take(4 * (experts + 1)));
  }
};

// The expert of a row: as many as end at or before it. All lanes of a warp together. A call, for it is rare.
__device__ __noinline__ int expert_of_row(const int64_t* offsets, int experts, int row) {
  int expert = 0;
#pragma unroll 4
  for (int base = 0; base < experts; base += 32) {
    const int e = base + static_cast<int>(threadIdx.x % 32);
    expert += __popc(__ballot_sync(~0u, e < experts && offsets[e] <= row));
  }
  return expert;
}
// `from`: an expert that is not behind it. As many as there are: a row behind the last one's.
template <typename C>
__device__ int expert_of(const FewParams& p, const FewShared<C>& s, int block, int from) {
  if constexpr (C::kRows == 1) {
    return p.offsets ? expert_of_row(p.offsets, p.experts, block) : 0;
  } else {
    while (block >= s.blocks[from + 1]) ++from;
    return from;
  }
}

// Prefix sums over experts, of blocks of kRows rows and of rows, and this block's run of tiles. One warp; each lane takes a
// run of experts. (With one row a block there is nothing to work out.)
template <typename C>
__device__ void scan_offsets(const FewParams& p, const FewShared<C>& s) {
  const int lane = threadIdx.x % 32, run = (p.experts + 31) / 32, first = lane * run, last = min(first + run, p.experts);
  auto end_of = [&](int e) { return e < 0 ? 0 : p.offsets ? static_cast<int>(p.offsets[e]) : p.rows; };
  const int start = first < p.experts ? end_of(first - 1) : 0;
  int count = 0, before = start;
#pragma unroll 8
  for (int e = first; e < last; ++e) {
    const int end = end_of(e);
    count += (end - before + C::kRows - 1) / C::kRows, before = end;
  }
  int counts = count;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, counts, d);
    if (lane >= d) counts += other;
  }
  if (lane == 0) s.blocks[0] = s.rows[0] = 0;
  const int tiles = __shfl_sync(~0u, counts, 31) * p.column_tiles.by, grid = gridDim.x, own = blockIdx.x;
  const int each = tiles / grid, longer = tiles - each * grid, begin = own * each + min(own, longer);
  const int block = p.column_tiles.divide(begin);
  if (lane == 0) s.start->begin = begin, s.start->end = begin + each + (own < longer);
  count = counts - count, before = start;
#pragma unroll 8
  for (int e = first; e < last; ++e) {
    const int end = end_of(e), after = count + (end - before + C::kRows - 1) / C::kRows;
    if (count <= block && block < after) s.start->expert = e;
    count = after, before = end;
    s.blocks[e + 1] = count, s.rows[e + 1] = end;
  }
}

// A warp's walk over the units of its tiles, at the end of the ring where they are ordered.
template <typename C>
struct FewFetch {
  const FewParams& p;
  const FewShared<C>& s;
  const int end, column_tiles, tiles_n, blocks_k, wk, wn;
  int tile, block, column, pair;  // pair: the first one that this warp has in the tile
  int expert_block, expert;
  int kb = 0, stride = 0, tiles = 0;      // stride: units from one block of 128 rows to the next
  uint32_t unit = 0;

  __device__ int next_pair(int pair_) const { return (pair_ - (blocks_k + 1) / 2) & (C::kWK - 1); }

  __device__ void aim() {  // at the first unit of `tile`, or of a later one where this warp has any
    static_assert(4 % C::kR == 0, "a warp's tiles lie in one group of four");
    while (tile < end && 2 * pair >= blocks_k) advance();
    kb = tile < end ? 2 * pair : blocks_k;
    if (tile == end) return;
    if (block != expert_block) expert_block = block, expert = min(expert_of<C>(p, s, block, expert), p.experts - 1);
    // A warp right of the last column reads the last tiles and writes nothing.
    const int t16 = min(column * C::kTiles + wn * C::kR, (tiles_n - 1) / C::kR * C::kR);
    stride = min(4, tiles_n - t16 / 4 * 4), tiles = min(C::kR, stride - t16 % 4);
    unit = static_cast<uint32_t>(ccq_unit_index(expert, t16, kb, tiles_n, blocks_k));
  }
  __device__ void advance() {
    ++tile, pair = next_pair(pair);
    if (++column == column_tiles) column = 0, ++block;
  }
  __device__ void request(Ring<C::kR, C::kStages>& ring, int ahead = 0) {  // the next unit, or nothing
    if (kb < blocks_k) {
      ring.fetch(p.quant + static_cast<size_t>(unit) * 512, p.scales + static_cast<size_t>(unit) * 16, tiles, ahead);
      const int step = kb % 2 ? 2 * C::kWK - 1 : 1;
      kb += step, unit += step * stride;
      if (kb >= blocks_k) advance(), aim();
    }
    ring.commit();
  }
};

}  // namespace ccq
