// SPDX-License-Identifier: Apache-2.0
// Hopper's warpgroup tensor instructions (sm_90a): A from registers, B from shared memory.
#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

namespace ccq {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CCQ_WGMMA 1
#else
#define CCQ_WGMMA 0
#endif

__device__ inline void wgmma_fence() {
#if CCQ_WGMMA
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#if CCQ_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
template <int kPending>
__device__ inline void wgmma_wait() {
#if CCQ_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

// A warpgroup's registers, for and from the block's other ones.
template <int kRegisters>
__device__ inline void give_registers() {
#if CCQ_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ inline void take_registers() {
#if CCQ_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

// B's descriptor: rows of 128 bytes (64 values along K), 128-byte swizzle; `blocks`: bytes from 8 rows to the next 8.
__device__ inline uint64_t descriptor(uint32_t shared, uint32_t blocks) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | 1ull << 16 | static_cast<uint64_t>(blocks >> 4) << 32 | 1ull << 62;
}

#define CCQ_F4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define CCQ_F16(d, i) CCQ_F4(d, i), CCQ_F4(d, i + 1), CCQ_F4(d, i + 2), CCQ_F4(d, i + 3)

// d[64 x kN] = (add ? d : 0) + a[64 x 16] * b[16 x kN]; of the 64 rows a warp has 16.
__device__ inline void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, int add) {
#if CCQ_WGMMA
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16,%17,%18,%19}, %20, p, 1, 1, 0; }\n"
      : CCQ_F16(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
__device__ inline void wgmma(float (&d)[6][4], const uint32_t (&a)[4], uint64_t b, int add) {
#if CCQ_WGMMA
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %29, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, "
      "{%24,%25,%26,%27}, %28, p, 1, 1, 0; }\n"
      : CCQ_F16(d, 0), CCQ_F4(d, 4), CCQ_F4(d, 5) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
__device__ inline void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int add) {
#if CCQ_WGMMA
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31}, "
      "{%32,%33,%34,%35}, %36, p, 1, 1, 0; }\n"
      : CCQ_F16(d, 0), CCQ_F16(d, 4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
__device__ inline void wgmma(float (&d)[12][4], const uint32_t (&a)[4], uint64_t b, int add) {
#if CCQ_WGMMA
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %53, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47}, "
      "{%48,%49,%50,%51}, %52, p, 1, 1, 0; }\n"
      : CCQ_F16(d, 0), CCQ_F16(d, 4), CCQ_F16(d, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
__device__ inline void wgmma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, int add) {
#if CCQ_WGMMA
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"
      "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "{%64,%65,%66,%67}, %68, p, 1, 1, 0; }\n"
      : CCQ_F16(d, 0), CCQ_F16(d, 4), CCQ_F16(d, 8), CCQ_F16(d, 12) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
#undef CCQ_F4
#undef CCQ_F16

}  // namespace ccq
