// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for some rows an expert (4 to 32): persistent, split along K, everything streamed through shared memory.
//
// Work. A tile has 16 * kTiles columns and up to 8 * kNT rows (schedule.cuh). One that lies in several blocks' stretches is
// summed from fp32 partial results by whichever block finishes it last, always in the order of K: which block does it
// changes from run to run, the sum does not.
//
// Warps. A warp owns kR tiles of 16 columns and fetches their weights through its own ring (ring.cuh). Activations are the
// same for all warps: they go through a ring of the block's, which warps fill in turn, one unit each, when they order its
// weights. That ring is longer, so warps may drift kRowsStages - kStages units apart before one waits for another. Both
// rings run on across tiles.
#pragma once

#include "output.cuh"
#include "ring.cuh"

namespace ccq {

template <Pairs kPairs_, int kR_, int kNT_, int kStages_>
struct Config {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = kR_, kNT = kNT_, kStages = kStages_, kMinBlocks = 1;
  static constexpr int kWarps = 16, kThreads = kWarps * 32, kTileTokens = 8 * kNT;
  static constexpr int kTiles = kR * kWarps;  // 16-column tiles a block tile has
  static constexpr int kRowsStages = 8;
  static_assert(kStages < kRowsStages);
  // Of one warp: the ring, then kStages + 1 tiles' columns (units of at most that many tiles are on their way or in work).
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1, kColumnBytes = kR * kPlaneBytes * kPlanes;
  static constexpr int kColumnSlots = kStages + 1, kWarpBytes = Ring<kR, kStages>::kBytes + kColumnSlots * kColumnBytes;
  static constexpr int kRowsBytes = kNT * kRowsUnitBytes;  // a stage of activations
  static constexpr int kBarriers = kWarps * kStages + 2 * kRowsStages;
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;  // of one block and slot
  static size_t shared_bytes(int experts) {
    return kWarps * kWarpBytes + kRowsStages * kRowsBytes + 8 * kBarriers + 2 * sizeof(int) * (experts + 1);
  }
};

// A walk over a block's units: down K, then blocks of rows, columns, experts (the order of schedule.cuh's tiles).
struct Walk {
  int expert, column, block, count, kb, left;  // count: the expert's blocks of rows; left: units to come, this one included

  __device__ Walk(const Routing& routing, int tile, int experts, int kb_, int units) : kb(kb_), left(units) {
    expert = routing.expert_of(tile, experts);
    count = routing.blocks[expert + 1] - routing.blocks[expert];
    const int local = tile - routing.blocks[expert] * routing.column_tiles;
    column = local / count, block = local - column * count;
  }
  __device__ void next(const Routing& routing, int blocks_k) {
    --left;
    if (++kb < blocks_k) return;
    kb = 0;
    if (++block < count) return;
    block = 0;
    if (++column < routing.column_tiles || left == 0) return;
    column = 0;
    do ++expert, count = routing.blocks[expert + 1] - routing.blocks[expert];
    while (count == 0);
  }
};

template <typename C>
struct Warp {
  static constexpr int kR = C::kR;
  const GemmParams& p;
  const Routing routing;
  char* const columns;  // shared: [kColumnSlots][kColumnBytes]
  char* const rows;     // shared, of the block: [kRowsStages][kRowsBytes]
  Barrier* const rows_full;
  Barrier* const rows_free;
  const int lane, warp, blocks_k, tiles_n;
  Ring<kR, C::kStages> ring;

  // The end of the rings where units are ordered.
  Walk ahead;
  int ahead_unit = 0;    // its number in the block's stretch
  int ahead_slot = 0;
  int ahead_tiles = 0;   // tiles of this warp's that are there
  int ahead_stride = 0;  // units from one block of 128 rows to the next
  uint32_t ahead_index = 0;

  __device__ static int next_slot(int slot) { return slot + 1 == C::kColumnSlots ? 0 : slot + 1; }
  __device__ int tile16(int column_tile) const { return column_tile * C::kTiles + warp * kR; }

  // A tile's columns, on the barrier of its first unit.
  __device__ void request_columns(int t16, int stage) {
    const uint32_t* from = p.columns + (static_cast<size_t>(ahead.expert) * tiles_n + t16) * 32;
    const size_t plane = static_cast<size_t>(p.experts) * tiles_n * 32;
    char* const to = columns + ahead_slot * C::kColumnBytes;
#if CCQ_BULK
    if (lane == 0) {
      ring.full[stage].expect(ahead_tiles * kPlaneBytes * C::kPlanes);
#pragma unroll
      for (int j = 0; j < C::kPlanes; ++j)
        bulk_copy(to + j * (kR * kPlaneBytes), from + j * plane, ahead_tiles * kPlaneBytes, ring.full + stage);
    }
#else
#pragma unroll
    for (int j = 0; j < C::kPlanes; ++j)
      if (lane < ahead_tiles * 8) copy16(to + j * (kR * kPlaneBytes) + lane * 16, from + j * plane + lane * 4);
#endif
    ahead_slot = next_slot(ahead_slot);
  }

  // The activations of a unit, once all warps have left what lay there.
  __device__ void request_rows(const Walk& at, int unit) {
    const int stage = unit % C::kRowsStages;
    if (unit >= C::kRowsStages) rows_free[stage].wait((unit / C::kRowsStages + 1) & 1);
    const int start = routing.rows[at.expert], end = routing.rows[at.expert + 1];
    const int count = min(C::kNT, (end - start + 7) / 8 - at.block * C::kNT);
    const int place = first_prepared_block(start, at.expert) + at.block * C::kNT;
    const char* from = p.prepared.x + (static_cast<size_t>(place) * blocks_k + at.kb) * kRowsUnitBytes;
    const size_t next = static_cast<size_t>(blocks_k) * kRowsUnitBytes;
    char* const to = rows + stage * C::kRowsBytes;
#if CCQ_BULK
    if (lane == 0) {
      rows_full[stage].arrive_and_expect(count * kRowsUnitBytes);
      for (int i = 0; i < count; ++i) bulk_copy(to + i * kRowsUnitBytes, from + i * next, kRowsUnitBytes, rows_full + stage);
    }
#else
    for (int i = 0; i < count; ++i)
      for (int at = lane * 16; at < kRowsUnitBytes; at += 512) copy16(to + i * kRowsUnitBytes + at, from + i * next + at);
    rows_full[stage].arrive_after_copies();
#endif
  }

  // The next unit of the line, or nothing: weights into the stage that all lanes have left (`stage` stages after it), with
  // a tile's first unit its columns, and by each warp in turn the activations.
  __device__ void request(int stage = 0, bool beginning = false) {
    if (ahead.left > 0) {
      if (ahead.kb == 0 || (beginning && stage == 0)) {
        static_assert(4 % kR == 0, "a warp's tiles lie in one group of four");
        // A warp right of the last column reads the last tiles and writes nothing.
        const int t16 = min(tile16(ahead.column), (tiles_n - 1) / kR * kR);
        ahead_stride = min(4, tiles_n - t16 / 4 * 4), ahead_tiles = min(kR, ahead_stride - t16 % 4);
        ahead_index = static_cast<uint32_t>(ccq_unit_index(ahead.expert, t16, ahead.kb, tiles_n, blocks_k));
        request_columns(t16, stage);
      }
      ring.fetch(p.quant + static_cast<size_t>(ahead_index) * 512, p.scales + static_cast<size_t>(ahead_index) * 16,
                 ahead_tiles, stage);
      if (!beginning && ahead_unit % C::kWarps == warp) request_rows(ahead, ahead_unit);
      ++ahead_unit, ahead_index += ahead_stride;
      ahead.next(routing, blocks_k);
    }
    ring.commit();
  }
};

// Units kb..kb_end of one tile into `acc`; `unit` is the first one's number in the block's stretch. kNT: blocks of 8 rows
// that this tile really has.
template <typename C, int kNT>
__device__ void multiply(Warp<C>& w, int kb, int kb_end, int unit, int slot, Accumulator<C, kNT>& acc) {
  constexpr int kR = C::kR;
  const int g = w.lane / 4, t = w.lane % 4;
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc.o[r][nt][i] = 0.f;

  // A constant kept in a register: p.k is positive, but the compiler does not know.
  const uint32_t magic = kMagic | (w.p.k & 0x80000000u);
  const uint32_t sum_weights = t == 0 ? kSumWeights : 0;  // the sums' two parts are rows 0 and 1, lane t = 0's
  Column<C::kPairs> column[kR][2];
  bool first = true;
  for (; kb < kb_end; ++kb, ++unit) {
    w.ring.wait();
    if (first) {
      first = false;
      const char* c = w.columns + slot * C::kColumnBytes;
#pragma unroll
      for (int r = 0; r < kR; ++r)
        load_columns<C::kPairs>(c + r * kPlaneBytes, c + (kR + r) * kPlaneBytes, g, column[r]);
    }
    uint4 q[kR];
    uint32_t scale[kR];
    const char* const weights = w.ring.unit;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      q[r] = *reinterpret_cast<const uint4*>(weights + r * 512 + w.lane * 16);
      scale[r] = *reinterpret_cast<const uint16_t*>(weights + kR * 512 + r * 16 + g * 2);
    }
    __syncwarp();  // every lane has what it needs of the stage
    w.request();
    w.ring.next();
    const int rows_stage = unit % C::kRowsStages;
    const char* const x = w.rows + rows_stage * C::kRowsBytes + w.lane * 16;
    const char* const sums = w.rows + rows_stage * C::kRowsBytes + 2048 + g * 4;
    w.rows_full[rows_stage].wait((unit / C::kRowsStages) & 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 b[kNT][2];
      uint32_t s[kNT];
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
        for (int i = 0; i < 2; ++i) b[nt][i] = *reinterpret_cast<const uint4*>(x + nt * kRowsUnitBytes + half * 1024 + i * 512);
        s[nt] = *reinterpret_cast<const uint32_t*>(sums + nt * kRowsUnitBytes + half * 32);
      }
      if (half == 1) {
        __syncwarp();
        if (w.lane == 0) w.rows_free[rows_stage].arrive();
      }
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t low = half ? q[r].z : q[r].x, high = half ? q[r].w : q[r].y;
        float d[kNT][4];
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) mma_sums(d[nt], sum_weights, s[nt]);
        {
          const Windows a(column[r][0].template codes<0>(low)), c(column[r][1].template codes<0>(high));
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
            mma(d[nt], a.w[0], c.w[0], a.w[1], c.w[1], b[nt][0].x, b[nt][0].y);
            mma(d[nt], a.w[2], c.w[2], a.w[3], c.w[3], b[nt][0].z, b[nt][0].w);
          }
        }
        {
          const Windows a(column[r][0].template codes<1>(low)), c(column[r][1].template codes<1>(high));
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
            mma(d[nt], a.w[0], c.w[0], a.w[1], c.w[1], b[nt][1].x, b[nt][1].y);
            mma(d[nt], a.w[2], c.w[2], a.w[3], c.w[3], b[nt][1].z, b[nt][1].w);
          }
        }
        const float f0 = half ? nibble<1>(scale[r], magic) : nibble<0>(scale[r], magic);
        const float f1 = half ? nibble<3>(scale[r], magic) : nibble<2>(scale[r], magic);
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) {
          float* o = acc.o[r][nt];
          o[0] = fmaf(f0, d[nt][0], o[0]), o[1] = fmaf(f0, d[nt][1], o[1]);
          o[2] = fmaf(f1, d[nt][2], o[2]), o[3] = fmaf(f1, d[nt][3], o[3]);
        }
      }
    }
  }
}

template <typename C, int kNT>
__device__ void run_tile(Warp<C>& w, const Tile& tile, int kb, int kb_end, int unit, int slot, int first_block, int last_block) {
  Accumulator<C, kNT> acc;
  multiply<C, kNT>(w, kb, kb_end, unit, slot, acc);
  // Read here and not before the loop, to keep them out of its registers; the slot stays until the tile is done.
  float super[C::kR][2];
#pragma unroll
  for (int r = 0; r < C::kR; ++r) {
    const float2 s = load_supers(w.columns + slot * C::kColumnBytes + r * kPlaneBytes, w.lane / 4);
    super[r][0] = s.x * 16777216.f, super[r][1] = s.y * (16777216.f * kUpperColumns);
  }
  if (first_block != last_block && !combine<C, kNT>(w, tile.rows, first_block, last_block, acc)) return;
  write_out<C, kNT>(w, tile, super, acc);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) gemm_kernel(const GemmParams p) {
  extern __shared__ __align__(128) char shared[];
  char* const all_rows = shared + C::kWarps * C::kWarpBytes;
  Barrier* const barriers = reinterpret_cast<Barrier*>(all_rows + C::kRowsStages * C::kRowsBytes);
  Barrier *const rows_full = barriers + C::kWarps * C::kStages, *const rows_free = rows_full + C::kRowsStages;
  int* blocks = reinterpret_cast<int*>(barriers + C::kBarriers);
  int* rows = blocks + p.experts + 1;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (lane == 0) {  // one lane after another would take microseconds
    for (int i = 0; i < C::kStages; ++i) barriers[warp * C::kStages + i].init(1);
    if (warp < C::kRowsStages) rows_full[warp].init(CCQ_BULK ? 1 : 32), rows_free[warp].init(C::kWarps);
    publish_barriers();
  }
  scan_offsets<C::kThreads>(p.offsets, p.experts, p.rows, C::kTileTokens, blocks, rows);

  const int blocks_k = p.k / 128, tiles_n = p.n / 16;
  const Routing routing{blocks, rows, (tiles_n + C::kTiles - 1) / C::kTiles};
  const int tiles = blocks[p.experts] * routing.column_tiles;
  const int parts = parts_of(tiles, blocks_k, gridDim.x);
  // With less than one part a block the rest stays out, so that every block of a tile's stretch has a share in it.
  const int total = tiles * parts;
  const Split split{total, min(static_cast<int>(gridDim.x), total)};
  if (static_cast<int>(blockIdx.x) >= split.grid) return;
  const int begin = split.begin(blockIdx.x), end = split.begin(blockIdx.x + 1);
  auto kb_of = [&](int part) { return part % parts * blocks_k / parts; };

  char* const own = shared + warp * C::kWarpBytes;
  int tile_index = begin / parts, kb = kb_of(begin);
  int left = (end / parts - tile_index) * blocks_k + kb_of(end) - kb;
  Walk walk(routing, tile_index, p.experts, kb, left);
  int expert = walk.expert;
  Warp<C> w{p, routing, own + Ring<C::kR, C::kStages>::kBytes, all_rows, rows_full, rows_free, lane, warp, blocks_k,
            tiles_n, Ring<C::kR, C::kStages>(own, barriers + warp * C::kStages), walk};
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) w.request(i, true);
  // Weights and offsets do not depend on the kernel before this one, activations and tickets do.
  wait_for_prerequisites();
  for (int i = 0; i < C::kStages && walk.left > 0; ++i, walk.next(routing, blocks_k))
    if (i == warp) w.request_rows(walk, i);

  int slot = 0, unit = 0;
  while (left > 0) {
    const Tile tile = routing.find(tile_index, expert, C::kTileTokens);
    expert = tile.expert;
    const int kb_end = min(blocks_k, kb + left);
    int first_block = blockIdx.x, last_block = blockIdx.x;
    if (kb > 0 || kb_end < blocks_k) {
      first_block = split.owner(tile_index * parts);
      last_block = split.owner(tile_index * parts + parts - 1);
    }
    if (C::kNT == 1 || tile.rows <= 8)
      run_tile<C, 1>(w, tile, kb, kb_end, unit, slot, first_block, last_block);
    else if (C::kNT == 2 || tile.rows <= 16)
      run_tile<C, C::kNT < 2 ? C::kNT : 2>(w, tile, kb, kb_end, unit, slot, first_block, last_block);
    else
      run_tile<C, C::kNT>(w, tile, kb, kb_end, unit, slot, first_block, last_block);
    slot = Warp<C>::next_slot(slot);
    unit += kb_end - kb, left -= kb_end - kb;
    kb = 0, ++tile_index;
  }
}

}  // namespace ccq
