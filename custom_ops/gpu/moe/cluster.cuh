// SPDX-License-Identifier: Apache-2.0
// Thread blocks of a cluster (Hopper): writing into each other's shared memory, and barriers for it.
#pragma once

#include "ring.cuh"

namespace ccq {

__device__ inline int cluster_rank() {
  uint32_t rank = 0;
#if CCQ_BULK
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// All threads of all blocks; what each wrote to shared memory before is seen by all after it.
__device__ inline void cluster_barrier() {
#if CCQ_BULK
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

// Where block `rank` has what this block has at p.
__device__ inline uint32_t address_in(const void* p, int rank) {
  uint32_t at = 0;
#if CCQ_BULK
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
#endif
  return at;
}

// Four words into a block's memory; its barrier counts the 16 bytes when they are there. Both addresses by address_in.
__device__ inline void store_async(uint32_t to, uint4 v, uint32_t barrier) {
#if CCQ_BULK
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];\n" ::"r"(to), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
#endif
}

// An arrival at a barrier of another block, after all that this thread did.
__device__ inline void arrive_at(uint32_t barrier) {
#if CCQ_BULK
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];\n" ::"r"(barrier) : "memory");
#endif
}

// Barrier::wait where other blocks arrive.
__device__ inline void wait_for_cluster(Barrier* barrier, uint32_t parity) {
#if CCQ_BULK
  uint32_t passed;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }\n"
                 : "=r"(passed)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!passed);
#endif
}

}  // namespace ccq
