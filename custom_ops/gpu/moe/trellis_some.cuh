// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM with CCQ-2T weights for some rows an expert, on Hopper (sm_90a), in integers.
//
// A tile has 512 columns and up to 16 rows, and its weights, decoded once, meet all of them: `wgmma` takes the hash words of the code
// bytes as they stand (trellis.cuh) from registers, and from shared memory activations as signed digits, which a kernel before this
// one has made. A group's sums are integers, exact; they meet the group's scale and are added up as integers, of 64 groups at most.
//
// Work and warps are moe_wide.cuh's: tiles in waves, the remaining ones cut along K; eight or sixteen warps multiply, four request. A stage is 256
// input rows: of each 64 columns one copy of 4 KB, and 4 KB of activations for each 4 rows.
#pragma once

#include "gemm_launch.cuh"
#include "moe_wide.cuh"
#include "trellis_few.cuh"
#include "wide_trellis.cuh"

namespace ccq {

// Of 4 rows and 256 input rows: [4 groups][4 code bytes of a lane][2 hash words][upper digits of 4 rows, lower digits][4 lanes][4 bytes].
constexpr int kTrellisFourRows = kTrellisRowsBytes / 2;

struct IntegerTrellisWeights : TrellisWeights {
  template <bool kBf16>
  __device__ static float2 supers(const char* columns, int tile, int g) {
    const float* const own = reinterpret_cast<const float*>(columns) + tile * 16 + g;
    return make_float2(own[0], own[8]);
  }
};

// kWarps: those that multiply, each kR 16-column tiles. kN: the most rows of a tile; one with half of them or less has code of its own.
template <bool kBf16_, int kWarps_, int kN_, int kStages_>
struct TrellisSomeConfig {
  using Weights = IntegerTrellisWeights;
  static constexpr bool kBf16 = kBf16_;  // the outputs' type
  static constexpr int kWarps = kWarps_, kR = 32 / kWarps, kN = kN_, kNT = kN / 8, kClasses = 2, kStages = kStages_, kMinBlocks = 1, kUnits = 2;
  static constexpr int kProducers = 4, kThreads = (kWarps + kProducers) * 32, kTiles = kR * kWarps;
  // Registers of a thread: 168 or 96 at the beginning; then those of the warps that request, and of those that multiply.
  static constexpr int kProducerRegisters = kWarps == 8 ? 40 : 64, kConsumerRegisters = kWarps == 8 ? 232 : 104;
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

// A row's values become digits of integers with one scale, at their place in blocks of 8 rows (prepare.cuh, first_prepared_block).
static __global__ void __launch_bounds__(kPrepareThreads)
trellis_prepare_kernel(const void* x, const int64_t* offsets, int experts, int k, int dtype, const float* row_scale, int counters, Prepared out) {
  wait_for_prerequisites();
  dependents_may_start();
  __shared__ uint32_t largest_of_warp[kPrepareThreads / 32];
  const int row = blockIdx.x, chunks = k / 16;
  if (row == 0)
    for (int i = threadIdx.x; i < counters; i += kPrepareThreads) out.counters[i] = 0;
  Chunk chunk{};
  if (static_cast<int>(threadIdx.x) < chunks) chunk.load(static_cast<const char*>(x) + static_cast<size_t>(row) * k * 2, threadIdx.x);
  const RowToPrepare own_row(x, offsets, experts, k);
  if (own_row.expert >= experts) return;
  const char* const from = own_row.from;
  const int place = own_row.place(own_row.start());
  const IntegerScale own(own_row.largest(chunk, chunks, dtype, largest_of_warp));
  if (threadIdx.x == 0) out.row_scale[row] = row_scale ? own.back * row_scale[row] : own.back;
  char* const to = out.x + static_cast<size_t>(place / 8) * ((k + 255) / 256) * kTrellisRowsBytes + place % 8 / 4 * kTrellisFourRows + place % 4 * 16;
  // Whole stages: what lies behind the last input row is zero, for weights there are whatever shared memory held.
  for (int c = threadIdx.x; c < (chunks + 15) / 16 * 16; c += kPrepareThreads) {
    if (c >= chunks) chunk = Chunk{};
    else if (c >= kPrepareThreads) chunk.load(from, c);
    float v[16];
    chunk.values(dtype, v);
    char* const at = to + static_cast<size_t>(c / 16) * kTrellisRowsBytes + c / 4 % 4 * 1024 + c % 4 * 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const TrellisDigits d(v[2 * j], v[2 * j + 1], own.scale);
      *reinterpret_cast<uint32_t*>(at + j * 128) = d.upper;
      *reinterpret_cast<uint32_t*>(at + j * 128 + 64) = d.lower;
    }
  }
}

#define CCQ_D4(d, j) "+r"(d[j][0]), "+r"(d[j][1]), "+r"(d[j][2]), "+r"(d[j][3])
// d[64 x 8 * blocks] = a[64 x 32] * b[32 x 8 * blocks], or added to d; unsigned bytes by signed bytes. Of the 64 rows a warp has 16.
template <bool kAdd>
__device__ inline void wgmma_trellis(int (&d)[1][4], const uint32_t (&a)[4], uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %9, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k32.s32.u8.s8 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, p; }\n"
      : CCQ_D4(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0)
      : "memory");
#endif
}
template <bool kAdd>
__device__ inline void wgmma_trellis(int (&d)[2][4], const uint32_t (&a)[4], uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.s32.u8.s8 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p; }\n"
      : CCQ_D4(d, 0), CCQ_D4(d, 1)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0)
      : "memory");
#endif
}
template <bool kAdd>
__device__ inline void wgmma_trellis(int (&d)[4][4], const uint32_t (&a)[4], uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16,%17,%18,%19}, %20, p; }\n"
      : CCQ_D4(d, 0), CCQ_D4(d, 1), CCQ_D4(d, 2), CCQ_D4(d, 3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0)
      : "memory");
#endif
}
// Until at most kPending groups are under way; then d may be read.
template <int kPending, int kBlocks>
__device__ inline void wgmma_wait_for(int (&d)[kBlocks][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %4;\n" : CCQ_D4(d, 0) : "n"(kPending) : "memory");
#pragma unroll
  for (int j = 1; j < kBlocks; ++j) asm volatile("" : CCQ_D4(d, j)::"memory");
#endif
}
#undef CCQ_D4

template <typename C>
struct SomeShared : WideShared<C> {
  // K in stages.
  __device__ static WaveSchedule<C> schedule(const GemmParams& p) {
    return {WideShared<C>::memory() + C::kScheduleAt, p.experts, p.column_tiles, (p.k / 128 + C::kUnits - 1) / C::kUnits};
  }
};

// The warps that request: the first one activations and super scales, the others weights, which need not wait for the activations to
// be made (all that came before that kernel had ended when it let this one start).
template <typename C>
__device__ void produce_some(const GemmParams& p, int own) {
  using S = SomeShared<C>;
  const WaveSchedule<C> schedule = S::schedule(p);
  const int lane = threadIdx.x % 32, tiles_n = p.n / 16, blocks_k = p.k / 128;
  int stage = 0, slot = 0, last_tile = -1;
  uint32_t parity = 1;  // of the round before: passed at once in the first
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
      bulk_copy(to + C::kRowsBytes + four * C::kFour, p.quant + unit * kTrellisUnitBytes, units * kTrellisUnitBytes, full);
    }
    __syncwarp();
    if (++stage == C::kStages) stage = 0, parity ^= 1;
  }
}

template <typename C>
struct SomeWarp : ConsumerWarp<C> {
  __device__ int owner(const WideWorkTile& work, int kb) const { return WaveIterator<C>::owner(SomeShared<C>::schedule(this->p), work, kb); }
  __device__ int blocks_k() const { return (this->p.k / 128 + C::kUnits - 1) / C::kUnits; }
};

// Main loop: `stages` stages of one tile into `acc`; kFours: blocks of 4 rows that are multiplied.
template <typename C, int kFours, int kNT = (kFours + 1) / 2>
__device__ void some_main_loop(SomeWarp<C>& w, int stages, Accumulator<C, kNT>& acc) {
  using S = SomeShared<C>;
  constexpr int kR = C::kR, kAll = C::kUnits * kR;  // 16-column tiles of a stage
  const int lane = w.lane, first = w.warp * kR;
  const char* const own = S::memory() + C::kRowsBytes + first / 4 * C::kFour + first % 4 * 512 + lane * 4;
  const char* const own_sides = S::memory() + C::kRowsBytes + first / 4 * C::kFour + 2048 + first % 4 * 32 + lane / 4 * 4;
  const uint32_t selector = TrellisBefore::selector();
  const bool lower = lane & 2;
  uint32_t addend0 = kTrellisAddend0, addend1 = kTrellisAddend1;
  asm volatile("" : "+r"(addend0), "+r"(addend1));
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc.o[r][nt][j] = 0.f;
  for (int done = 0; done < stages; done += C::kMostGroups / 4) {
    const int to_do = min(stages - done, C::kMostGroups / 4);
    int o[kR][kFours][4] = {}, d[2][kFours][4];
    auto scaled = [&](int (&to)[kFours][4], const int (&from)[kFours][4], int half, uint32_t side) {
      const int f0 = side >> 4 * half & 15, f1 = side >> (8 + 4 * half) & 15;
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        to[j][0] += f0 * from[j][0], to[j][1] += f0 * from[j][1];
        to[j][2] += f1 * from[j][2], to[j][3] += f1 * from[j][3];
      }
    };
    for (int i = 0; i < to_do; ++i) {
      S::full()[w.stage].wait(w.parity);
      const int at = w.stage * C::kStageBytes;
      // 8 columns x 16 bytes; the other hash word's after them.
      const uint64_t b = static_cast<uint64_t>((shared_address(S::memory() + at) & 0x3FFFF) >> 4) | 8ull << 16 |
                         static_cast<uint64_t>(kTrellisFourRows / 16) << 32;
      uint4 q, next;
      uint32_t side, next_side, scales = 0, before, a[2][4][4];
      auto load = [&](int tile) {  // what is read of the stage is asked for a tile ahead
        const int from = at + tile / kR * kTrellisUnitBytes;
        auto word = [&](int j) { return *reinterpret_cast<const uint32_t*>(own + from + tile % kR * 512 + j * 128); };
        next = make_uint4(word(0), word(1), word(2), word(3));
        next_side = *reinterpret_cast<const uint32_t*>(own_sides + from + tile % kR * 32);
      };
      auto begin = [&] {
        q = next, side = next_side;
        before = TrellisBefore(q, side, selector).bytes;
        trellis_decode<0>(q.x, q.y, before, addend0, addend1, a[0]);
      };
      load(0);
      begin();
#pragma unroll
      for (int tile = 0; tile < kAll; ++tile) {
        const int r = tile % kR;
        auto multiply = [&](int half) {
          const uint64_t from = b + tile / kR * 128 + half * 64;
          wgmma_fence();
          wgmma_trellis<false>(d[half], a[half][0], from);
#pragma unroll
          for (int j = 1; j < 4; ++j) wgmma_trellis<true>(d[half], a[half][j], from + j * 16);
          wgmma_commit();
        };
        multiply(0);
        if (tile + 1 < kAll) load(tile + 1);
        if (tile > 0) {
          wgmma_wait_for<1>(d[1]);
          scaled(o[(tile - 1) % kR], d[1], 1, scales);
        }
        trellis_decode<1>(q.z, q.w, before, addend0, addend1, a[1]);
        multiply(1);
        wgmma_wait_for<1>(d[0]);
        scaled(o[r], d[0], 0, side);
        scales = side;
        if (tile + 1 < kAll) begin();
      }
      // None is under way from one stage to the next, or the compiler would run them one after another.
      wgmma_wait_for<0>(d[1]);
      w.release(w.stage);
      scaled(o[kR - 1], d[1], 1, scales);
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
  some_main_loop<C, kFours>(w, work.kb_end - work.kb, acc);
  epilogue<C, kNT>(w, work, signal, acc, [&] { store_wide_tile<C, kNT>(w, work, slot + 128, acc); });
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) trellis_some_kernel(const GemmParams p) {
  using S = SomeShared<C>;
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
      if (WaveSchedule<C>::class_of(work.rows) == 0) run_some_work_tile<C, C::kN / 4>(w, at, signal);
      else run_some_work_tile<C, C::kN / 8>(w, at, signal);
      if (++slot == C::kSlots) slot = 0;
    }
    signal.publish(w);
  }
}

}  // namespace ccq
