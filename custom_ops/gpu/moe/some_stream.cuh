// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for some rows of several experts, on Hopper (sm_90a). Up to 16 rows a tile: activations as integers, multiplied by
// the integer tensor cores, four rows at a time (some_integers.cuh). Up to 48: in fp16, eight rows at a time (some_halves.cuh).
//
// Work. A tile has 512 columns; the scheduler, partial results and the epilogue are those of moe_gemm.cuh (stream_k.cuh,
// epilogue.cuh). How many blocks of rows a tile multiplies goes by the rows that it has.
//
// Warps. Four request: a stage is two or four units of 128 input rows, the codes and scales of all columns and the prepared activations.
// Eight multiply, two on each scheduler; each has 64 columns and so many registers that it works on four tiles of 16 columns at
// once and has read of shared memory, before it needs it, what comes next: a group's rows once the tensor cores have those of the
// group before, the next unit's codes once the last ones are decoded.
#pragma once

#include "some_halves.cuh"
#include "some_integers.cuh"
#include "wgmma.cuh"  // registers from warps to warps

namespace ccq {

template <typename C, int kRows>
__device__ void run_some_tile(SomeConsumer<C>& w, const char* slot, PartialSignal<C>& signal) {
  constexpr int kNT = (kRows + 7) / 8;
  constexpr bool kScaled = kRows > kMostHalfRows;
  constexpr float kFactor = C::kIntegers ? 1.f : kScaled ? 524288.f : 16777216.f, kUpper = C::kIntegers || kScaled ? 1.f : kUpperColumns;
  const WorkTile& work = *reinterpret_cast<const WorkTile*>(slot);
  const char* const columns = slot + 128;
  Accumulator<C, kNT> acc;
  if constexpr (C::kIntegers) some_integer_loop<C, kRows / 4>(w, work.kb, work.kb_end, columns, acc);
  else if constexpr (kScaled) some_scaled_loop<C, kNT>(w, work.kb, work.kb_end, columns, acc);
  else some_half_loop<C, kNT>(w, work.kb, work.kb_end, columns, acc);
  float super[C::kR][2];
#pragma unroll
  for (int r = 0; r < C::kR; ++r) {
    const float2 s = load_supers(columns + (w.warp * C::kR + r) * kPlaneBytes, w.lane / 4);
    super[r][0] = s.x * kFactor, super[r][1] = s.y * (kFactor * kUpper);
  }
  epilogue<C, kNT>(w, work, signal, acc, [&] { store_tile<C, kNT>(w, work, super, acc); });
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) some_kernel(const GemmParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // empty for other GPUs, which never run it
  using S = SomeShared<C>;
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (lane == 0) {
    if (warp < C::kStages) S::full()[warp].init(C::kProducers), S::free()[warp].init(C::kWarps * kWarpArrivals);
    if (warp == C::kStages) S::partials_stored()->init(C::kWarps * kWarpArrivals);
    publish_barriers();
  }
  const StreamK<C> schedule = S::schedule(p);
  schedule.prepare(p.offsets, p.rows);
  if (static_cast<int>(blockIdx.x) >= schedule.header().grid) return;
  const UnitIterator<C> start(schedule);
  if (warp >= C::kWarps) {
    deallocate_registers<C::kProducerRegisters>();
    SomeProducer<C> producer{p, warp - C::kWarps, start};
    producer.run();
  } else {
    allocate_registers<C::kConsumerRegisters>();
    wait_for_prerequisites();
    SomeConsumer<C> w{p, lane, warp};
    PartialSignal<C> signal{S::partials_stored()};
    int left = start.left, slot = 0;
    while (left > 0) {
      S::full()[w.stage].wait(w.parity);  // the description of the work tile comes with its first stage
      const char* const at = S::slot(slot);
      const WorkTile& work = *reinterpret_cast<const WorkTile*>(at);
      left -= work.kb_end - work.kb;
      const int rows = work.rows;
      if constexpr (C::kIntegers) {
        if (rows <= 4) run_some_tile<C, 4>(w, at, signal);
        else if (rows <= 8) run_some_tile<C, 8>(w, at, signal);
        else if (rows <= 12) run_some_tile<C, 12>(w, at, signal);
        else run_some_tile<C, 16>(w, at, signal);
      } else {
        if (rows <= 8) run_some_tile<C, 8>(w, at, signal);
        else if (rows <= 16) run_some_tile<C, 16>(w, at, signal);
        else if (rows <= 24) run_some_tile<C, 24>(w, at, signal);
        else if (rows <= 32) run_some_tile<C, 32>(w, at, signal);
        else if (rows <= 40) run_some_tile<C, 40>(w, at, signal);
        else run_some_tile<C, 48>(w, at, signal);
      }
      if (++slot == C::kSlots) slot = 0;
    }
    signal.publish(w);
  }
#endif
}

}  // namespace ccq
