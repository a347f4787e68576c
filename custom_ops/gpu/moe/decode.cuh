// SPDX-License-Identifier: Apache-2.0
// WINT2 bytes to tensor-core operands, in registers.
//
// At 3 TB/s an H100 SM receives about 52 weights a clock and issues 64 integer lanes a clock, so decoding may cost about
// one integer operation a weight. What makes it fit:
//
// - A code's windows are read as fp16 SUBNORMALS. Two 15-bit codes stand in one register (16x2); `c & 0x003F003F` is
//   window 3 as w * 2^-24, `c & 0x01F801F8` window 2 as 8 w * 2^-24; after one `c >> 6` the same masks give windows 1
//   and 0. Tensor cores take subnormals at full speed, so there is no exponent to OR in and nothing to subtract. The
//   factor 8 is divided out of the activations and 2^24 multiplied into the super scale. The offset of -32 times the sum of
//   a group's activations, which stands ready, is what the group's accumulators begin with.
// - An integer pair decodes two bytes with one multiply-add: (q0 | q1 << 16) * scale + (zp | zp << 16). Both codes lie
//   in [0, 2^15) (checked when repacking), so no carry crosses.
// - The scale of a group multiplies the fp32 accumulator of 16 columns x 8 tokens, never a weight.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace ccq {

enum class Pairs { kInteger, kGeneral };

// What decoding needs to know of one column.
template <Pairs kPairs>
struct Column;

template <>
struct Column<Pairs::kInteger> {
  uint32_t scale, zp2;
  __device__ Column() {}
  __device__ explicit Column(uint32_t pair) {  // of plane 0 (repack.h)
    scale = static_cast<uint32_t>(static_cast<int32_t>(pair << 16) >> 16);
    zp2 = __byte_perm(pair, 0, 0x3232);
    asm volatile("" : "+r"(scale), "+r"(zp2));  // kept, not made anew at every use
  }
  // Codes of bytes 0 and 2 of `word` for pair 0, of bytes 1 and 3 for pair 1.
  template <int kPair>
  __device__ uint32_t codes(uint32_t word) const {
    uint32_t q = kPair == 0 ? word & 0x00FF00FFu : __byte_perm(word, 0, 0x4341);
    return q * scale + zp2;
  }
};

template <>
struct Column<Pairs::kGeneral> {
  static constexpr float kUp = 2596148429267413814265248164610048.f, kDown = 1.f / (1 << 30);  // 2^111, 2^-30
  float scale, offset;
  __device__ Column() {}
  __device__ Column(float code_scale, float code_zp) {
    scale = code_scale * kUp;
    offset = __fadd_rn(code_zp, 0.5f) * kDown;
  }
  // floor(fma(q, scale, offset)), low 16 bits: FastDeploy's rounding, all of it divided by 2^30, which rounds alike. The byte,
  // in bits 8 to 15 of a word, is a subnormal float: q * 2^-141, so that it need not be converted (2^111 stand in the scale).
  // The floor is an addition of 1.5 * 2^23 rounded down, which leaves the integer in the low mantissa bits. Both run at the
  // full float rate, where float-to-int conversions run at an eighth of it.
  template <int kByte>
  __device__ uint32_t code(uint32_t word) const {
    const float q = __uint_as_float(__byte_perm(word, 0, 0x4404 | kByte << 4));
    return __float_as_uint(__fadd_rd(__fmaf_rn(q, scale, offset), 12582912.f * kDown));
  }
  template <int kPair>
  __device__ uint32_t codes(uint32_t word) const {
    return __byte_perm(code<kPair>(word), code<kPair + 2>(word), 0x5410);
  }
};

// A tile's columns g and g + 8 from the words that repack.h puts there; plane 1 is read for general pairs alone.
template <Pairs kPairs>
__device__ inline void load_columns(const void* plane0, const void* plane1, int g, Column<kPairs> (&to)[2]);
template <>
__device__ inline void load_columns(const void* plane0, const void*, int g, Column<Pairs::kInteger> (&to)[2]) {
  const uint2 v = static_cast<const uint2*>(plane0)[g];
  to[0] = Column<Pairs::kInteger>(v.x), to[1] = Column<Pairs::kInteger>(v.y);
}
template <>
__device__ inline void load_columns(const void*, const void* plane1, int g, Column<Pairs::kGeneral> (&to)[2]) {
  const float4 v = static_cast<const float4*>(plane1)[g];
  to[0] = Column<Pairs::kGeneral>(v.x, v.y), to[1] = Column<Pairs::kGeneral>(v.z, v.w);
}
// Their super scales.
__device__ inline float2 load_supers(const void* plane0, int g) { return static_cast<const float2*>(plane0)[8 + g]; }

constexpr int kPlaneBytes = 128;  // of one tile in either plane

// The four A registers' worth of one pair: windows 3, 2, 1, 0 of both codes, as fp16 subnormals (see above).
struct Windows {
  uint32_t w[4];
  __device__ explicit Windows(uint32_t c) {
    w[0] = c & 0x003F003Fu;
    w[1] = c & 0x01F801F8u;
    c >>= 6;  // what the upper code leaves in the lower half's bits 10 to 15 is masked away
    w[2] = c & 0x003F003Fu;
    w[3] = c & 0x01F801F8u;
  }
};

// The same eight windows as bytes, for the integer tensor cores. Windows 0 and 2 of a code end three bits below windows 1 and 3: two
// shifts, each with one mask, bring every window into a byte of its own. Windows 2 and 3 stand there as four times themselves, so the
// activations that they meet are quartered.
struct ByteWindows {
  uint32_t even, odd;  // bytes: four times window 2 (3), window 0 (1), of the lower code, then of the upper one
  // `four` in a register, so that it stays a multiplication, which another pipe makes.
  __device__ ByteWindows(uint32_t c, uint32_t four) {
    // What one code spills into the other's half is masked away.
    even = (c >> 1) & 0x3FFC3FFCu;
    odd = (c * four) & 0x3FFC3FFCu;
  }
};

// 16x8 = 16x32 * 32x8 + c, unsigned bytes by signed bytes; c is the same for rows g and g + 8.
__device__ inline void mma_bytes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                                 int c0, int c1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%10,%11};\n"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c0), "r"(c1));
}
__device__ inline void mma_bytes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Nibble i of a scale word as float, times 16^i. OR-ed into the mantissa of 2^23, which is then subtracted; `magic` is
// kMagic in a register, so that AND and OR are one instruction. The powers of 16 cost nothing: those of odd nibbles
// (odd groups) are divided out of the activations, that of the upper two (columns g + 8) out of the super scale.
constexpr uint32_t kMagic = 0x4B000000u;
constexpr float kOddGroup = 1.f / 16.f, kUpperColumns = 1.f / 256.f;
// Windows are 32 less than they are stored, and read as subnormals.
constexpr float kOffset = -32.f / 16777216.f;
template <int i>
__device__ inline float nibble(uint32_t word, uint32_t magic) {
  return __uint_as_float((word & (0xFu << (4 * i))) | magic) - 8388608.f;
}

// Rows of a 64-group in the order the fragments want them. Lane t of a quad owns rows 16t..16t+15 (four bytes). Its
// B registers, two 16-byte halves p = 0, 1 of four registers i = 0..3, hold rows 4p + 3 - i (low half of the register)
// and 4(p + 2) + 3 - i (high), matching Windows::w[i] of codes<p>. Registers 1 and 3 carry the factor 1/8.
__host__ __device__ constexpr int fragment_row(int p, int i, int high) { return 4 * (p + 2 * high) + 3 - i; }

// 16x8 += 16x16 * 16x8, fp16 operands, fp32 accumulators.
__device__ inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16x8 = 16x16 * 16x8 + c.
__device__ inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                           const float4& c) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y), "f"(c.z), "f"(c.w));
}

__device__ inline void copy16(void* shared, const void* global) {
  uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace ccq
