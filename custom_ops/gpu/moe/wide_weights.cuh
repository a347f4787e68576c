// SPDX-License-Identifier: Apache-2.0
// WINT2 bytes to wgmma's A operand, in the order that the input rows themselves have.
//
// FastDeploy's order of rows (repack.h) gives the four weights of a byte to one lane in just the places that a step of 16 input
// rows wants: byte j of a lane's four is step j, its weights rows 2t, 2t + 1, 2t + 8 and 2t + 9. So activations need no
// preparation, and one code becomes two registers of two weights. A register's halves hold 6-bit windows that stand three bits
// apart in the code; so the code is put beside itself, shifted by three bits, and one mask takes both.
//
// A weight is (window - 32) * scale nibble, an integer up to 480 in magnitude: exact in float16; in bfloat16, whose operands
// bfloat16 activations need, odd numbers above 256 round to their even neighbours, 1.2e-3 of the weights' norm.
#pragma once

#include "decode.cuh"

namespace ccq {

// Two 16-bit floats in a register.
template <bool kBf16>
struct Two {
  // 2^7 or 2^10 in both halves: the lowest bits of their mantissas count ones.
  static constexpr uint32_t kMagic = kBf16 ? 0x43004300u : 0x64006400u;
  static constexpr uint32_t kOffset = kBf16 ? 0xC320C320u : 0xE420E420u;  // -(2^7 + 32), -(2^10 + 32)
  static constexpr uint32_t kOne = kBf16 ? 0x3F803F80u : 0x3C003C00u, kMinus = 0x80008000u;
  __device__ static uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t v;
    if constexpr (kBf16) asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
  }
};

// A column's scale in one group, in both halves, and what a window's offset makes of it. Exact.
template <bool kBf16>
struct WideScale {
  uint32_t n, offset;
  // `both`: the column's nibble lowest in both halves, anything above it.
  __device__ static WideScale of(uint32_t both) {
    WideScale s;
    using T = Two<kBf16>;
    s.n = T::multiply_add((both & 0x000F000Fu) | T::kMagic, T::kOne, T::kMagic ^ T::kMinus);
    s.offset = T::multiply_add(s.n, T::kOffset, T::kMinus);  // -0 in both halves
    return s;
  }
  // Of bytes j and j + 2, whose codes are in the halves of `codes`: rows 2t and 2t + 1 of steps j and j + 2, then rows 2t + 8 and
  // 2t + 9. `magic` is Two::kMagic in a register, so that AND and OR are one instruction.
  __device__ void weights(uint32_t codes, uint32_t magic, uint32_t (&first)[2], uint32_t (&second)[2]) const {
    const uint32_t shifted = codes >> 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t apart = __byte_perm(shifted, codes, i ? 0x7632 : 0x5410);
      first[i] = Two<kBf16>::multiply_add((apart >> 6 & 0x003F003Fu) | magic, n, offset);
      second[i] = Two<kBf16>::multiply_add((apart & 0x003F003Fu) | magic, n, offset);
    }
  }
};

}  // namespace ccq
