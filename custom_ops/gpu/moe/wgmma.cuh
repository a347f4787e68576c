// SPDX-License-Identifier: Apache-2.0
// Hopper's warpgroup tensor instructions (sm_90a): A from registers, B from shared memory.
#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

namespace ccq {


__device__ inline void wgmma_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
template <int kPending>
__device__ inline void wgmma_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

// Registers that a warpgroup returns to, or takes from, the pool that the block's warpgroups share.
template <int kRegisters>
__device__ inline void deallocate_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ inline void allocate_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

// B's descriptor: rows of 128 bytes (64 values along K), 128-byte swizzle; `blocks`: bytes from 8 rows to the next 8.
__device__ inline uint64_t descriptor(uint32_t shared, uint32_t blocks) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | 1ull << 16 | static_cast<uint64_t>(blocks >> 4) << 32 | 1ull << 62;
}

#define CCQ_F4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define CCQ_F16(d, i) CCQ_F4(d, i), CCQ_F4(d, i + 1), CCQ_F4(d, i + 2), CCQ_F4(d, i + 3)
#define CCQ_WGMMA_OF(type, n, names, a_names, b_name, ...)                                                             \
  asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0;\n"                                                              \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, {" a_names "}, " b_name \
               ", p, 1, 1, 0; }\n"                                                                                   \
               : __VA_ARGS__                                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CCQ_WGMMA(n, names, a_names, b_name, ...)                                    \
  if constexpr (kBf16) CCQ_WGMMA_OF("bf16", n, names, a_names, b_name, __VA_ARGS__); \
  else CCQ_WGMMA_OF("f16", n, names, a_names, b_name, __VA_ARGS__)
#else
#define CCQ_WGMMA(...)
#endif

// d[64 x kN] += a[64 x 16] * b[16 x kN], bfloat16 or float16 operands; of the 64 rows a warp has 16.
template <bool kBf16>
__device__ inline void wgmma(float (&d)[1][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("8", "%0,%1,%2,%3", "%4,%5,%6,%7", "%8", CCQ_F4(d, 0));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[2][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("16", "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12",
            CCQ_F4(d, 0), CCQ_F4(d, 1));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[3][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("24", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11", "%12,%13,%14,%15", "%16",
            CCQ_F4(d, 0), CCQ_F4(d, 1), CCQ_F4(d, 2));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("32", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20",
            CCQ_F16(d, 0));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[6][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("48", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23", "%24,%25,%26,%27", "%28",
            CCQ_F16(d, 0), CCQ_F4(d, 4), CCQ_F4(d, 5));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("64", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
              "%27,%28,%29,%30,%31", "%32,%33,%34,%35", "%36",
            CCQ_F16(d, 0), CCQ_F16(d, 4));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[12][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("96", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
              "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47", "%48,%49,%50,%51", "%52",
            CCQ_F16(d, 0), CCQ_F16(d, 4), CCQ_F16(d, 8));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("128", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
              "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,"
              "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63", "%64,%65,%66,%67", "%68",
            CCQ_F16(d, 0), CCQ_F16(d, 4), CCQ_F16(d, 8), CCQ_F16(d, 12));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[18][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("144", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
              "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,"
              "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71", "%72,%73,%74,%75", "%76",
            CCQ_F16(d, 0), CCQ_F16(d, 4), CCQ_F16(d, 8), CCQ_F16(d, 12), CCQ_F4(d, 16), CCQ_F4(d, 17));
}
template <bool kBf16>
__device__ inline void wgmma(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b) {
  CCQ_WGMMA("256",
              "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26"
              ",%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51"
              ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76"
              ",%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100"
              ",%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120"
              ",%121,%122,%123,%124,%125,%126,%127",
            "%128,%129,%130,%131", "%132",
            CCQ_F16(d, 0), CCQ_F16(d, 4), CCQ_F16(d, 8), CCQ_F16(d, 12), CCQ_F16(d, 16), CCQ_F16(d, 20), CCQ_F16(d, 24),
            CCQ_F16(d, 28));
}
#undef CCQ_F4
#undef CCQ_F16
#undef CCQ_WGMMA
#undef CCQ_WGMMA_OF

}  // namespace ccq
