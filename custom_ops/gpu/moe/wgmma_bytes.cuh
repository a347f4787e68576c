// SPDX-License-Identifier: Apache-2.0
// Hopper's warpgroup tensor instructions on bytes (sm_90a): A, unsigned, from registers; B, signed, from shared memory.
#pragma once

#include "wgmma.cuh"

namespace ccq {

// B's descriptor: rows of 64 bytes (64 values along K), 64-byte swizzle: piece p of 16 bytes of row n lies at p ^ (n / 2 % 4).
// Eight rows are 512 bytes, and the next eight follow; the address is a multiple of 512, plus 32 for the second half of K.
__device__ inline uint64_t byte_descriptor(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | 1ull << 16 | static_cast<uint64_t>(512 >> 4) << 32 | 2ull << 62;
}

#define CCQ_I4(d, i) "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])
#define CCQ_I16(d, i) CCQ_I4(d, i), CCQ_I4(d, i + 1), CCQ_I4(d, i + 2), CCQ_I4(d, i + 3)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CCQ_WGMMA_BYTES(n, names, a_names, b_name, ...)                                                          \
  asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0;\n"                                                          \
               "wgmma.mma_async.sync.aligned.m64n" n "k32.s32.u8.s8 {" names "}, {" a_names "}, " b_name ", p; }\n" \
               : __VA_ARGS__                                                                                    \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))
#else
#define CCQ_WGMMA_BYTES(...)
#endif

// d[64 x 8 kN] += a[64 x 32] * b[32 x 8 kN]; of the 64 rows a warp has 16, in registers as mma.m16n8k32 has them.
__device__ inline void wgmma_bytes(int (&d)[4][4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  CCQ_WGMMA_BYTES("32", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20", CCQ_I16(d, 0));
}
__device__ inline void wgmma_bytes(int (&d)[8][4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  CCQ_WGMMA_BYTES("64", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                  "%27,%28,%29,%30,%31", "%32,%33,%34,%35", "%36",
                  CCQ_I16(d, 0), CCQ_I16(d, 4));
}
__device__ inline void wgmma_bytes(int (&d)[12][4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  CCQ_WGMMA_BYTES("96", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                  "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47", "%48,%49,%50,%51", "%52",
                  CCQ_I16(d, 0), CCQ_I16(d, 4), CCQ_I16(d, 8));
}
__device__ inline void wgmma_bytes(int (&d)[16][4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  CCQ_WGMMA_BYTES("128", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                  "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,"
                  "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63", "%64,%65,%66,%67", "%68",
                  CCQ_I16(d, 0), CCQ_I16(d, 4), CCQ_I16(d, 8), CCQ_I16(d, 12));
}
#undef CCQ_I4
#undef CCQ_I16
#undef CCQ_WGMMA_BYTES

}  // namespace ccq
