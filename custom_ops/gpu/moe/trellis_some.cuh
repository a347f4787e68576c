// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM with CCQ-2T weights for some rows an expert, on Hopper (sm_90a), in integers.
//
// A tile has 512 columns and up to 16 rows, and its weights, decoded once, meet all of them: the tensor cores take the hash words of
// the code bytes as they stand (trellis.cuh) from registers, and activations as signed digits, which a kernel before this one has
// made. A group's sums are integers, exact; they meet the group's scale and are added up as integers, of 64 groups at most.
//
// Work is moe_wide.cuh's: tiles in waves, the remaining ones cut along K. Sixteen warps multiply, four request. A stage is 256 input
// rows: of each 64 columns one copy of 4 KB, and 4 KB of activations for each 4 rows.
//
// A tile's rows are multiplied four at a time. Four alone go through `mma.sync`: it takes 6 cycles in which the scheduler does nothing
// else, `wgmma` with so few columns of activations 13. From eight rows on `wgmma` costs less.
#pragma once

#include "gemm_launch.cuh"
#include "moe_wide.cuh"
#include "trellis_few.cuh"
#include "trellis_prepare.cuh"
#include "trellis_wgmma.cuh"
#include "wide_trellis.cuh"

namespace ccq {

struct IntegerTrellisWeights : TrellisWeights {
  template <bool kBf16>
  __device__ static float2 supers(const char* columns, int tile, int g) {
    const float* const own = reinterpret_cast<const float*>(columns) + tile * 16 + g;
    return make_float2(own[0], own[8]);
  }
};

// kN: the most rows of a tile, 8 or 16, which are multiplied four at a time.
template <bool kBf16_, int kN_>
struct TrellisSomeConfig {
  using Weights = IntegerTrellisWeights;
  static constexpr bool kBf16 = kBf16_;  // the outputs' type
  static constexpr int kN = kN_, kNT = kN / 8, kClasses = 2, kStages = 4, kUnits = 2, kMinBlocks = 1;
  // Sixteen warps multiply, each two 16-column tiles; four request.
  static constexpr int kWarps = 16, kR = 2, kTiles = kR * kWarps, kProducers = 4, kThreads = (kWarps + kProducers) * 32;
  // Registers of a thread: 96 at the beginning; then those of the warps that request, and of those that multiply.
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 112;
  static constexpr int kMostGroups = 64;  // whose sums a 32-bit integer holds: 64 * 15 * 64 * 255 * 128 < 2^31
  // A stage: the activations, four rows after four rows; of each 64 columns two units of weights.
  static constexpr int kRowsBytes = kNT * kTrellisRowsBytes;
  static constexpr int kFour = kUnits * kTrellisUnitBytes, kStageBytes = kRowsBytes + kTiles / 4 * kFour;
  static constexpr int kSlots = kStages + 1, kSlotBytes = 128 + Weights::columns_bytes(kTiles);
  static constexpr int kSlotsAt = kStages * kStageBytes, kBarriersAt = kSlotsAt + kSlots * kSlotBytes;
  static constexpr int kScheduleAt = kBarriersAt + 16 * kStages + 16;
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;
  static constexpr size_t shared_bytes(int experts) { return 1024 + kScheduleAt + WaveSchedule<TrellisSomeConfig>::shared_bytes(experts); }
};

template <typename C>
struct TrellisSomeShared : WideShared<C> {
  // K in stages.
  __device__ static WaveSchedule<C> schedule(const GemmParams& p) {
    return {WideShared<C>::memory() + C::kScheduleAt, p.experts, p.column_tiles, (p.k / 128 + C::kUnits - 1) / C::kUnits};
  }
};

// The warps that request: the first one activations and super scales, the others weights, which need not wait for the activations to
// be made (all that came before that kernel had ended when it let this one start).
template <typename C>
__device__ void produce_some(const GemmParams& p, int own) {
  using S = TrellisSomeShared<C>;
  const WaveSchedule<C> schedule = S::schedule(p);
  const int lane = threadIdx.x % 32, tiles_n = p.n / 16, blocks_k = p.k / 128;
  int stage = 0, slot = 0, last_tile = -1;
  uint32_t parity = 1;  // of the round before: passed at once in the first
  const uint64_t policy = streaming_policy();
  for (WaveIterator<C> at(schedule); at.left > 0; at.next(schedule)) {
    const WideWorkTile work = at.work_tile(schedule);
    const int first = work.column * C::kTiles, there = min(C::kTiles, tiles_n - first), fours = (there + 3) / 4;
    const int kb = work.kb * C::kUnits, units = min(C::kUnits, blocks_k - kb);
    const bool new_tile = at.tile != last_tile;
    last_tile = at.tile;
    S::free()[stage].wait(parity);
    Barrier* const full = S::full() + stage;
    char* const to = S::stage(stage);
    if (own == 0 && lane == 0) {
      const int bytes = (work.rows + 3) / 4 * kTrellisFourRows;
      if (new_tile) *reinterpret_cast<WideWorkTile*>(S::slot(slot)) = work;
      full->arrive_and_expect(bytes + units * fours * kTrellisUnitBytes + (new_tile ? C::Weights::columns_bytes(there) : 0));
      const size_t next = static_cast<size_t>(schedule.blocks_k) * kTrellisRowsBytes;
      const char* const from = p.prepared.x + (first_prepared_block(work.row - work.block * C::kN, work.expert) + work.block * C::kNT) * next +
                               static_cast<size_t>(work.kb) * kTrellisRowsBytes;
      for (int i = 0; i * kTrellisRowsBytes < bytes; ++i)
        bulk_copy(to + i * kTrellisRowsBytes, from + i * next, min(kTrellisRowsBytes, bytes - i * kTrellisRowsBytes), full);
    }
    if (new_tile) {
      if (own == 0) C::Weights::template request_columns<C::kTiles>(p, work.expert, first, there, S::slot(slot) + 128, full);
      if (++slot == C::kSlots) slot = 0;
    }
    const int four = own - 1 + lane * (C::kProducers - 1);
    if (own > 0 && four < fours) {
      const size_t unit = (static_cast<size_t>(work.expert) * ((tiles_n + 3) / 4) + first / 4 + four) * blocks_k + kb;
      // Weights leave the cache before activations do, which all column tiles read.
      bulk_copy(to + C::kRowsBytes + four * C::kFour, p.quant + unit * kTrellisUnitBytes, units * kTrellisUnitBytes, full, policy);
    }
    __syncwarp();
    if (++stage == C::kStages) stage = 0, parity ^= 1;
  }
}

template <typename C>
struct SomeWarp : ConsumerWarp<C> {
  __device__ int owner(const WideWorkTile& work, int kb) const { return WaveIterator<C>::owner(TrellisSomeShared<C>::schedule(this->p), work, kb); }
  __device__ int blocks_k() const { return (this->p.k / 128 + C::kUnits - 1) / C::kUnits; }
};

// What a warp reads of a stage: its kUnits * kR pieces of a 16-column tile and 128 input rows, two groups each.
template <typename C>
struct SomePieces {
  struct Raw {
    uint4 codes;
    uint32_t side;
  };
  struct Piece : Raw {
    uint32_t before;
  };
  const char *codes, *sides;  // a lane's, of the warp's first tile in stage 0
  const uint32_t selector = TrellisBefore::selector();
  uint32_t addend0 = kTrellisAddend0, addend1 = kTrellisAddend1;

  __device__ explicit SomePieces(const SomeWarp<C>& w) {
    const int first = w.warp * C::kR;
    const char* const at = TrellisSomeShared<C>::memory() + C::kRowsBytes + first / 4 * C::kFour;
    codes = at + first % 4 * 512 + w.lane * 16, sides = at + 2048 + first % 4 * 32 + w.lane / 4 * 4;
    asm volatile("" : "+r"(addend0), "+r"(addend1));
  }
  // Piece i: unit i / kR, tile i % kR. `stage`: the stage's offset.
  __device__ Raw load(int stage, int i) const {
    const int at = stage + i / C::kR * kTrellisUnitBytes;
    return {load_words(codes + at + i % C::kR * 512), *reinterpret_cast<const uint32_t*>(sides + at + i % C::kR * 32)};
  }
  __device__ Piece begin(const Raw& raw) const { return {raw, TrellisBefore(raw.codes, raw.side, selector).bytes}; }
  __device__ void decode(const Piece& p, int group, uint32_t (&a)[4][4]) const {
    if (group == 0) trellis_decode<0>(p.codes.x, p.codes.y, p.before, addend0, addend1, a);
    else trellis_decode<1>(p.codes.z, p.codes.w, p.before, addend0, addend1, a);
  }
};

// Adds a group's sums, times its scales, to a tile's.
template <int kFours>
__device__ inline void add_scaled(int (&to)[kFours][4], const int (&sums)[kFours][4], int group, uint32_t side) {
  const int f0 = side >> 4 * group & 15, f1 = side >> (8 + 4 * group) & 15;
#pragma unroll
  for (int f = 0; f < kFours; ++f) {
    to[f][0] += f0 * sums[f][0], to[f][1] += f0 * sums[f][1];
    to[f][2] += f1 * sums[f][2], to[f][3] += f1 * sums[f][3];
  }
}

// A stage of a tile of up to four rows, by `mma.sync`, which takes less than `wgmma` there. A group's sums meet their scales while the
// next group is multiplied.
template <typename C>
__device__ void some_stage(const SomePieces<C>& pieces, SomeWarp<C>& w, int stage, int (&o)[C::kR][1][4]) {
  constexpr int kR = C::kR, kGroups = 2 * C::kUnits;
  const char* const rows = TrellisSomeShared<C>::memory() + stage + w.lane * 16;
  typename SomePieces<C>::Raw next[kR];
  typename SomePieces<C>::Piece piece[kR];
  int d[2][kR][1][4];
  uint32_t scales[kR];
  auto load = [&](int unit) {  // asked for a unit ahead
#pragma unroll
    for (int r = 0; r < kR; ++r) next[r] = pieces.load(stage, unit * kR + r);
  };
  load(0);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int set = group % 2;
    if (group % 2 == 0) {
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        scales[r] = piece[r].side;
        piece[r] = pieces.begin(next[r]);
      }
      if (group + 2 < kGroups) load(group / 2 + 1);
    }
#pragma unroll
    for (int two = 0; two < 2; ++two) {  // a lane's code bytes, two by two
      uint32_t a[kR][4][4];
#pragma unroll
      for (int r = 0; r < kR; ++r) pieces.decode(piece[r], group % 2, a[r]);
      const uint4 x = load_words(rows + group * 1024 + two * 512);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t(&e)[4] = a[r][2 * two];
        if (two == 0) mma_bytes(d[set][r][0], e[0], e[1], e[2], e[3], x.x, x.y, 0, 0);
        else mma_bytes(d[set][r][0], e[0], e[1], e[2], e[3], x.x, x.y);
      }
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t(&e)[4] = a[r][2 * two + 1];
        mma_bytes(d[set][r][0], e[0], e[1], e[2], e[3], x.z, x.w);
      }
      if (two == 0 && group > 0)
#pragma unroll
        for (int r = 0; r < kR; ++r) add_scaled(o[r], d[set ^ 1][r], set ^ 1, set ? piece[r].side : scales[r]);
    }
  }
  w.release(w.stage);
#pragma unroll
  for (int r = 0; r < kR; ++r) add_scaled(o[r], d[1][r], 1, piece[r].side);
}

// The same of more rows, by `wgmma`. With up to eight a group is decoded while the one before is multiplied; more would not fit
// registers, and other warps decode meanwhile.
template <typename C, int kFours>
__device__ void some_stage(const SomePieces<C>& pieces, SomeWarp<C>& w, int stage, int (&o)[C::kR][kFours][4]) {
  constexpr int kR = C::kR, kAll = C::kUnits * kR, kBuffers = kFours > 2 ? 1 : 2;
  // 8 columns x 16 bytes; the other hash word's after them.
  const uint64_t rows = static_cast<uint64_t>((shared_address(TrellisSomeShared<C>::memory() + stage) & 0x3FFFF) >> 4) | 8ull << 16 |
                        static_cast<uint64_t>(kTrellisFourRows / 16) << 32;
  typename SomePieces<C>::Raw next = pieces.load(stage, 0);  // asked for a piece ahead
  int d[kBuffers][kFours][4];
  uint32_t a[kBuffers][4][4];
  auto multiply = [&](int i, int group) {
    const int buffer = group % kBuffers;
    const uint64_t from = rows + i / kR * 128 + group * 64;
    wgmma_fence();
    wgmma_trellis<false>(d[buffer], a[buffer][0], from);
#pragma unroll
    for (int j = 1; j < 4; ++j) wgmma_trellis<true>(d[buffer], a[buffer][j], from + j * 16);
    wgmma_commit();
  };
  if constexpr (kBuffers == 1) {
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      const typename SomePieces<C>::Piece piece = pieces.begin(next);
      if (i + 1 < kAll) next = pieces.load(stage, i + 1);
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        pieces.decode(piece, group, a[0]);
        multiply(i, group);
        wgmma_wait_for<0>(d[0]);
        if (i + 1 == kAll && group == 1) w.release(w.stage);
        add_scaled(o[i % kR], d[0], group, piece.side);
      }
    }
  } else {
    typename SomePieces<C>::Piece piece = pieces.begin(next);
    uint32_t scales = 0;
    pieces.decode(piece, 0, a[0]);
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      multiply(i, 0);
      if (i + 1 < kAll) next = pieces.load(stage, i + 1);
      if (i > 0) {
        wgmma_wait_for<1>(d[1]);
        add_scaled(o[(i - 1) % kR], d[1], 1, scales);
      }
      pieces.decode(piece, 1, a[1]);
      multiply(i, 1);
      wgmma_wait_for<1>(d[0]);
      add_scaled(o[i % kR], d[0], 0, piece.side);
      scales = piece.side;
      if (i + 1 < kAll) {
        piece = pieces.begin(next);
        pieces.decode(piece, 0, a[0]);
      }
    }
    // None is under way from one stage to the next, or the compiler would run them one after another.
    wgmma_wait_for<0>(d[1]);
    w.release(w.stage);
    add_scaled(o[kR - 1], d[1], 1, scales);
  }
}

// Main loop: `stages` stages of one tile into `acc`; kFours: blocks of 4 rows that are multiplied.
template <typename C, int kFours, int kNT = (kFours + 1) / 2>
__device__ void trellis_some_loop(SomeWarp<C>& w, int stages, Accumulator<C, kNT>& acc) {
  constexpr int kR = C::kR, kMost = C::kMostGroups / (2 * C::kUnits);
  const SomePieces<C> pieces(w);
  const bool lower = w.lane & 2;
  acc.clear();
  for (int done = 0; done < stages; done += kMost) {
    const int to_do = min(stages - done, kMost);
    int o[kR][kFours][4] = {};
#pragma unroll 1
    for (int i = 0; i < to_do; ++i) {
      TrellisSomeShared<C>::full()[w.stage].wait(w.parity);
      some_stage<C>(pieces, w, w.stage * C::kStageBytes, o);
      if (++w.stage == C::kStages) w.stage = 0, w.parity ^= 1;
    }
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          // Of 4 rows lanes t = 0 and 1 have upper digits, t = 2 and 3 lower ones. After an exchange lane t has rows 2t and 2t + 1 of 8.
          const int left = o[r][2 * nt][j], right = 2 * nt + 1 < kFours ? o[r][min(2 * nt + 1, kFours - 1)][j] : 0;
          const int got = __shfl_xor_sync(~0u, lower ? left : right, 2);
          acc.o[r][nt][j] += fmaf(static_cast<float>(lower ? got : left), 256.f, static_cast<float>(lower ? right : got));
        }
  }
}

template <typename C, int kFours>
__device__ void run_some_work_tile(SomeWarp<C>& w, const char* slot, PartialSignal<C>& signal) {
  const WideWorkTile& work = *reinterpret_cast<const WideWorkTile*>(slot);
  constexpr int kNT = (kFours + 1) / 2;
  Accumulator<C, kNT> acc;
  trellis_some_loop<C, kFours>(w, work.kb_end - work.kb, acc);
  epilogue<C, kNT>(w, work, signal, acc, [&] { store_wide_tile<C, kNT>(w, work, slot + 128, acc); });
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) trellis_some_kernel(const GemmParams p) {
  using S = TrellisSomeShared<C>;
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (lane == 0) {
    if (warp < C::kStages) S::full()[warp].init(1), S::free()[warp].init(C::kWarps * kWarpArrivals);
    if (warp == C::kWarps) S::partials_stored()->init(C::kWarps * kWarpArrivals);
    publish_barriers();
  }
  const WaveSchedule<C> schedule = S::schedule(p);
  schedule.prepare(p.offsets, p.rows);
  if (warp >= C::kWarps) {
    deallocate_registers<C::kProducerRegisters>();
    if (warp == C::kWarps) wait_for_prerequisites();
    produce_some<C>(p, warp - C::kWarps);
  } else {
    wait_for_prerequisites();
    allocate_registers<C::kConsumerRegisters>();
    SomeWarp<C> w{{p, lane, warp}};
    PartialSignal<C> signal{S::partials_stored()};
    int left = WaveIterator<C>(schedule).left, slot = 0;
    while (left > 0) {
      S::full()[w.stage].wait(w.parity);  // the description of the work tile comes with its first stage
      const char* const at = S::slot(slot);
      const WideWorkTile& work = *reinterpret_cast<const WideWorkTile*>(at);
      left -= work.kb_end - work.kb;
      if (work.rows <= 4) run_some_work_tile<C, 1>(w, at, signal);
      else if (C::kN == 8 || work.rows <= 8) run_some_work_tile<C, 2>(w, at, signal);
      else if (work.rows <= 12) run_some_work_tile<C, C::kN == 8 ? 2 : 3>(w, at, signal);
      else run_some_work_tile<C, C::kN == 8 ? 2 : 4>(w, at, signal);
      if (++slot == C::kSlots) slot = 0;
    }
    signal.publish(w);
  }
}

}  // namespace ccq
