// SPDX-License-Identifier: Apache-2.0
// Configurations, shared memory and requests of some_stream.cuh: what its warps have in common, and those that request.
#pragma once

#include "epilogue.cuh"

namespace ccq {

// kUnits: of a stage; the more, the longer its copies.
template <Pairs kPairs_, int kUnits_>
struct SomeStream {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = 2, kNT = 2, kTileTokens = 8 * kNT, kMinBlocks = 1;
  static constexpr int kWarps = 16, kProducers = 4, kThreads = (kWarps + kProducers) * 32;
  static constexpr int kTiles = kR * kWarps, kFours = kTiles / 4;  // 16-column tiles; groups of four, which lie side by side
  // Registers of a thread: 96 at the beginning; then those of the warps that request and of those that multiply.
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 112;
  static constexpr int kUnits = kUnits_, kStages = kUnits > 2 ? 2 : 4;
  // A stage: codes [group of four tiles][unit][4 tiles][512], scales [group][unit][4][16], activations [8 rows][unit].
  static constexpr int kScalesAt = kUnits * kTiles * 512, kRowsAt = kScalesAt + kUnits * kTiles * 16;
  static constexpr int kStageBytes = kRowsAt + kNT * kUnits * kRowsUnitBytes;
  // Tiles on their way or in work: a WorkTile and the columns of each.
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1;
  static constexpr int kSlots = kStages + 1, kSlotBytes = 128 + kTiles * kPlaneBytes * kPlanes;
  static constexpr int kSlotsAt = kStages * kStageBytes, kBarriersAt = kSlotsAt + kSlots * kSlotBytes;
  static constexpr int kScheduleAt = kBarriersAt + 16 * kStages + 16;
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;
  // Time of a unit by its tile's rows, roughly (stream_k.cuh).
  __host__ __device__ static constexpr int weight(int rows) { return 5 + (rows + 3) / 4 * 2; }
  static constexpr int kMaxWeight = weight(kTileTokens);
  static constexpr size_t shared_bytes(int experts) { return kScheduleAt + StreamK<SomeStream>::shared_bytes(experts); }
  static_assert(kStageBytes % 128 == 0 && kSlotBytes % 16 == 0);
};

template <typename C>
struct SomeShared {
  __device__ static char* memory() {
    extern __shared__ __align__(128) char shared[];
    return shared;
  }
  __device__ static char* stage(int i) { return memory() + i * C::kStageBytes; }
  __device__ static char* slot(int i) { return memory() + C::kSlotsAt + i * C::kSlotBytes; }
  __device__ static Barrier* full() { return reinterpret_cast<Barrier*>(memory() + C::kBarriersAt); }
  __device__ static Barrier* free() { return full() + C::kStages; }
  __device__ static Barrier* partials_stored() { return free() + C::kStages; }
  __device__ static StreamK<C> schedule(const GemmParams& p) {
    return {memory() + C::kScheduleAt, p.experts, p.column_tiles, p.k / 128};
  }
};

// How many of the `left` units of a tile, from `kb` on, are a stage: none lies across a border of kUnits.
template <typename C>
__device__ int units_of_stage(int kb, int left) {
  return min(C::kUnits - kb % C::kUnits, left);
}

// One of the warps that request: its groups of four tiles, and the activations of its eight rows.
template <typename C>
struct SomeProducer {
  using S = SomeShared<C>;
  static constexpr int kOwn = C::kFours / C::kProducers;
  const GemmParams& p;
  const int own;
  UnitIterator<C> at;
  int stage = 0, slot = 0;
  uint32_t parity = 1;  // of the round before: passed at once in the first

  __device__ int units() const { return units_of_stage<C>(at.kb, min(p.k / 128 - at.kb, at.left)); }
  // Blocks of eight rows that are this warp's: every kProducers-th.
  __device__ int row_blocks(const WorkTile& work) const {
    return max(0, (work.rows + 7) / 8 - own + C::kProducers - 1) / C::kProducers;
  }

  // All but the activations, which are announced. One lane.
  __device__ void request_weights(bool new_tile) {
    const StreamK<C> schedule = S::schedule(p);
    const WorkTile work = at.work_tile(schedule);
    const int tiles_n = p.n / 16, blocks_k = p.k / 128, count = units();
    Barrier* const full = S::full() + stage;
    char* const to = S::stage(stage);
    const int first = work.column * C::kTiles + own * kOwn * 4, there = min(kOwn * 4, tiles_n - first);  // may be negative
    if (new_tile && own == 0) *reinterpret_cast<WorkTile*>(S::slot(slot)) = work;
    const int tiles = max(there, 0);
    full->arrive_and_expect(tiles * count * 528 + row_blocks(work) * count * kRowsUnitBytes +
                            (new_tile ? tiles * kPlaneBytes * C::kPlanes : 0));
    const uint64_t policy = streaming_policy();
#pragma unroll
    for (int f = 0; f < kOwn; ++f) {
      const int t16 = first + f * 4, four = min(4, tiles_n - t16), group = own * kOwn + f;
      if (four <= 0) break;
      const size_t unit = ccq_unit_index(work.expert, t16, work.kb, tiles_n, blocks_k);
      char* const codes = to + group * (C::kUnits * 2048);
      char* const scales = to + C::kScalesAt + group * (C::kUnits * 64);
      if (four == 4) {
        bulk_copy(codes, p.quant + unit * 512, count * 2048, full, policy);
        bulk_copy(scales, p.scales + unit * 16, count * 64, full, policy);
      } else {
        for (int u = 0; u < count; ++u) {
          bulk_copy(codes + u * 2048, p.quant + (unit + u * four) * 512, four * 512, full, policy);
          bulk_copy(scales + u * 64, p.scales + (unit + u * four) * 16, four * 16, full, policy);
        }
      }
    }
    if (new_tile && tiles > 0) {
      const uint32_t* const from = p.columns + (static_cast<size_t>(work.expert) * tiles_n + first) * 32;
      const size_t plane = static_cast<size_t>(p.experts) * tiles_n * 32;
      char* const columns = S::slot(slot) + 128 + own * kOwn * 4 * kPlaneBytes;
#pragma unroll
      for (int j = 0; j < C::kPlanes; ++j)
        bulk_copy(columns + j * (C::kTiles * kPlaneBytes), from + j * plane, tiles * kPlaneBytes, full);
    }
  }
  __device__ void request_rows() {
    const WorkTile work = at.work_tile(S::schedule(p));
    const int blocks_k = p.k / 128, count = units() * kRowsUnitBytes, blocks = row_blocks(work);
    const char* from = p.prepared.x + (static_cast<size_t>(work.prepared_block + own) * blocks_k + work.kb) * kRowsUnitBytes;
    char* to = S::stage(stage) + C::kRowsAt + own * (C::kUnits * kRowsUnitBytes);
    for (int i = 0; i < blocks; ++i) {
      bulk_copy(to, from, count, S::full() + stage);
      from += static_cast<size_t>(C::kProducers) * blocks_k * kRowsUnitBytes, to += C::kProducers * C::kUnits * kRowsUnitBytes;
    }
  }
  __device__ void next(bool new_tile) {
    if (new_tile && ++slot == C::kSlots) slot = 0;
    if (++stage == C::kStages) stage = 0, parity ^= 1;
    for (int count = units(); count > 0; --count) at.next(S::schedule(p));
  }

  __device__ void run() {
    const bool speaks = threadIdx.x % 32 == 0;
    // Weights and offsets do not depend on the kernel before this one, activations and counters do.
    const SomeProducer start = *this;
    bool first = true;
    for (int i = 0; i < C::kStages && at.left > 0; ++i) {
      const bool new_tile = first || at.kb == 0;
      if (speaks) request_weights(new_tile);
      first = false, next(new_tile);
    }
    wait_for_prerequisites();
    SomeProducer again = start;
    for (int i = 0; i < C::kStages && again.at.left > 0; ++i) {
      if (speaks) again.request_rows();
      again.next(false);
    }
    while (at.left > 0) {
      const bool new_tile = at.kb == 0;
      S::free()[stage].wait(parity);
      if (speaks) request_weights(new_tile), request_rows();
      __syncwarp();
      next(new_tile);
    }
  }
  __device__ SomeProducer& operator=(const SomeProducer&) = delete;
};

// One of the warps that multiply.
template <typename C>
struct SomeConsumer {
  using S = SomeShared<C>;
  const GemmParams& p;
  const int lane, warp;
  int stage = 0;
  uint32_t parity = 0;

  __device__ static int first_row(int, int nt) { return nt * 8; }  // of an accumulator
  __device__ int blocks_k() const { return p.k / 128; }  // units of a tile
  __device__ int owner(const WorkTile& work, int kb) const {
    return S::schedule(p).owner(work.expert, work.column, work.block, kb);
  }
  __device__ int tile16(int column) const { return column * C::kTiles + warp * C::kR; }
};

}  // namespace ccq
