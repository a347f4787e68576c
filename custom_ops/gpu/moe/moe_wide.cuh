// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for many rows an expert, on Hopper's warpgroup tensor instructions (sm_90a).
//
// A tile has up to kN rows, and the weights, decoded once, meet all of them: `wgmma` takes A (weights) from the registers
// that wide_weights.cuh fills, and B (activations, as the caller has them) from shared memory. Scaling accumulators group by
// group, as moe_gemm.cuh does, would cost per row; so the scales are in the weights, and accumulators run through all of K.
//
// Warp specialization. Producers, one warp or four, request everything, weights and activations, by bulk copies into a ring of
// stages, and do nothing else (with idle warps they make a warpgroup, so that it can hand its registers over). The eight consumer
// warps, two warpgroups, wait for full stages and release them, each at its own pace. Every copy is an instruction, and dozens of
// cycles, of its own: so few, large ones. The kernel is persistent; tiles go in waves (waves.cuh).
#pragma once

#include <cuda.h>

#include "epilogue.cuh"
#include "waves.cuh"
#include "wgmma.cuh"
#include "wide_weights.cuh"

namespace ccq {

// kR: 16-column tiles a warp; kN: the most rows of a tile.
// Weights_: their format (wide_weights.cuh, wide_trellis.cuh).
// kUnits: of a stage, each 128 input rows.
template <typename Weights_, bool kBf16_, int kR_, int kN_, int kStages_, int kUnits_ = 1>
struct WideConfig {
  using Weights = Weights_;
  // The outputs' type; the operands'.
  static constexpr bool kBf16 = kBf16_, kBf16Operands = kBf16 && !Weights::kHalves;
  static constexpr int kR = kR_, kN = kN_, kNT = kN / 8, kStages = kStages_, kUnits = kUnits_, kMinBlocks = 1;
  // A tile multiplies half of kN rows or all, each with code of its own; all where registers do not suffice for two codes: with 144
  // rows, whose accumulators and weights take 176 of them, and with three codes the compiler would serialize `wgmma`.
  static constexpr int kClasses = kN == 144 ? 1 : 2;
  // Consumer warps; producers, one where a stage is few copies. They and idle warps are a warpgroup.
  static constexpr int kWarps = 8, kProducers = kUnits > 1 ? 4 : 1, kThreads = (kWarps + 4) * 32;
  static constexpr int kTiles = kR * kWarps;
  // Registers of a thread: 168 at the beginning; then those of the producers and of the consumers.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  // A stage: the activations in groups of 64 values along K, [2 kUnits][kN rows][128 bytes], the 16-byte pieces of row r at r % 8 ^
  // their place (the 128-byte swizzle); the tiles' weights.
  static constexpr int kRowsGroup = kN * 128, kRowsBytes = 2 * kUnits * kRowsGroup, kWeightsBytes = kUnits * Weights::unit_bytes(kTiles);
  // Stages lie on borders of 1024 bytes. With 256 rows, of which the least memory is left, the weights of all lie behind the stages.
  static constexpr bool kWeightsApart = kN == 256;
  static constexpr int kStageBytes = kWeightsApart ? kRowsBytes : (kRowsBytes + kWeightsBytes + 1023) / 1024 * 1024;
  // Tiles on their way or in work: a WideWorkTile and the columns of each.
  static constexpr int kSlots = kStages + 1, kSlotBytes = 128 + Weights::columns_bytes(kTiles);
  static constexpr int kSlotsAt = kStages * (kStageBytes + (kWeightsApart ? kWeightsBytes : 0)), kBarriersAt = kSlotsAt + kSlots * kSlotBytes;
  static constexpr int kScheduleAt = kBarriersAt + 16 * kStages + 16;
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;
  static constexpr size_t shared_bytes(int experts) { return 1024 + kScheduleAt + WaveSchedule<WideConfig>::shared_bytes(experts); }
};

// Shared memory, by whoever needs it: its addresses are known, so nothing of it stays in registers.
template <typename C>
struct WideShared {
  __device__ static char* memory() {  // swizzled stages lie on borders of 1024 bytes
    extern __shared__ __align__(128) char shared[];
    return shared + (-static_cast<int>(shared_address(shared)) & 1023);
  }
  __device__ static char* stage(int i) { return memory() + i * C::kStageBytes; }
  __device__ static char* weights(int i) {
    return C::kWeightsApart ? memory() + C::kStages * C::kStageBytes + i * C::kWeightsBytes : stage(i) + C::kRowsBytes;
  }
  __device__ static char* slot(int i) { return memory() + C::kSlotsAt + i * C::kSlotBytes; }
  __device__ static Barrier* full() { return reinterpret_cast<Barrier*>(memory() + C::kBarriersAt); }
  __device__ static Barrier* free() { return full() + C::kStages; }
  __device__ static Barrier* partials_stored() { return free() + C::kStages; }
  __device__ static WaveSchedule<C> schedule(const GemmParams& p) {
    return {memory() + C::kScheduleAt, p.experts, p.column_tiles, p.k / 128};
  }
};

// How many of the units of a work tile, from `kb` on, are a stage: none lies across a border of kUnits.
template <typename C>
__device__ int units_of_wide_stage(int kb, int kb_end) {
  return min(C::kUnits - kb % C::kUnits, kb_end - kb);
}

// The producer of stages of one unit.
template <typename C>
__device__ void produce_units(const GemmParams& p, const CUtensorMap& rows) {
  using S = WideShared<C>;
  using Weights = typename C::Weights;
  const WaveSchedule<C> schedule = S::schedule(p);
  const int lane = threadIdx.x % 32, tiles_n = p.n / 16;
  int stage = 0, slot = 0, last_tile = -1;
  uint32_t parity = 1;  // of the round before: passed at once in the first
  for (WaveIterator<C> at(schedule); at.left > 0; at.next(schedule)) {
    const WideWorkTile work = at.work_tile(schedule);
    const int first = work.column * C::kTiles, there = min(C::kTiles, tiles_n - first);
    const int halves = work.rows > C::kN / 2 ? 2 : 1;  // of kN rows; the map's boxes have half of kN
    const bool new_tile = at.tile != last_tile;
    last_tile = at.tile;
    S::free()[stage].wait(parity);
    Barrier* const full = S::full() + stage;
    char* const to = S::stage(stage);
    if (lane == 0) {
      if (new_tile) *reinterpret_cast<WideWorkTile*>(S::slot(slot)) = work;
      full->arrive_and_expect(halves * C::kRowsGroup + Weights::unit_bytes(there) + (new_tile ? Weights::columns_bytes(there) : 0));
      for (int half = 0; half < halves; ++half)
#pragma unroll
        for (int group = 0; group < 2; ++group)
          box_copy(to + group * C::kRowsGroup + half * (C::kRowsGroup / 2), rows, work.kb * 128 + group * 64,
                   work.row + half * (C::kN / 2), full);
    }
    __syncwarp();
    Weights::template request_unit<C::kTiles>(p, work.expert, first, there, work.kb, S::weights(stage), full);
    if (new_tile) {
      Weights::template request_columns<C::kTiles>(p, work.expert, first, there, S::slot(slot) + 128, full);
      if (++slot == C::kSlots) slot = 0;
    }
    if (++stage == C::kStages) stage = 0, parity ^= 1;
  }
}

// Producer `own` of stages of several units: every kProducers-th group of four tiles, and box of activations. The first one also says
// what the tile is.
template <typename C>
__device__ void produce_stages(const GemmParams& p, const CUtensorMap& rows, int own) {
  using S = WideShared<C>;
  using Weights = typename C::Weights;
  const WaveSchedule<C> schedule = S::schedule(p);
  const int lane = threadIdx.x % 32, tiles_n = p.n / 16;
  int stage = 0, slot = 0, last_tile = -1;
  uint32_t parity = 1;  // of the round before: passed at once in the first
  for (WaveIterator<C> at(schedule); at.left > 0;) {
    const WideWorkTile work = at.work_tile(schedule);
    const int first = work.column * C::kTiles, there = min(C::kTiles, tiles_n - first);
    const int units = units_of_wide_stage<C>(work.kb, work.kb_end);
    const int halves = work.rows > C::kN / 2 ? 2 : 1;  // of kN rows; the map's boxes have half of kN
    const int boxes = 2 * units * halves;
    const bool new_tile = at.tile != last_tile, speaks = own == 0 && new_tile;
    last_tile = at.tile;
    S::free()[stage].wait(parity);
    Barrier* const full = S::full() + stage;
    char* const to = S::stage(stage);
    if (lane == 0) {
      if (speaks) *reinterpret_cast<WideWorkTile*>(S::slot(slot)) = work;
      const int own_boxes = max(0, (boxes - own + C::kProducers - 1) / C::kProducers);
      full->arrive_and_expect(own_boxes * (C::kRowsGroup / 2) + Weights::template own_bytes<C::kProducers>(there, units, own) +
                              (speaks ? Weights::columns_bytes(there) : 0));
      for (int box = own; box < boxes; box += C::kProducers) {
        const int half = box & (halves - 1), group = box >> (halves - 1);
        box_copy(to + group * C::kRowsGroup + half * (C::kRowsGroup / 2), rows, work.kb * 128 + group * 64,
                 work.row + half * (C::kN / 2), full);
      }
    }
    __syncwarp();
    Weights::template request_units<C::kTiles, C::kUnits, C::kProducers>(p, work.expert, first, there, work.kb, units, own,
                                                                         S::weights(stage), full);
    if (speaks) Weights::template request_columns<C::kTiles>(p, work.expert, first, there, S::slot(slot) + 128, full);
    if (new_tile && ++slot == C::kSlots) slot = 0;
    if (++stage == C::kStages) stage = 0, parity ^= 1;
    for (int i = 0; i < units; ++i) at.next(schedule);
  }
}

// One of the eight consumer warps.
template <typename C>
struct ConsumerWarp {
  const GemmParams& p;
  const int lane, warp;
  int stage = 0;
  uint32_t parity = 0;

  __device__ static int first_row(int, int nt) { return nt * 8; }  // of an accumulator
  __device__ int blocks_k() const { return p.k / 128; }  // units of a tile
  __device__ int owner(const WideWorkTile& work, int kb) const { return WaveIterator<C>::owner(WideShared<C>::schedule(p), work, kb); }
  __device__ void release(int which) const { WideShared<C>::free()[which].arrive_together(); }
  // The same without a branch, which among `wgmma` would serialize them.
  __device__ void release_if(bool condition, int which) const {
    __syncwarp();
    const bool arrives = condition && (kWarpArrivals == 32 || lane == 0);
    asm volatile(
        "{ .reg .pred p; .reg .b64 s; setp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 s, [%0]; }\n" ::"r"(
            shared_address(WideShared<C>::free() + which)),
        "r"(static_cast<int>(arrives))
        : "memory");
  }
};

// Main loop: units `kb` to `kb_end` of one tile into `acc`; kNT: blocks of 8 rows that are multiplied.
template <typename C, int kNT>
__device__ void wide_main_loop(ConsumerWarp<C>& w, int kb, int kb_end, const char* columns, Accumulator<C, kNT>& acc) {
  using S = WideShared<C>;
  constexpr int kR = C::kR;
  typename C::Weights::template Decoder<C::kBf16Operands, kR, C::kTiles, C::kUnits> decoder(w.p, w.warp * kR);
  decoder.begin(columns);
  acc.clear();
  int last = -1;  // the stage before
  uint32_t a[2][4][4];  // two steps' weights: one is multiplied while the other is decoded
  while (kb < kb_end) {
    const int units = C::kUnits == 1 ? 1 : units_of_wide_stage<C>(kb, kb_end);
    kb += units;
    S::full()[w.stage].wait(w.parity);
    const char* const stage = S::stage(w.stage);
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
      const uint64_t b = descriptor(shared_address(stage) + u * (2 * C::kRowsGroup), 1024);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        decoder.load(S::weights(w.stage), u, r);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t(&v)[4][4] = a[half];
          wgmma_wait<1>();  // the step before the last one, which read these registers
          if (r == 0 && half == 1) w.release_if(u == 0 && last >= 0, last);  // nor is the stage before read any more
          decoder.decode(half, r, v);
          wgmma_fence();
#pragma unroll
          for (int j = 0; j < 4; ++j) wgmma<C::kBf16Operands>(acc.o[r], v[j], b + half * (C::kRowsGroup / 16) + j * 2);
          wgmma_commit();
        }
      }
    }
    last = w.stage;
    if (++w.stage == C::kStages) w.stage = 0, w.parity ^= 1;
  }
  wgmma_wait<0>();
  w.release(last);
}

// An 8 x 8 matrix of 16-bit values, row g in lanes 4g to 4g + 3, transposed.
__device__ inline uint32_t transpose_8x8(uint32_t v) {
  uint32_t to;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(to) : "r"(v));
  return to;
}
template <bool kBf16>
__device__ inline uint32_t two_outputs(float a, float b) {
  uint32_t v;
  if (kBf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(v) : "f"(b), "f"(a));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(v) : "f"(b), "f"(a));
  return v;
}

// A finished tile. A lane has columns g of 8-column blocks and rows 2t and 2t + 1; transposed twice, four accumulators give it 8
// neighbouring columns of row g, which is one store of 16 bytes.
template <typename C, int kNT>
__device__ void store_wide_tile(const ConsumerWarp<C>& w, const WideWorkTile& work, const char* columns, const Accumulator<C, kNT>& acc) {
  constexpr int kR = C::kR, kBlocks = 2 * kR, kFour = kBlocks < 4 ? 4 / kBlocks : 1;  // row blocks for four accumulators
  const GemmParams& p = w.p;
  const int g = w.lane / 4, t = w.lane % 4, first = work.column * C::kTiles + w.warp * kR;
  float super[kR][2];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const float2 s = C::Weights::template supers<C::kBf16>(columns, w.warp * kR + r, g);
    super[r][0] = s.x, super[r][1] = s.y;
  }
  const float* const scales = p.caller_scale ? p.caller_scale + work.row : nullptr;
#pragma unroll
  for (int nt0 = 0; nt0 < kNT; nt0 += kFour) {
    if (nt0 * 8 >= work.rows) continue;
    uint32_t e[kFour * kBlocks];
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const int nt = nt0 + i, row = nt * 8 + 2 * t;
      const float left = scales && row < work.rows ? scales[row] : 1.f;
      const float right = scales && row + 1 < work.rows ? scales[row + 1] : 1.f;
#pragma unroll
      for (int r = 0; r < kR; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float* const o = acc.o[r][nt] + 2 * h;
          const uint32_t two = two_outputs<C::kBf16>(o[0] * super[r][h] * left, o[1] * super[r][h] * right);
          e[i * kBlocks + 2 * r + h] = transpose_8x8(two);
        }
    }
#pragma unroll
    for (int q = 0; q < kFour * kBlocks / 4; ++q) {
      uint32_t four[4] = {e[4 * q], e[4 * q + 1], e[4 * q + 2], e[4 * q + 3]};
      transpose_quad(four);
      const int own = 4 * q + t, block = own % kBlocks, row = (nt0 + own / kBlocks) * 8 + g;
      if (row < work.rows && first + block / 2 < p.n / 16) {
        const size_t at = static_cast<size_t>(work.row + row) * p.n + first * 16 + block * 8;
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + at) = make_uint4(four[0], four[1], four[2], four[3]);
      }
    }
  }
}

template <typename C, int kNT>
__device__ void run_wide_work_tile(ConsumerWarp<C>& w, const char* slot, PartialSignal<C>& signal) {
  const WideWorkTile& work = *reinterpret_cast<const WideWorkTile*>(slot);
  Accumulator<C, kNT> acc;
  wide_main_loop<C, kNT>(w, work.kb, work.kb_end, slot + 128, acc);
  epilogue<C, kNT>(w, work, signal, acc, [&] { store_wide_tile<C, kNT>(w, work, slot + 128, acc); });
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
wide_kernel(const GemmParams p, const __grid_constant__ CUtensorMap rows) {
  using S = WideShared<C>;
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (lane == 0) {
    if (warp < C::kStages) S::full()[warp].init(C::kProducers), S::free()[warp].init(C::kWarps * kWarpArrivals);
    if (warp == C::kWarps) S::partials_stored()->init(C::kWarps * kWarpArrivals);
    publish_barriers();
  }
  const WaveSchedule<C> schedule = S::schedule(p);
  schedule.prepare(p.offsets, p.rows);
  wait_for_prerequisites();
  if (warp >= C::kWarps) {
    deallocate_registers<C::kProducerRegisters>();
    if constexpr (C::kProducers > 1) produce_stages<C>(p, rows, warp - C::kWarps);
    else if (warp == C::kWarps) produce_units<C>(p, rows);
  } else {
    allocate_registers<C::kConsumerRegisters>();
    ConsumerWarp<C> w{p, lane, warp};
    PartialSignal<C> signal{S::partials_stored()};
    int left = WaveIterator<C>(schedule).left, slot = 0;
    while (left > 0) {
      S::full()[w.stage].wait(w.parity);  // the description of the work tile comes with its first unit
      const char* const at = S::slot(slot);
      const WideWorkTile& work = *reinterpret_cast<const WideWorkTile*>(at);
      left -= work.kb_end - work.kb;
      if constexpr (C::kClasses == 1) {
        run_wide_work_tile<C, C::kNT>(w, at, signal);
      } else {
        if (WaveSchedule<C>::class_of(work.rows) == 0) run_wide_work_tile<C, C::kNT>(w, at, signal);
        else run_wide_work_tile<C, C::kNT / 2>(w, at, signal);
      }
      if (++slot == C::kSlots) slot = 0;
    }
    signal.publish(w);
  }
}

}  // namespace ccq
