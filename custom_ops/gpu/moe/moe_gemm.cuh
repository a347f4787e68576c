// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for some rows an expert (up to 32 a tile): a persistent kernel with a stream-K scheduler, everything
// streamed through shared memory.
//
// Work. A tile has 16 * kTiles columns and up to 8 * kNT rows (stream_k.cuh). One that is split among blocks is summed from
// fp32 partial results, always in the order of K (epilogue.cuh).
//
// Warps. A warp owns kR tiles of 16 columns and fetches their weights through its own ring (ring.cuh). Activations are the
// same for all warps: they go through a ring of the block's, which warps fill in turn, one unit each, when they request its
// weights. That ring is longer, so warps may drift kRowsStages - kStages units apart before one waits for another. Both
// rings run on across tiles.
//
// Registers are what this kernel is short of (16 warps leave 128). So only the producer side of the rings keeps the position
// in the scheduler's order of units, and what the epilogue needs to know of a tile lies in shared memory beside the tile's
// columns; everything in shared memory has an address that the compiler knows.
#pragma once

#include "epilogue.cuh"
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
  // Of one warp: the ring, then for kStages + 1 tiles (units of at most that many are on their way or in work) a WorkTile and
  // its columns.
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1, kColumnBytes = kR * kPlaneBytes * kPlanes;
  static constexpr int kSlots = kStages + 1, kSlotBytes = 32 + kColumnBytes;
  static constexpr int kWarpBytes = Ring<kR, kStages>::kBytes + kSlots * kSlotBytes;
  static constexpr int kRowsBytes = kNT * kRowsUnitBytes;  // a stage of activations
  static constexpr int kBarriers = kWarps * kStages + 2 * kRowsStages + 1;
  static constexpr int kRowsAt = kWarps * kWarpBytes, kBarriersAt = kRowsAt + kRowsStages * kRowsBytes;
  static constexpr int kScheduleAt = kBarriersAt + 8 * kBarriers + 8;
  static_assert(sizeof(WorkTile) == 32 && kBarriers % 2 == 1);
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;  // of one block
  // Time of a unit by its tile's rows, roughly (stream_k.cuh).
  static constexpr int kMaxWeight = kNT == 2 ? 11 : 18;
  __host__ __device__ static constexpr int weight(int rows) { return rows <= 8 ? 8 : rows <= 16 ? 11 : 18; }
  static constexpr size_t shared_bytes(int experts) { return kScheduleAt + StreamK<Config>::shared_bytes(experts); }
};

template <typename C>
struct Warp {
  static constexpr int kR = C::kR;
  const GemmParams& p;
  const int lane, warp;
  Ring<kR, C::kStages> ring;

  // The producer side of the rings: the next unit to be requested.
  UnitIterator<C> producer;
  int producer_unit = 0;    // its number in the block's range
  int producer_slot = 0;
  int producer_tiles = 0;   // tiles of this warp's that are there
  int producer_stride = 0;  // units from one block of 128 rows to the next
  uint32_t producer_index = 0;

  __device__ static char* shared() {
    extern __shared__ __align__(128) char memory[];
    return memory;
  }
  __device__ static Barrier* barriers() { return reinterpret_cast<Barrier*>(shared() + C::kBarriersAt); }
  __device__ static Barrier* rows_full() { return barriers() + C::kWarps * C::kStages; }
  __device__ static Barrier* rows_free() { return rows_full() + C::kRowsStages; }
  __device__ static char* rows(int stage) { return shared() + C::kRowsAt + stage * C::kRowsBytes; }
  __device__ static int next_slot(int slot) { return slot + 1 == C::kSlots ? 0 : slot + 1; }
  __device__ static StreamK<C> schedule(const GemmParams& p) {
    return {shared() + C::kScheduleAt, p.experts, p.column_tiles, p.k / 128};
  }
  __device__ StreamK<C> schedule() const { return schedule(p); }
  __device__ static int first_row(int, int nt) { return nt * 8; }  // of an accumulator
  __device__ int blocks_k() const { return p.k / 128; }  // units of a tile
  __device__ int owner(const WorkTile& work, int kb) const { return schedule().owner(work.expert, work.column, work.block, kb); }
  __device__ char* slot(int number) const {
    return shared() + warp * C::kWarpBytes + Ring<kR, C::kStages>::kBytes + number * C::kSlotBytes;
  }
  __device__ int tile16(int column) const { return column * C::kTiles + warp * kR; }

  // A tile's columns, on the barrier of its first unit, and what else will be wanted of it.
  __device__ void request_tile(int t16, int stage) {
    char* const to = slot(producer_slot);
    if (lane == 0) *reinterpret_cast<WorkTile*>(to) = producer.work_tile(schedule());
    const int tiles_n = p.n / 16;
    const uint32_t* from = p.columns + (static_cast<size_t>(producer.expert) * tiles_n + t16) * 32;
    const size_t plane = static_cast<size_t>(p.experts) * tiles_n * 32;
#if CCQ_BULK
    if (lane == 0) {
      ring.full[stage].expect(producer_tiles * kPlaneBytes * C::kPlanes);
#pragma unroll
      for (int j = 0; j < C::kPlanes; ++j)
        bulk_copy(to + 32 + j * (kR * kPlaneBytes), from + j * plane, producer_tiles * kPlaneBytes, ring.full + stage);
    }
#else
#pragma unroll
    for (int j = 0; j < C::kPlanes; ++j)
      if (lane < producer_tiles * 8) copy16(to + 32 + j * (kR * kPlaneBytes) + lane * 16, from + j * plane + lane * 4);
#endif
    producer_slot = next_slot(producer_slot);
  }

  // The activations of a unit, once all warps have left what lay there.
  __device__ void request_rows(const UnitIterator<C>& at, int unit) {
    const int stage = unit % C::kRowsStages;
    if (unit >= C::kRowsStages) rows_free()[stage].wait((unit / C::kRowsStages + 1) & 1);
    const WorkTile work = at.work_tile(schedule());
    const int count = (work.rows + 7) / 8, bytes = work.rows <= 4 ? kFourRowsBytes : kRowsUnitBytes, blocks_k = p.k / 128;
    const char* from = p.prepared.x + (static_cast<size_t>(work.prepared_block) * blocks_k + work.kb) * kRowsUnitBytes;
    const size_t next = static_cast<size_t>(blocks_k) * kRowsUnitBytes;
    char* const to = rows(stage);
#if CCQ_BULK
    if (lane == 0) {
      rows_full()[stage].arrive_and_expect(count * bytes);
      for (int i = 0; i < count; ++i) bulk_copy(to + i * kRowsUnitBytes, from + i * next, bytes, rows_full() + stage);
    }
#else
    for (int i = 0; i < count; ++i)
      for (int at = lane * 16; at < bytes; at += 512) copy16(to + i * kRowsUnitBytes + at, from + i * next + at);
    rows_full()[stage].arrive_after_copies();
#endif
  }

  // The next unit of the block's range, or nothing: weights into the stage that all lanes have left (`stage` stages after it),
  // with a tile's first unit its columns, and by each warp in turn the activations.
  __device__ void request(int stage = 0, bool beginning = false) {
    if (producer.left > 0) {
      if (producer.kb == 0 || (beginning && stage == 0)) {
        static_assert(4 % kR == 0, "a warp's tiles lie in one group of four");
        // A warp right of the last column reads the last tiles and writes nothing.
        const int tiles_n = p.n / 16, t16 = min(tile16(producer.column), (tiles_n - 1) / kR * kR);
        producer_stride = min(4, tiles_n - t16 / 4 * 4), producer_tiles = min(kR, producer_stride - t16 % 4);
        producer_index = static_cast<uint32_t>(ccq_unit_index(producer.expert, t16, producer.kb, tiles_n, p.k / 128));
        request_tile(t16, stage);
      }
      ring.fetch(p.quant + static_cast<size_t>(producer_index) * 512, p.scales + static_cast<size_t>(producer_index) * 16,
                 producer_tiles, stage);
      if (!beginning && producer_unit % C::kWarps == warp) request_rows(producer, producer_unit);
      ++producer_unit, producer_index += producer_stride;
      producer.next(schedule());
    }
    ring.commit();
  }
};

// What a warp has of one unit: half of its codes at a time, to save registers.
template <typename C>
struct Unit {
  uint2 q[C::kR];
  uint32_t scale[C::kR];
  const char* rows;  // this lane's part of the activations is relative to this
  int stage;         // of the activations

  // Group 0: once it is there. Group 1: passes the ring's stage on.
  template <int kGroup>
  __device__ void load(Warp<C>& w, int number) {
    if (kGroup == 0) w.ring.wait();
    const char* const weights = w.ring.unit;
#pragma unroll
    for (int r = 0; r < C::kR; ++r) {
      q[r] = *reinterpret_cast<const uint2*>(weights + r * 512 + w.lane * 16 + kGroup * 8);
      if (kGroup == 0) scale[r] = *reinterpret_cast<const uint16_t*>(weights + C::kR * 512 + r * 16 + w.lane / 4 * 2);
    }
    if (kGroup == 1) {
      __syncwarp();  // every lane has what it needs of the stage
      w.request();
      w.ring.next();
    } else {
      stage = number % C::kRowsStages;
      rows = Warp<C>::rows(stage);
      Warp<C>::rows_full()[stage].wait((number / C::kRowsStages) & 1);
    }
  }
  __device__ void release(const Warp<C>& w) const {  // when nothing more is read of the activations
    Warp<C>::rows_free()[stage].arrive_together();
  }
};

template <typename C>
__device__ void load_tile_columns(const Warp<C>& w, int slot, Column<C::kPairs> (&column)[C::kR][2]) {
  const char* c = w.slot(slot) + 32;
#pragma unroll
  for (int r = 0; r < C::kR; ++r)
    load_columns<C::kPairs>(c + r * kPlaneBytes, c + (C::kR + r) * kPlaneBytes, w.lane / 4, column[r]);
}

// Main loop: `units` units of one tile of more than 4 rows into `acc`; `number` is the first one's in the block's range. kNT:
// blocks of 8 rows that this tile really has.
template <typename C, int kNT>
__device__ void main_loop(Warp<C>& w, int units, int number, int slot, Accumulator<C, kNT>& acc) {
  constexpr int kR = C::kR;
  const int t = w.lane % 4;
  acc.clear();

  // A constant kept in a register: p.k is positive, but the compiler does not know.
  const uint32_t magic = kMagic | (w.p.k & 0x80000000u);
  Column<C::kPairs> column[kR][2];
  for (int i = 0; i < units; ++i, ++number) {
    Unit<C> unit;
    unit.template load<0>(w, number);
    if (i == 0) load_tile_columns(w, slot, column);
    const char* const x = unit.rows + 128 + w.lane * 16;
    const char* const offsets = unit.rows + t * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1) unit.template load<1>(w, number);
      uint4 b[kNT][2];
      float4 s[kNT];
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b[nt][i] = *reinterpret_cast<const uint4*>(x + nt * kRowsUnitBytes + half * 1024 + i * 512);
        s[nt] = *reinterpret_cast<const float4*>(offsets + nt * kRowsUnitBytes + half * 64);
      }
      if (half == 1) unit.release(w);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t low = unit.q[r].x, high = unit.q[r].y;
        float d[kNT][4];
        {
          const Windows a(column[r][0].template codes<0>(low)), c(column[r][1].template codes<0>(high));
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
            mma(d[nt], a.w[0], c.w[0], a.w[1], c.w[1], b[nt][0].x, b[nt][0].y, s[nt]);
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

// The same for up to 4 rows, by the integer tensor cores. (From 5 rows on, which need two steps for fp16's one, they are
// slower.)
template <typename C>
__device__ void integer_main_loop(Warp<C>& w, int units, int number, int slot, Accumulator<C, 1>& acc) {
  constexpr int kR = C::kR;
  const int t = w.lane % 4;
  uint32_t four = 4;
  asm volatile("" : "+r"(four));
  int o[kR][4] = {};
  Column<C::kPairs> column[kR][2];
  for (int i = 0; i < units; ++i, ++number) {
    Unit<C> unit;
    unit.template load<0>(w, number);
    if (i == 0) load_tile_columns(w, slot, column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1) unit.template load<1>(w, number);
      const uint4 b = *reinterpret_cast<const uint4*>(unit.rows + 128 + half * 512 + w.lane * 16);
      const int2 c = *reinterpret_cast<const int2*>(unit.rows + half * 32 + t * 8);
      if (half == 1) unit.release(w);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t low = unit.q[r].x, high = unit.q[r].y;
        int d[4];
        {
          const ByteWindows a(column[r][0].template codes<0>(low), four);
          const ByteWindows e(column[r][1].template codes<0>(high), four);
          mma_bytes(d, a.even, e.even, a.odd, e.odd, b.x, b.y, c.x, c.y);
        }
        {
          const ByteWindows a(column[r][0].template codes<1>(low), four);
          const ByteWindows e(column[r][1].template codes<1>(high), four);
          mma_bytes(d, a.even, e.even, a.odd, e.odd, b.z, b.w);
        }
        const int f0 = unit.scale[r] >> (4 * half) & 15, f1 = unit.scale[r] >> (4 * half + 8) & 15;
        o[r][0] += f0 * d[0], o[r][1] += f0 * d[1], o[r][2] += f1 * d[2], o[r][3] += f1 * d[3];
      }
    }
  }
  // Digits together. Lane t has row t; what comes after wants rows 2t and 2t + 1.
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float v = fmaf(static_cast<float>(o[r][2 * j]), 256.f, static_cast<float>(o[r][2 * j + 1]));
#pragma unroll
      for (int i = 0; i < 2; ++i) acc.o[r][0][2 * j + i] = __shfl_sync(~0u, v, w.lane / 4 * 4 + t % 2 * 2 + i);
    }
}

template <int kRows>
struct Rows {
  static constexpr int value = kRows;
};

// kRows: 4 with integers, 8 and more with fp16.
template <typename C, int kRows>
__device__ void run_work_tile(Warp<C>& w, int units, int number, int slot, PartialSignal<C>& signal) {
  constexpr int kNT = kRows <= 8 ? 1 : kRows / 8;
  Accumulator<C, kNT> acc;
  if constexpr (kRows <= kMostIntegerRows) integer_main_loop<C>(w, units, number, slot, acc);
  else main_loop<C, kNT>(w, units, number, slot, acc);
  constexpr bool kIntegers = kRows <= kMostIntegerRows;
  constexpr float kFactor = kIntegers ? 1.f : 16777216.f, kUpper = kIntegers ? 1.f : kFactor * kUpperColumns;
  float super[C::kR][2];
#pragma unroll
  for (int r = 0; r < C::kR; ++r) {
    const float2 s = load_supers(w.slot(slot) + 32 + r * kPlaneBytes, w.lane / 4);
    super[r][0] = s.x * kFactor, super[r][1] = s.y * kUpper;
  }
  const WorkTile& work = *reinterpret_cast<const WorkTile*>(w.slot(slot));
  epilogue<C, kNT>(w, work, signal, acc, [&] { store_tile<C, kNT>(w, work, super, acc); });
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) gemm_kernel(const GemmParams p) {
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Barrier *const barriers = Warp<C>::barriers(), *const partials_stored = barriers + C::kBarriers - 1;
  if (lane == 0) {  // one lane after another would take microseconds
    for (int i = 0; i < C::kStages; ++i) barriers[warp * C::kStages + i].init(1);
    if (warp < C::kRowsStages) {
      Warp<C>::rows_full()[warp].init(CCQ_BULK ? 1 : 32);
      Warp<C>::rows_free()[warp].init(C::kWarps * kWarpArrivals);
    }
    if (warp == C::kRowsStages) partials_stored->init(C::kWarps * kWarpArrivals);
    publish_barriers();
  }
  const StreamK<C> schedule = Warp<C>::schedule(p);
  schedule.prepare(p.offsets, p.rows);
  if (static_cast<int>(blockIdx.x) >= schedule.header().grid) return;
  const UnitIterator<C> start(schedule);
  int left = start.left;
  if (left == 0) return;

  Warp<C> w{p, lane, warp,
            Ring<C::kR, C::kStages>(Warp<C>::shared() + warp * C::kWarpBytes, barriers + warp * C::kStages), start};
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) w.request(i, true);
  // Weights and offsets do not depend on the kernel before this one, activations and counters do.
  wait_for_prerequisites();
  UnitIterator<C> first = start;
  for (int i = 0; i < C::kStages && first.left > 0; ++i, first.next(schedule))
    if (i == warp) w.request_rows(first, i);

  PartialSignal<C> signal{partials_stored};
  int slot = 0, number = 0;
  __syncwarp();
  while (left > 0) {
    const WorkTile* const work = reinterpret_cast<const WorkTile*>(w.slot(slot));
    const int units = work->kb_end - work->kb, count = work->rows;
    auto run = [&](auto rows) { run_work_tile<C, decltype(rows)::value>(w, units, number, slot, signal); };
    if (count <= 4) run(Rows<4>{});
    else if (count <= 8) run(Rows<8>{});
    else if (C::kNT == 2 || count <= 16) run(Rows<16>{});
    else run(Rows<C::kTileTokens>{});  // the same again where a tile has 16 rows
    slot = Warp<C>::next_slot(slot);
    number += units, left -= units;
  }
  signal.publish(w);
}

}  // namespace ccq
