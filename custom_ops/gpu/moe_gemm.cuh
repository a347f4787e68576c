// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for some rows an expert (4 to 32): persistent, split along K, everything streamed through shared memory.
//
// Work. A tile has 16 * kTiles columns and up to 8 * kNT rows (schedule.cuh). One that lies in several blocks' stretches is
// summed from fp32 partial results, always in the order of K (output.cuh).
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
  static_assert(kStages < kRowsStages && kNT >= 2);
  // Of one warp: the ring, then kStages + 1 tiles' columns (units of at most that many tiles are on their way or in work).
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1, kColumnBytes = kR * kPlaneBytes * kPlanes;
  static constexpr int kColumnSlots = kStages + 1, kWarpBytes = Ring<kR, kStages>::kBytes + kColumnSlots * kColumnBytes;
  static constexpr int kRowsBytes = kNT * kRowsUnitBytes;  // a stage of activations
  static constexpr int kBarriers = kWarps * kStages + 2 * kRowsStages + 1;
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;  // of one block
  // Time of a unit by its tile's rows, roughly (schedule.cuh).
  static constexpr int kMostWeight = 6;
  __device__ static constexpr int weight(int rows) { return rows <= 8 ? 3 : rows <= 16 ? 4 : 6; }
  static size_t shared_bytes(int experts) {
    return kWarps * kWarpBytes + kRowsStages * kRowsBytes + 8 * kBarriers + 3 * sizeof(int) * (experts + 1);
  }
};

template <typename C>
struct Warp {
  static constexpr int kR = C::kR;
  const GemmParams& p;
  const Line<C>& line;
  char* const columns;  // shared: [kColumnSlots][kColumnBytes]
  char* const rows;     // shared, of the block: [kRowsStages][kRowsBytes]
  Barrier* const rows_full;
  Barrier* const rows_free;
  const int lane, warp, blocks_k, tiles_n;
  Ring<kR, C::kStages> ring;

  // The end of the rings where units are ordered.
  Walk<C> ahead;
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
  __device__ void request_rows(const Walk<C>& at, int unit) {
    const int stage = unit % C::kRowsStages;
    if (unit >= C::kRowsStages) rows_free[stage].wait((unit / C::kRowsStages + 1) & 1);
    const Tile tile = at.tile(line);
    const int count = (tile.rows + 7) / 8, bytes = tile.rows <= 4 ? kFourRowsBytes : kRowsUnitBytes;
    const char* from = p.prepared.x + (static_cast<size_t>(tile.block) * blocks_k + at.kb) * kRowsUnitBytes;
    const size_t next = static_cast<size_t>(blocks_k) * kRowsUnitBytes;
    char* const to = rows + stage * C::kRowsBytes;
#if CCQ_BULK
    if (lane == 0) {
      rows_full[stage].arrive_and_expect(count * bytes);
      for (int i = 0; i < count; ++i) bulk_copy(to + i * kRowsUnitBytes, from + i * next, bytes, rows_full + stage);
    }
#else
    for (int i = 0; i < count; ++i)
      for (int at = lane * 16; at < bytes; at += 512) copy16(to + i * kRowsUnitBytes + at, from + i * next + at);
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
      ahead.next(line);
    }
    ring.commit();
  }
};

// What a warp has of one unit: its weights in registers, its stage of the ring passed on.
template <typename C>
struct Unit {
  uint4 q[C::kR];
  uint32_t scale[C::kR];
  const char* rows;  // this lane's part of the activations is relative to this
  int stage;         // of the activations

  __device__ void take(Warp<C>& w, int number) {
    const char* const weights = w.ring.unit;
    w.ring.wait();
#pragma unroll
    for (int r = 0; r < C::kR; ++r) {
      q[r] = *reinterpret_cast<const uint4*>(weights + r * 512 + w.lane * 16);
      scale[r] = *reinterpret_cast<const uint16_t*>(weights + C::kR * 512 + r * 16 + w.lane / 4 * 2);
    }
    __syncwarp();  // every lane has what it needs of the stage
    w.request();
    w.ring.next();
    stage = number % C::kRowsStages;
    rows = w.rows + stage * C::kRowsBytes;
    w.rows_full[stage].wait((number / C::kRowsStages) & 1);
  }
  __device__ void leave(Warp<C>& w) const {  // when nothing more is read of the activations
    __syncwarp();
    if (w.lane == 0) w.rows_free[stage].arrive();
  }
};

template <typename C>
__device__ void load_tile_columns(const Warp<C>& w, int slot, Column<C::kPairs> (&column)[C::kR][2]) {
  const char* c = w.columns + slot * C::kColumnBytes;
#pragma unroll
  for (int r = 0; r < C::kR; ++r)
    load_columns<C::kPairs>(c + r * kPlaneBytes, c + (C::kR + r) * kPlaneBytes, w.lane / 4, column[r]);
}

// Units kb..kb_end of one tile of more than 8 rows into `acc`; `number` is the first one's in the block's stretch. kNT:
// blocks of 8 rows that this tile really has.
template <typename C, int kNT>
__device__ void multiply(Warp<C>& w, int kb, int kb_end, int number, int slot, Accumulator<C, kNT>& acc) {
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
  for (bool first = true; kb < kb_end; ++kb, ++number) {
    Unit<C> unit;
    unit.take(w, number);
    if (first) first = false, load_tile_columns(w, slot, column);
    const char* const x = unit.rows + w.lane * 16;
    const char* const sums = unit.rows + 2048 + g * 4;
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
      if (half == 1) unit.leave(w);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t low = half ? unit.q[r].z : unit.q[r].x, high = half ? unit.q[r].w : unit.q[r].y;
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
        const float f0 = half ? nibble<1>(unit.scale[r], magic) : nibble<0>(unit.scale[r], magic);
        const float f1 = half ? nibble<3>(unit.scale[r], magic) : nibble<2>(unit.scale[r], magic);
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

// The same for up to 4 (kSteps = 1) or 8 rows (2), by the integer tensor cores.
template <typename C, int kSteps>
__device__ void multiply_bytes(Warp<C>& w, int kb, int kb_end, int number, int slot, Accumulator<C, 1>& acc) {
  constexpr int kR = C::kR;
  const int g = w.lane / 4, t = w.lane % 4;
  uint32_t four = 4, thirty_two = 32;
  asm volatile("" : "+r"(four), "+r"(thirty_two));
  int o[kR][kSteps][4] = {};
  Column<C::kPairs> column[kR][2];
  for (bool first = true; kb < kb_end; ++kb, ++number) {
    Unit<C> unit;
    unit.take(w, number);
    if (first) first = false, load_tile_columns(w, slot, column);
    const char* const x = unit.rows + 128 + g * 64 + t * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 b[kSteps];
      int2 c[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        b[i] = *reinterpret_cast<const uint4*>(x + i * 1024 + half * 512);
        c[i] = *reinterpret_cast<const int2*>(unit.rows + half * 64 + i * 32 + t * 8);
      }
      if (half == 1) unit.leave(w);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t low = half ? unit.q[r].z : unit.q[r].x, high = half ? unit.q[r].w : unit.q[r].y;
        int d[kSteps][4];
        {
          const ByteWindows a(column[r][0].template codes<0>(low), four, thirty_two);
          const ByteWindows e(column[r][1].template codes<0>(high), four, thirty_two);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) mma_bytes(d[i], a.outer, e.outer, a.inner, e.inner, b[i].x, b[i].y, c[i].x, c[i].y);
        }
        {
          const ByteWindows a(column[r][0].template codes<1>(low), four, thirty_two);
          const ByteWindows e(column[r][1].template codes<1>(high), four, thirty_two);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) mma_bytes(d[i], a.outer, e.outer, a.inner, e.inner, b[i].z, b[i].w);
        }
        const int f0 = unit.scale[r] >> (4 * half) & 15, f1 = unit.scale[r] >> (4 * half + 8) & 15;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          o[r][i][0] += f0 * d[i][0], o[r][i][1] += f0 * d[i][1];
          o[r][i][2] += f1 * d[i][2], o[r][i][3] += f1 * d[i][3];
        }
      }
    }
  }
  // Digits together. Lane t has row t of 4, or rows 2t and 2t + 1 of 8; the latter is what the rest of the kernel wants.
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float v[2];
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        v[i] = fmaf(static_cast<float>(o[r][i][2 * j]), 256.f, static_cast<float>(o[r][i][2 * j + 1]));
      if (kSteps == 1) {
        const float all = v[0];
        v[0] = __shfl_sync(~0u, all, w.lane / 4 * 4 + t % 2 * 2), v[1] = __shfl_sync(~0u, all, w.lane / 4 * 4 + t % 2 * 2 + 1);
      }
      acc.o[r][0][2 * j] = v[0], acc.o[r][0][2 * j + 1] = v[1];
    }
}

template <int kRows>
struct Rows {
  static constexpr int value = kRows;
};

// kRows: 4 and 8 with integers; beyond, blocks of 8 with fp16.
template <typename C, int kRows>
__device__ void run_part(Warp<C>& w, const Walk<C>& at, int kb_end, int number, int slot, Shares<C>& shares) {
  constexpr int kNT = kRows <= 8 ? 1 : kRows / 8;
  Accumulator<C, kNT> acc;
  if constexpr (kRows <= 8) multiply_bytes<C, kRows / 4>(w, at.kb, kb_end, number, slot, acc);
  else multiply<C, kNT>(w, at.kb, kb_end, number, slot, acc);
  // All this is worked out here and not before the loop, to keep it out of its registers; the slot stays until now.
  constexpr float kFactor = kRows <= 8 ? 1.f : 16777216.f;
  float super[C::kR][2];
#pragma unroll
  for (int r = 0; r < C::kR; ++r) {
    const float2 s = load_supers(w.columns + slot * C::kColumnBytes + r * kPlaneBytes, w.lane / 4);
    super[r][0] = s.x * kFactor, super[r][1] = s.y * (kRows <= 8 ? 1.f : kFactor * kUpperColumns);
  }
  finish_part<C, kNT>(w, at, kb_end, super, shares, acc);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) gemm_kernel(const GemmParams p) {
  extern __shared__ __align__(128) char shared[];
  char* const all_rows = shared + C::kWarps * C::kWarpBytes;
  Barrier* const barriers = reinterpret_cast<Barrier*>(all_rows + C::kRowsStages * C::kRowsBytes);
  Barrier *const rows_full = barriers + C::kWarps * C::kStages, *const rows_free = rows_full + C::kRowsStages;
  Barrier* const shares_there = rows_free + C::kRowsStages;
  int* const blocks = reinterpret_cast<int*>(barriers + C::kBarriers);
  int *const rows = blocks + p.experts + 1, *const weights = rows + p.experts + 1;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (lane == 0) {  // one lane after another would take microseconds
    for (int i = 0; i < C::kStages; ++i) barriers[warp * C::kStages + i].init(1);
    if (warp < C::kRowsStages) rows_full[warp].init(CCQ_BULK ? 1 : 32), rows_free[warp].init(C::kWarps);
    if (warp == C::kRowsStages) shares_there->init(C::kWarps);
    publish_barriers();
  }
  scan_offsets<C>(p.offsets, p.experts, p.rows, blocks, rows, weights);

  const int blocks_k = p.k / 128, tiles_n = p.n / 16;
  const Line<C> line(blocks, rows, weights, p.experts, (tiles_n + C::kTiles - 1) / C::kTiles, blocks_k);
  if (static_cast<int>(blockIdx.x) >= line.grid) return;
  Walk<C> walk(line);
  if (walk.left == 0) return;

  char* const own = shared + warp * C::kWarpBytes;
  Warp<C> w{p, line, own + Ring<C::kR, C::kStages>::kBytes, all_rows, rows_full, rows_free, lane, warp, blocks_k,
            tiles_n, Ring<C::kR, C::kStages>(own, barriers + warp * C::kStages), walk};
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) w.request(i, true);
  // Weights and offsets do not depend on the kernel before this one, activations and tickets do.
  wait_for_prerequisites();
  Walk<C> first = walk;
  for (int i = 0; i < C::kStages && first.left > 0; ++i, first.next(line))
    if (i == warp) w.request_rows(first, i);

  Shares<C> shares{shares_there};
  int slot = 0, unit = 0;
  while (walk.left > 0) {
    const int kb_end = min(blocks_k, walk.kb + walk.left), count = line.rows_of(walk.expert, walk.block);
    auto run = [&](auto rows) { run_part<C, decltype(rows)::value>(w, walk, kb_end, unit, slot, shares); };
    if (count <= 4) run(Rows<4>{});
    else if (count <= 8) run(Rows<8>{});
    else if (C::kNT == 2 || count <= 16) run(Rows<16>{});
    else run(Rows<C::kTileTokens>{});  // the same again where a tile has 16 rows
    slot = Warp<C>::next_slot(slot);
    unit += kb_end - walk.kb;
    walk.skip(line, kb_end);
  }
  shares.publish(w);
}

}  // namespace ccq
