// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for many rows an expert, on Hopper's warpgroup tensor instructions (sm_90a).
//
// Decoding costs the same for 8 rows and for 128, so here a tile has up to kN rows and the weights, decoded once, meet all
// of them: `wgmma` takes A (weights) from the registers that decode.cuh fills, in the same layout as mma.sync, and B
// (activations) from shared memory. Scaling accumulators group by group, as moe_gemm.cuh does, would cost per row; so the
// weights become exact fp16 integers instead: (window - 32) * scale nibble, at most 480 in magnitude, times a power of
// two. One half-precision multiply-add makes two of them, nothing is rounded, and accumulators run through all of K.
//
// A ninth warp orders everything, weights and activations, by bulk copies into a ring of stages, and does nothing else (it
// and three idle ones make a warpgroup, so that it can hand its registers over); the other eight, two warpgroups, wait for
// stages and give them back, each at its own pace. Tiles go in waves (waves.cuh).
#pragma once

#include "output.cuh"
#include "waves.cuh"
#include "wgmma.cuh"

namespace ccq {

template <Pairs kPairs_, int kR_, int kN_, int kStages_>
struct WideConfig {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = kR_, kN = kN_, kNT = kN / 8, kStages = kStages_, kMinBlocks = 1;
  static constexpr int kWarps = 8, kThreads = (kWarps + 4) * 32;  // that multiply; with the ordering one and three idle ones
  static constexpr int kTileTokens = kN, kTiles = kR * kWarps;
  // Registers of a thread: 168 at the beginning; then the ordering warp's (and the idle ones'), and the others'.
  static constexpr int kOrdering = 40, kMultiplying = 232;
  // A stage: the activations as tensor cores want them (kWideRowsBytes a block of 8 rows), then each warp's weights.
  static constexpr int kRowsBytes = kNT * kWideRowsBytes, kUnitBytes = kR * 528;
  static constexpr int kStageBytes = kRowsBytes + (kWarps * kUnitBytes + 1023) / 1024 * 1024;
  // Tiles on their way or in work: a Part and the columns of each.
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1, kPlane = kTiles * kPlaneBytes;
  static constexpr int kSlots = kStages + 1, kSlotBytes = 128 + kPlane * kPlanes;
  static constexpr int kSlotsAt = kStages * kStageBytes, kBarriersAt = kSlotsAt + kSlots * kSlotBytes;
  static constexpr int kLineAt = kBarriersAt + 16 * kStages + 16;
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;
  static constexpr int kMostWeight = 1;
  __host__ __device__ static constexpr int weight(int) { return 1; }
  static constexpr size_t shared_bytes(int experts) { return 1024 + kLineAt + Line<WideConfig>::shared_bytes(experts); }
};

__device__ inline uint32_t half2_bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ inline __half2 bits_half2(uint32_t v) { return *reinterpret_cast<__half2*>(&v); }

// A column's scale in one group as fp16 pairs: the nibble (times 16 in odd groups, divided out of the activations), and
// -32 nibbles in the units of even and of odd windows.
struct Scale {
  __half2 n, even, odd;
  // `both`: the byte of the column's two nibbles, in both halves.
  template <int kGroup>
  __device__ static Scale of(uint32_t both) {
    const uint32_t bits = (both & (kGroup ? 0x00F000F0u : 0x000F000Fu)) | 0x64006400u;  // 1024 + nibble
    Scale s;
    s.n = __hsub2(bits_half2(bits), bits_half2(0x64006400u));
    s.even = __hmul2(s.n, bits_half2(0x80208020u));  // -2^-19
    s.odd = __hmul2(s.n, bits_half2(0x81008100u));   // -2^-16
    return s;
  }
  // (window - 32) * nibble of both halves: exact, see the head of this file.
  __device__ uint32_t even_window(uint32_t w) const { return half2_bits(__hfma2(bits_half2(w), n, even)); }
  __device__ uint32_t odd_window(uint32_t w) const { return half2_bits(__hfma2(bits_half2(w), n, odd)); }
};

// Shared memory, by whoever needs it: its addresses are known, so nothing of it stays in registers.
template <typename C>
struct WideShared {
  __device__ static char* memory() {  // swizzled stages lie on borders of 1024 bytes
    extern __shared__ __align__(128) char shared[];
    return shared + (-static_cast<int>(shared_address(shared)) & 1023);
  }
  __device__ static char* stage(int i) { return memory() + i * C::kStageBytes; }
  __device__ static char* slot(int i) { return memory() + C::kSlotsAt + i * C::kSlotBytes; }
  __device__ static Barrier* full() { return reinterpret_cast<Barrier*>(memory() + C::kBarriersAt); }
  __device__ static Barrier* free() { return full() + C::kStages; }
  __device__ static Barrier* shares_there() { return free() + C::kStages; }
  __device__ static Line<C> line(const GemmParams& p) {
    return {memory() + C::kLineAt, p.experts, p.column_tiles, p.k / 128};
  }
};

// The ninth warp.
template <typename C>
__device__ void order_stages(const GemmParams& p) {
  using S = WideShared<C>;
  const Line<C> line = S::line(p);
  const int lane = threadIdx.x % 32, blocks_k = p.k / 128, tiles_n = p.n / 16;
  int stage = 0, slot = 0, last_tile = -1;
  uint32_t parity = 1;  // of the round before: passed at once in the first
  for (Waves<C> at(line); at.left > 0; at.next(line)) {
    const Part part = at.part(line);
    const int first = part.column * C::kTiles, there = min(C::kTiles, tiles_n - first), row_blocks = (part.rows + 7) / 8;
    const bool new_tile = at.tile != last_tile;
    last_tile = at.tile;
    S::free()[stage].wait(parity);
    Barrier* const full = S::full() + stage;
    if (lane == 0) {
      if (new_tile) *reinterpret_cast<Part*>(S::slot(slot)) = part;
      full->arrive_and_expect(row_blocks * kWideRowsBytes + there * 528 + (new_tile ? there * kPlaneBytes * C::kPlanes : 0));
    }
    __syncwarp();
    char* const to = S::stage(stage);
    if (lane < row_blocks)
      bulk_copy(to + lane * kWideRowsBytes,
                p.prepared.rows + (static_cast<size_t>(part.prepared_block + lane) * blocks_k + part.kb) * kWideRowsBytes,
                kWideRowsBytes, full);
    // A warp's tiles lie in one group of four (repack.h).
    const int t16 = first + lane * C::kR, mine = min(C::kR, tiles_n - t16);
    if (lane < C::kWarps && mine > 0) {
      const size_t unit = ccq_unit_index(part.expert, t16, part.kb, tiles_n, blocks_k);
      char* const weights = to + C::kRowsBytes + lane * C::kUnitBytes;
      bulk_copy(weights, p.quant + unit * 512, mine * 512, full);
      bulk_copy(weights + C::kR * 512, p.scales + unit * 16, mine * 16, full);
    }
    if (new_tile) {
      if (lane < C::kPlanes) {
        const size_t plane = static_cast<size_t>(p.experts) * tiles_n * 32;
        const size_t own = (static_cast<size_t>(part.expert) * tiles_n + first) * 32;
        bulk_copy(S::slot(slot) + 128 + lane * C::kPlane, p.columns + lane * plane + own, there * kPlaneBytes, full);
      }
      if (++slot == C::kSlots) slot = 0;
    }
    if (++stage == C::kStages) stage = 0, parity ^= 1;
  }
}

// One of the other eight.
template <typename C>
struct WideWarp {
  const GemmParams& p;
  const int lane, warp;
  int stage = 0;
  uint32_t parity = 0;

  __device__ int tile16(int column) const { return column * C::kTiles + warp * C::kR; }
  __device__ int owner(const Part& part, int kb) const { return Waves<C>::owner(WideShared<C>::line(p), part, kb); }
  __device__ void leave(int which) const { WideShared<C>::free()[which].arrive_together(); }
};

// `units` units of one tile into `acc`; kNT: blocks of 8 rows that are multiplied.
template <typename C, int kNT>
__device__ void multiply_wide(WideWarp<C>& w, int units, const char* columns, Accumulator<C, kNT>& acc) {
  using S = WideShared<C>;
  constexpr int kR = C::kR;
  const int g = w.lane / 4;
  Column<C::kPairs> column[kR][2];
  int add = 0;  // the first step of all overwrites the accumulators: set to zero by moves they would serialize the rest
  int before = -1, last = -1;  // the stages of the two units before: the later one the tensor cores may still read
  uint32_t a[2][4][4];  // two steps' weights: one is multiplied while the other is decoded
  for (int i = 0; i < units; ++i) {
    if (before >= 0) w.leave(before);
    S::full()[w.stage].wait(w.parity);
    if (i == 0) {
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const char* c = columns + (w.warp * kR + r) * kPlaneBytes;
        load_columns<C::kPairs>(c, c + C::kPlane, g, column[r]);
      }
    }
    const char* const weights = S::stage(w.stage) + C::kRowsBytes + w.warp * C::kUnitBytes;
    const uint64_t b = descriptor(shared_address(S::stage(w.stage)), kWideRowsBytes);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const uint4 q = *reinterpret_cast<const uint4*>(weights + r * 512 + w.lane * 16);
      const uint32_t scale = *reinterpret_cast<const uint16_t*>(weights + kR * 512 + r * 16 + g * 2);
      const uint32_t left = __byte_perm(scale, 0, 0x4040), right = __byte_perm(scale, 0, 0x4141);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t(&v)[4][4] = a[half];
        wgmma_wait<1>();  // the step before the last one, which read these registers
        const uint32_t low = half ? q.z : q.x, high = half ? q.w : q.y;
        const Scale s = half ? Scale::of<1>(left) : Scale::of<0>(left), u = half ? Scale::of<1>(right) : Scale::of<0>(right);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const Windows x(pair ? column[r][0].template codes<1>(low) : column[r][0].template codes<0>(low));
          const Windows y(pair ? column[r][1].template codes<1>(high) : column[r][1].template codes<0>(high));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            v[pair * 2 + j][0] = s.even_window(x.w[j * 2]), v[pair * 2 + j][1] = u.even_window(y.w[j * 2]);
            v[pair * 2 + j][2] = s.odd_window(x.w[j * 2 + 1]), v[pair * 2 + j][3] = u.odd_window(y.w[j * 2 + 1]);
          }
        }
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; ++j) wgmma(acc.o[r], v[j], b + half * (1024 / 16) + j * 2, half + j > 0 ? 1 : add);
        wgmma_commit();
      }
    }
    add = 1, before = last, last = w.stage;
    if (++w.stage == C::kStages) w.stage = 0, w.parity ^= 1;
  }
  wgmma_wait<0>();
  if (before >= 0) w.leave(before);
  w.leave(last);
}

template <typename C, int kNT>
__device__ void run_wide_part(WideWarp<C>& w, const char* slot, Shares<C>& shares) {
  const Part& part = *reinterpret_cast<const Part*>(slot);
  Accumulator<C, kNT> acc;
  multiply_wide<C, kNT>(w, part.kb_end - part.kb, slot + 128, acc);
  float super[C::kR][2];
#pragma unroll
  for (int r = 0; r < C::kR; ++r) {
    const float2 s = load_supers(slot + 128 + (w.warp * C::kR + r) * kPlaneBytes, w.lane / 4);
    super[r][0] = s.x * 16777216.f, super[r][1] = s.y * 16777216.f;
  }
  finish_part<C, kNT>(w, part, super, shares, acc);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) wide_kernel(const GemmParams p) {
  using S = WideShared<C>;
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (lane == 0) {
    if (warp < C::kStages) S::full()[warp].init(1), S::free()[warp].init(C::kWarps * kWarpArrivals);
    if (warp == C::kWarps) S::shares_there()->init(C::kWarps * kWarpArrivals);
    publish_barriers();
  }
  const Line<C> line = S::line(p);
  line.prepare(p.offsets, p.rows);
  wait_for_prerequisites();
  if (warp >= C::kWarps) {
    give_registers<C::kOrdering>();
    if (warp == C::kWarps) order_stages<C>(p);
  } else {
    take_registers<C::kMultiplying>();
    WideWarp<C> w{p, lane, warp};
    Shares<C> shares{S::shares_there()};
    int left = Waves<C>(line).left, slot = 0;
    while (left > 0) {
      S::full()[w.stage].wait(w.parity);  // the part's description comes with its first unit
      const char* const at = S::slot(slot);
      const Part& part = *reinterpret_cast<const Part*>(at);
      left -= part.kb_end - part.kb;
      run_wide_part<C, C::kNT>(w, at, shares);
      if (++slot == C::kSlots) slot = 0;
    }
    shares.publish(w);
  }
}

}  // namespace ccq
