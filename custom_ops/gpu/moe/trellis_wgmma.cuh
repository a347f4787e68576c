// SPDX-License-Identifier: Apache-2.0
// Hopper's warpgroup tensor instructions on CCQ-2T's hash words (sm_90a): unsigned bytes from registers, signed ones from shared memory.
#pragma once

#include "wgmma.cuh"

namespace ccq {

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
__device__ inline void wgmma_trellis(int (&d)[3][4], const uint32_t (&a)[4], uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %17, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n24k32.s32.u8.s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}, {%12,%13,%14,%15}, %16, p; }\n"
      : CCQ_D4(d, 0), CCQ_D4(d, 1), CCQ_D4(d, 2)
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

}  // namespace ccq
