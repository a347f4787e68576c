// SPDX-License-Identifier: Apache-2.0
// Tile scheduler of moe_few.cuh: each block's range of tiles, its shared memory, and the units that each warp requests.
#pragma once

#include "prepare.cuh"
#include "ring.cuh"
#include "warp_scan.cuh"

namespace ccq {

constexpr int kMaxExperts = 1024;

// What all lanes agree on, in a register that they share: else all that is derived from it takes one of each lane. A condition belongs
// inside, uniform(c ? a : b): nvcc 13.0 predicates `c ? uniform(a) : b` and, in CCQ-2T's kernel for few rows, by a register that
// held another condition by then.
__device__ inline int uniform(int v) { return __reduce_max_sync(~0u, v); }

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
  int each, longer;      // tiles a block, and how many blocks take one more; where the host knows how many tiles there are
  int stages;            // of few_stream.cuh
};

// The expert of a range's first tile, or with one row a block which block of rows that is; blocks of rows of each warp's experts.
struct FewStart {
  int expert, block, of_warp[16];
};

template <Pairs kPairs_, int kR_, int kWK_, int kWN_, int kRows_, int kStages_>
struct FewConfig {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = kR_, kWK = kWK_, kWN = kWN_, kRows = kRows_, kStages = kStages_;
  static constexpr int kWarps = kWK * kWN, kThreads = kWarps * 32, kTiles = kR * kWN;
  static_assert(kWarps == 16 && kMaxExperts % kThreads == 0, "FewStart and the scans of offsets are made for that");
  static constexpr int kColumnSlots = 3, kSumsSlots = 3;
  static constexpr int kKept = kWN > 1 ? 2 : 1;        // chunks of each row that a lane loads before it needs them
  static constexpr int kFirst = kStages - kStages / 4;  // units that are requested before activations are there
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1, kColumnBytes = kTiles * kPlaneBytes * kPlanes;
  static constexpr int kRingsBytes = kWarps * Ring<kR, kStages>::kBytes;
  static constexpr int kEntries = kTiles * 8 * kRows;  // float2 (columns g and g + 8) that a warp's partial sums of a tile take
  static constexpr int kBarriers = kWarps * kStages + kColumnSlots + 2 * kSumsSlots + 1;
  // 256 bytes a row and unit of 128 rows; 16 bytes of zeros a unit.
  __host__ __device__ static constexpr int activation_bytes(int blocks_k) { return blocks_k * (256 * kRows + 16); }
  // Offsets of the sums: 8 columns a unit or two with slots, a group without.
  __host__ __device__ static constexpr int offset_bytes(int blocks_k) { return blocks_k * (kRows == 4 ? 64 : 32); }
  // Of prefix sums; with one row a block, half of the most rows that a range may touch.
  __host__ __device__ static constexpr int entries(int experts) { return kRows > 1 ? experts + 1 : 64; }
  static constexpr size_t shared_bytes(int k, int experts) {
    const int blocks_k = k / 128;
    return kRingsBytes + kColumnSlots * kColumnBytes + kSumsSlots * kWK * kEntries * 8 +
           activation_bytes(blocks_k) + offset_bytes(blocks_k) + kBarriers * 8 + kWK * kRows * 4 +
           sizeof(FewStart) + 2 * entries(experts) * sizeof(int);
  }
};

// Where things lie in shared memory.
template <typename C>
struct FewShared {
  char *rings, *columns, *activations;
  float2* sums;           // [kSumsSlots][kWK][kEntries]
  int* offsets;           // what accumulators begin with, for windows are 32 less than they are stored: [..][8 columns]
  Barrier *full, *columns_full, *sums_ready, *sums_free, *rows_ready;
  float* back;            // [kWK][kRows]: undoes the scale of a row's slice, times the caller's row scale
  FewStart* start;
  int *blocks, *rows;     // prefix sums over experts: blocks of kRows rows, rows. kRows 1: a range's experts

  __device__ FewShared(char* at, int blocks_k, int experts) {
    auto take = [&at](int bytes) { char* p = at; at += bytes; return p; };
    rings = take(C::kRingsBytes);
    columns = take(C::kColumnSlots * C::kColumnBytes);
    sums = reinterpret_cast<float2*>(take(C::kSumsSlots * C::kWK * C::kEntries * 8));
    activations = take(C::activation_bytes(blocks_k));
    offsets = reinterpret_cast<int*>(take(C::offset_bytes(blocks_k)));
    full = reinterpret_cast<Barrier*>(take(C::kWarps * C::kStages * 8));
    columns_full = reinterpret_cast<Barrier*>(take(C::kColumnSlots * 8));
    sums_ready = reinterpret_cast<Barrier*>(take(C::kSumsSlots * 8));
    sums_free = reinterpret_cast<Barrier*>(take(C::kSumsSlots * 8));
    rows_ready = reinterpret_cast<Barrier*>(take(8));
    back = reinterpret_cast<float*>(take(C::kWK * C::kRows * 4));
    start = reinterpret_cast<FewStart*>(take(sizeof(FewStart)));
    blocks = reinterpret_cast<int*>(take(4 * C::entries(experts)));
    rows = reinterpret_cast<int*>(take(4 * C::entries(experts)));
  }
};

// `from`: an expert that is not behind it. As many as there are: a row behind the last one's.
template <typename C, typename S>
__device__ int expert_of(const S& s, int block, int from) {
  if constexpr (C::kRows == 1) {
    return s.blocks[block - s.start->block];
  } else {
    while (block >= s.blocks[from + 1]) ++from;
    return from;
  }
}

// A block of rows and its expert, the same for all lanes and known to be.
struct FewRows {
  int expert, block;

  // Its first row and how many rows it has; none if it lies behind the last expert's.
  template <typename C, typename S>
  __device__ void place(const FewParams& p, const S& s, int* row, int* count) const {
    *row = block * C::kRows, *count = min(C::kRows, p.rows - *row);
    if (C::kRows == 1) {
      *count = expert < p.experts;
    } else if (p.offsets) {
      *row = s.rows[expert] + (block - s.blocks[expert]) * C::kRows;
      *count = min(C::kRows, s.rows[expert + 1] - *row);
    }
  }
};
// Row r of them in memory, or the last one in its place.
__device__ inline const char* row_in(const FewParams& p, int row, int count, int r) {
  return static_cast<const char*>(p.x) + static_cast<size_t>(row + min(r, max(count, 1) - 1)) * p.k * 2;
}

// With one row a block: the experts of a range's blocks, as many as end at or before each. All threads, which meet in here; each
// has few offsets, since a warp that reads them all, or all warps, take a microsecond longer.
template <typename C, typename S>
__device__ void find_experts(const FewParams& p, const S& s, int first_block, int last_block) {
  const int e = threadIdx.x;
  constexpr int kEach = kMaxExperts / C::kThreads;
  int64_t end[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j)  // threads beyond kThreads count nothing
    end[j] = e < C::kThreads && e + j * C::kThreads < p.experts ? p.offsets[e + j * C::kThreads] : p.rows;
  if (e == 0) s.start->block = first_block;
#pragma unroll 1
  for (int block = first_block; block <= last_block; ++block) {
    int expert = __syncthreads_count(end[0] <= block);
#pragma unroll
    for (int j = 1; j < kEach; ++j)
      if (j * C::kThreads < p.experts) expert += __syncthreads_count(end[j] <= block);
    if (e == 0) s.blocks[block - first_block] = expert;
  }
}

// Prefix sums over experts, of blocks of kRows rows and of rows, and this block's range of tiles. All threads, which meet in here.
// (With one row a block there is nothing to work out.)
template <typename C>
__device__ void scan_offsets(const FewParams& p, const FewShared<C>& s, int* begin, int* end) {
  constexpr int kEach = kMaxExperts / C::kThreads;  // experts side by side are a thread's: their sum goes through the scan
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = p.experts > C::kThreads ? kEach : 1;
  const int first = threadIdx.x * each;
  int ends[kEach], count = 0, before = first > 0 && first <= p.experts ? static_cast<int>(p.offsets[first - 1]) : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    ends[j] = j < each && first + j < p.experts ? static_cast<int>(p.offsets[first + j]) : before;
    count += (ends[j] - before + C::kRows - 1) / C::kRows, before = ends[j];
  }
  const int counts = prefix_sum(lane, count);
  if (lane == 31 && warp < C::kWarps) s.start->of_warp[warp] = counts;
  __syncthreads();
  int blocks = counts - count, all = 0;
#pragma unroll
  for (int w = 0; w < C::kWarps; ++w) {
    const int of_warp = s.start->of_warp[w];
    all += of_warp, blocks += w < warp ? of_warp : 0;
  }
  const int tiles = all * p.column_tiles.by, grid = gridDim.x, own = blockIdx.x;
  const int length = tiles / grid, longer = tiles - length * grid;
  *begin = uniform(own * length + min(own, longer)), *end = *begin + length + uniform(own < longer);
  const int block = p.column_tiles.divide(*begin);
  before = first > 0 && first <= p.experts ? static_cast<int>(p.offsets[first - 1]) : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (j >= each || first + j >= p.experts) break;
    const int after = blocks + (ends[j] - before + C::kRows - 1) / C::kRows;
    if (blocks <= block && block < after) s.start->expert = first + j;
    s.blocks[first + j + 1] = after, s.rows[first + j + 1] = ends[j];
    blocks = after, before = ends[j];
  }
  if (threadIdx.x == 0) s.blocks[0] = s.rows[0] = 0;
  __syncthreads();
}

// The same for one matrix, of which the host knows all else. One warp.
template <typename C, typename S>
__device__ void one_expert(const FewParams& p, const S& s, int first_block, int end) {
  const int lane = threadIdx.x % 32;
  if (C::kRows == 1) {
    s.start->block = first_block;
    for (int i = lane; first_block + i <= p.column_tiles.divide(end - 1); i += 32) s.blocks[i] = 0;
  } else if (lane == 0) {
    s.blocks[0] = s.rows[0] = 0, s.rows[1] = p.rows, s.blocks[1] = (p.rows + C::kRows - 1) / C::kRows;
  }
}

// The producer side of a warp's ring: the units of its tiles, in the order in which they are requested.
template <typename C>
struct FewProducer {
  const FewParams& p;
  const FewShared<C>& s;
  const int column_tiles, tiles_n, blocks_k, wk, wn;
  int end, tile, block, column, pair;     // pair: the first one that this warp has in the tile
  int expert_block, expert;
  int kb, stride = 0, tiles = 0;          // stride: units from one block of 128 rows to the next
  uint32_t unit = 0;
  bool again = false;                     // the expert has more than one block of rows

  __device__ int next_pair(int pair_) const { return (pair_ - (blocks_k + 1) / 2) & (C::kWK - 1); }

  // At the beginning of a range, when experts need not be known.
  __device__ void start(int begin, int end_, int first_block) {
    end = end_, tile = begin, block = first_block, column = begin - first_block * column_tiles, pair = wk;
    expert = 0;
    aim<false>();
  }
  // Then: `from` is the first block's.
  __device__ void find_expert(int from) {
    expert_block = block, expert = uniform(tile < end ? min(expert_of<C>(s, block, from), p.experts - 1) : from);
    unit += static_cast<uint32_t>(expert * tiles_n * blocks_k);
    look();
  }
  __device__ void look() {
    if (C::kRows == 2) again = uniform(s.blocks[expert + 1] - s.blocks[expert]) > 1;
  }
  template <bool kExperts>
  __device__ void aim() {  // at the first unit of `tile`, or of a later one where this warp has any
    static_assert(4 % C::kR == 0, "a warp's tiles lie in one group of four");
    while (tile < end && 2 * pair >= blocks_k) advance();
    kb = tile < end ? 2 * pair : blocks_k;
    if (tile == end) return;
    if (kExperts && block != expert_block) {
      expert_block = block, expert = uniform(min(expert_of<C>(s, block, expert), p.experts - 1));
      look();
    }
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
      ring.fetch(p.quant + static_cast<size_t>(unit) * 512, p.scales + static_cast<size_t>(unit) * 16, tiles, ahead,
                 C::kRows == 2 && again);
      const int step = kb % 2 ? 2 * C::kWK - 1 : 1;
      kb += step, unit += step * stride;
      if (kb >= blocks_k) advance(), aim<true>();
    }
    ring.commit();
  }
};

}  // namespace ccq
