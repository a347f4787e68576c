// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for some rows of several experts, on Hopper (sm_90a): up to 16 rows a tile, activations as integers, multiplied by
// the integer tensor cores, four rows at a time.
//
// Work. A tile has 512 columns; the scheduler, partial results and the epilogue are those of moe_gemm.cuh (stream_k.cuh,
// epilogue.cuh). How many blocks of rows a tile multiplies goes by the rows that it has.
//
// Warps. Four request: a stage is two or four units of 128 input rows, the codes and scales of all columns and the prepared activations.
// Sixteen multiply; each has 32 columns, so that what it reads of the activations serves two tiles of 16 columns. They do
// nothing but decode, multiply and scale: instructions are what this kernel is short of.
#pragma once

#include "some_schedule.cuh"
#include "wgmma.cuh"  // registers from warps to warps

namespace ccq {

// Two words of shared memory, and the same again: of accumulators' four registers, without moves.
__device__ inline int4 load_twice(const void* from) {
  int4 v;
  const uint32_t at = shared_address(from);
  asm volatile("ld.volatile.shared.v2.b32 {%0, %1}, [%4];\nld.volatile.shared.v2.b32 {%2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}

// Units `kb` to `kb_end` of one tile; kFours: blocks of four rows that it really has. A lane has row t of each four.
template <typename C, int kFours>
__device__ void some_main_loop(SomeConsumer<C>& w, int kb, int kb_end, const char* columns, Accumulator<C, (kFours + 1) / 2>& acc) {
  using S = SomeShared<C>;
  constexpr int kR = C::kR;
  const int g = w.lane / 4, t = w.lane % 4;
  uint32_t four = 4;
  asm volatile("" : "+r"(four));
  int o[kR][kFours][4] = {};
  float sum[kR][kFours][2] = {};  // of columns g and g + 8
  Column<C::kPairs> column[kR][2];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const char* const at = columns + (w.warp * kR + r) * kPlaneBytes;
    load_columns<C::kPairs>(at, at + C::kTiles * kPlaneBytes, g, column[r]);
  }
#pragma unroll 1
  while (kb < kb_end) {
    const int units = units_of_stage<C>(kb, kb_end - kb);
    const char* const stage = S::stage(w.stage);
    const char* const codes = stage + w.warp / 2 * (C::kUnits * 2048) + w.warp % 2 * 1024 + w.lane * 16;
    const char* const scales = stage + C::kScalesAt + w.warp / 2 * (C::kUnits * 64) + w.warp % 2 * 32 + g * 2;
    const char* const rows = stage + C::kRowsAt;
    S::full()[w.stage].wait(w.parity);
#pragma unroll
    for (int u = 0; u < C::kUnits; ++u) {
      if (u >= units) break;
      uint4 q[kR];
      uint32_t nibbles[kR][2];
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        q[r] = *reinterpret_cast<const uint4*>(codes + u * 2048 + r * 512);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          nibbles[r][i] = *reinterpret_cast<const uint8_t*>(scales + u * 64 + r * 16 + i);
          asm("" : "+r"(nibbles[r][i]));  // else the compiler, which knows that they are bytes, masks and shifts
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t steps[kR][2][4];
        int f[kR][2];
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          const uint32_t low = half ? q[r].z : q[r].x, high = half ? q[r].w : q[r].y;
          const ByteWindows v(column[r][0].template codes<0>(low), four), e(column[r][1].template codes<0>(high), four);
          steps[r][0][0] = v.even, steps[r][0][1] = e.even, steps[r][0][2] = v.odd, steps[r][0][3] = e.odd;
          const ByteWindows y(column[r][0].template codes<1>(low), four), z(column[r][1].template codes<1>(high), four);
          steps[r][1][0] = y.even, steps[r][1][1] = z.even, steps[r][1][2] = y.odd, steps[r][1][3] = z.odd;
#pragma unroll
          for (int i = 0; i < 2; ++i) f[r][i] = half ? nibbles[r][i] >> 4 : nibbles[r][i] & 15;
        }
#pragma unroll
        for (int j = 0; j < kFours; ++j) {
          const char* const from = rows + j / 2 * (C::kUnits * kRowsUnitBytes) + u * kRowsUnitBytes + j % 2 * 1024;
          const uint4 b = *reinterpret_cast<const uint4*>(from + 128 + half * 512 + w.lane * 16);
          const int4 c = load_twice(from - j % 2 * (1024 - 64) + half * 32 + t * 8);
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            int d[4] = {c.x, c.y, c.z, c.w};
            const uint32_t(&v)[2][4] = steps[r];
            mma_bytes(d, v[0][0], v[0][1], v[0][2], v[0][3], b.x, b.y);
            mma_bytes(d, v[1][0], v[1][1], v[1][2], v[1][3], b.z, b.w);
            o[r][j][0] += f[r][0] * d[0], o[r][j][1] += f[r][0] * d[1];
            o[r][j][2] += f[r][1] * d[2], o[r][j][3] += f[r][1] * d[3];
          }
        }
      }
    }
    kb += units;
    if (kb % 8 == 0 || kb == kb_end) {  // the end of 1024 values, which have a scale
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        const float back = 8.f * *reinterpret_cast<const float*>(rows + j / 2 * (C::kUnits * kRowsUnitBytes) + kRowsScaleAt + (j % 2 * 4 + t) * 4);
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i) {  // digits together: 2^8 upper + lower, less three bits so that they fit
            int* const d = o[r][j] + 2 * i;
            sum[r][j][i] = fmaf(static_cast<float>(d[0] * 32 + (d[1] >> 3)), back, sum[r][j][i]);
            d[0] = d[1] = 0;
          }
      }
    }
    S::free()[w.stage].arrive_together();
    if (++w.stage == C::kStages) w.stage = 0, w.parity ^= 1;
  }
  // What comes after wants rows 2t and 2t + 1 of each eight.
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int nt = 0; nt < (kFours + 1) / 2; ++nt)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float v[2] = {0.f, 0.f};
#pragma unroll
          for (int f = 0; f < 2 && 2 * nt + f < kFours; ++f) v[f] = __shfl_sync(~0u, sum[r][2 * nt + f][h], g * 4 + t % 2 * 2 + i);
          acc.o[r][nt][2 * h + i] = t < 2 ? v[0] : v[1];
        }
}

template <typename C, int kRows>
__device__ void run_some_tile(SomeConsumer<C>& w, const char* slot, PartialSignal<C>& signal) {
  constexpr int kNT = (kRows + 7) / 8;
  const WorkTile& work = *reinterpret_cast<const WorkTile*>(slot);
  const char* const columns = slot + 128;
  Accumulator<C, kNT> acc;
  some_main_loop<C, kRows / 4>(w, work.kb, work.kb_end, columns, acc);
  float super[C::kR][2];
#pragma unroll
  for (int r = 0; r < C::kR; ++r) {
    const float2 s = load_supers(columns + (w.warp * C::kR + r) * kPlaneBytes, w.lane / 4);
    super[r][0] = s.x, super[r][1] = s.y;
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
      if (rows <= 4) run_some_tile<C, 4>(w, at, signal);
      else if (rows <= 8) run_some_tile<C, 8>(w, at, signal);
      else if (rows <= 12) run_some_tile<C, 12>(w, at, signal);
      else run_some_tile<C, 16>(w, at, signal);
      if (++slot == C::kSlots) slot = 0;
    }
    signal.publish(w);
  }
#endif
}

}  // namespace ccq
