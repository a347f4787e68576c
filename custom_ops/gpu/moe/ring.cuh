// SPDX-License-Identifier: Apache-2.0
// Weights on their way: barriers in shared memory, bulk copies, and the ring of units that each warp has to itself.
//
// A warp alone reads its ring, so nothing but the copy engine has to be waited for: when all lanes have asked for a unit's
// bytes, one lane requests the next unit into the same place. (Asked for, not received: a copy takes 600 cycles and more until
// its first byte is there, a load of shared memory some tens. Where `wgmma` reads shared memory beside, loads wait longer, and a
// stage must be passed on after what uses them.) On Hopper two bulk copies fetch a unit, each
// one instruction of one lane; before it, every lane fetches by cp.async the 16 bytes that it will itself decode.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "decode.cuh"

namespace ccq {

#ifndef CCQ_BULK  // 0 when given: what older GPUs run, tried on a newer one
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CCQ_BULK 1
#else
#define CCQ_BULK 0
#endif
#endif

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A lane arrives for its warp after __syncwarp. compute-sanitizer's racecheck takes that for a race of the other lanes, so
// in builds for it (-DCCQ_SANITIZE) each lane arrives for itself.
#ifdef CCQ_SANITIZE
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif

// A barrier in shared memory (mbarrier). It is passed when `count` arrivals, and all bytes that were announced, are there;
// then it begins anew. Waiting names the parity of the round: 0, 1, 0, ...
struct Barrier {
  uint64_t state;

  __device__ void init(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(this)), "r"(count) : "memory");
  }
  __device__ void arrive() {
    asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }\n" ::"r"(shared_address(this)) : "memory");
  }
  // A warp's arrival (kWarpArrivals), after all that its lanes did. All lanes together.
  __device__ void arrive_together() {
    __syncwarp();
    if (kWarpArrivals == 32 || threadIdx.x % 32 == 0) arrive();
  }
  // One arrival that also announces bytes of bulk copies.
  __device__ void arrive_and_expect(int bytes) {
#if CCQ_BULK
    asm volatile("{ .reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [%0], %1; }\n" ::"r"(shared_address(this)),
                 "r"(bytes)
                 : "memory");
#endif
  }
  // Bytes of bulk copies on top of those of the arrival to come.
  __device__ void expect(int bytes) {
#if CCQ_BULK
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
#endif
  }
  // One arrival once all earlier cp.async of this thread are there.
  __device__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];\n" ::"r"(shared_address(this)) : "memory");
  }
  __device__ void wait(uint32_t parity) {
    uint32_t passed;
    do {
#if CCQ_BULK
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }\n"
#else
      asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }\n"
#endif
                   : "=r"(passed)
                   : "r"(shared_address(this)), "r"(parity)
                   : "memory");
    } while (!passed);
  }
};

// After Barrier::init, by who called it, and before the block's barrier: for the copy engine to see it.
__device__ inline void publish_barriers() {
#if CCQ_BULK
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// A barrier of some of a block's warps.
template <int kId, int kThreads>
__device__ inline void named_barrier() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(kId), "n"(kThreads) : "memory");
}

// Weights that are read once leave the cache before activations, partial results and code do. `again`: other rows of the
// same expert will read them on another multiprocessor, soon but not at once.
__device__ inline uint64_t streaming_policy(bool again = false) {
  uint64_t policy = 0;
#if CCQ_BULK
  if (again) asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(policy));
  else asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
#endif
  return policy;
}

// Global to shared memory: multiples of 16 bytes, announced to the barrier.
__device__ inline void bulk_copy(void* to, const void* from, int bytes, Barrier* barrier, uint64_t policy) {
#if CCQ_BULK
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;\n" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
#endif
}
__device__ inline void bulk_copy(void* to, const void* from, int bytes, Barrier* barrier) {
#if CCQ_BULK
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// A box of a matrix, of the size that its map says, from column `x` and row `y` on; what lies outside the matrix becomes zero.
template <typename Map>
__device__ inline void box_copy(void* to, const Map& map, int x, int y, Barrier* barrier) {
#if CCQ_BULK
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Towards L2. Allowed before an earlier kernel has ended, for nothing is read: what that kernel still writes is in L2 too.
__device__ inline void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from)); }

// kStages units of kR tiles: [r][512] codes, [r][16] scales.
template <int kR, int kStages>
struct Ring {
  static constexpr int kUnitBytes = kR * 528, kBytes = kStages * kUnitBytes;
  char* unit;     // the unit to be read next, or being read
  Barrier* full;  // its barrier: one arrival a round
  int left = kStages;  // stages up to the end of the memory
  uint32_t parity = 0;

  __device__ Ring(char* memory, Barrier* barriers) : unit(memory), full(barriers) {}

  // `tiles` <= kR tiles that lie side by side, into the stage that all lanes have left (`ahead` stages after it).
  __device__ void fetch(const uint8_t* quant, const uint8_t* scales, int tiles, int ahead = 0, bool again = false) {
    char* const to = unit + ahead * kUnitBytes;
#if CCQ_BULK
    if (threadIdx.x % 32 == 0) {
      full[ahead].arrive_and_expect(tiles * 528);
      const uint64_t policy = streaming_policy(again);
      bulk_copy(to, quant, tiles * 512, full + ahead, policy);
      bulk_copy(to + kR * 512, scales, tiles * 16, full + ahead, policy);
    }
#else
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < kR; ++r)
      if (r < tiles) copy16(to + r * 512 + lane * 16, quant + r * 512 + lane * 16);
    if (lane < tiles) copy16(to + kR * 512 + lane * 16, scales + lane * 16);
#endif
  }
  // Once for each unit, fetched or not: keeps count of what is on its way.
  __device__ void commit() {
#if !CCQ_BULK
    copy_commit();
#endif
  }
  // Until the unit is there for all lanes.
  __device__ void wait() {
#if CCQ_BULK
    full->wait(parity);
#else
    copy_wait<kStages - 1>();
    __syncwarp();
#endif
  }
  __device__ void next() {
    unit += kUnitBytes, ++full;
    if (--left == 0) unit -= kBytes, full -= kStages, left = kStages, parity ^= 1;
  }
};

}  // namespace ccq
