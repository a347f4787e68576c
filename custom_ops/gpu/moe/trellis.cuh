// SPDX-License-Identifier: Apache-2.0
// CCQ-2T bytes to tensor-core operands, in registers.
//
// A code byte and the byte before it, q = prev << 8 | cur, are hashed to two words x = q * M + A (mod 2^32). Of each word bytes 0
// and 1 make one weight and bytes 2 and 3 the next: byte 0 - byte 1, byte 2 - byte 3 (docs/reference/formats.md). So the words
// themselves, four unsigned bytes each, are what the integer tensor cores take, against activations (a, -a, b, -b).
//
// A lane has four neighbouring bytes of a column; the byte before them is its neighbour's. Bytes are put together as
// (cur, prev, cur, prev), a permutation of two registers without a zero; that word is q * 65537, and 65537 * 0xFFFF0001 = 1 modulo
// 2^32, so multiplied by M * 0xFFFF0001 it gives q * M exactly.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "../common/trellis_code.h"

namespace ccq {

// For the doubled word.
constexpr uint32_t kTrellisDoubled0 = kTrellisMultiplier[0] * 0xFFFF0001u, kTrellisDoubled1 = kTrellisMultiplier[1] * 0xFFFF0001u;
constexpr uint32_t kTrellisAddend0 = kTrellisAddend[0], kTrellisAddend1 = kTrellisAddend[1];

// Four matrices of 8 rows of 16 bytes, 512 bytes side by side: of each a lane gets the word of its row g and its place t. For the codes of a
// 16-column tile and 128 input rows: the words (g, group 0), (g + 8, group 0), (g, group 1), (g + 8, group 1). `from`: a lane's own
// 16 bytes. All lanes of a warp together.
__device__ inline uint4 load_words(const char* from) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
  return v;
}

// A 16-column tile and 128 input rows, as repacked (trellis_repack.h): what a lane needs to know of the bytes before its own. `side`:
// in the upper half the bytes before the unit, of columns g and g + 8.
struct TrellisBefore {
  uint32_t bytes;  // before the words (g, group 0), (g + 8, group 0), (g, group 1), (g + 8, group 1)

  // `first`: whether the lane is its quad's first. All lanes of a warp together.
  __device__ TrellisBefore(const uint4& q, uint32_t side, uint32_t selector) {
    const uint32_t tops = __byte_perm(__byte_perm(q.x, q.y, 0x0073), __byte_perm(q.z, q.w, 0x0073), 0x5410);
    const uint32_t got = __shfl_sync(~0u, tops, (threadIdx.x & 28) | ((threadIdx.x + 3) & 3));
    bytes = __byte_perm(got, side, selector);
  }
  // Of a quad's first lane: bytes before the unit, then the last ones of group 0; of the others: as they are.
  __device__ static uint32_t selector() { return threadIdx.x % 4 == 0 ? 0x1076u : 0x3210u; }
};

// The two words of byte j of a lane's word; `before`: of TrellisBefore, and which of its bytes.
template <int kByte, int kBefore>
__device__ inline void trellis_words(uint32_t word, uint32_t before, uint32_t addend0, uint32_t addend1, uint32_t& x0, uint32_t& x1) {
  constexpr uint32_t kFirst = (4u + kBefore) << 4, kOther = kByte | (kByte - 1) << 4;
  const uint32_t both = kByte == 0 ? __byte_perm(word, before, kFirst | kFirst << 8) : __byte_perm(word, 0, kOther | kOther << 8);
  x0 = both * kTrellisDoubled0 + addend0;
  x1 = both * kTrellisDoubled1 + addend1;
}

// What two neighbouring values of a row become, times `scale`: integers of two signed digits, each digit as (a, -a, b, -b).
struct TrellisDigits {
  uint32_t upper, lower;
  __device__ TrellisDigits(float a, float b, float scale) {
    // To the nearest integer, in the low bits of 1.5 * 2^23; 128 more, so that the upper byte is the upper digit and the lower one, less
    // 128, the lower digit.
    auto both = [&](float value) {
      const uint32_t plus = __float_as_uint(__fmaf_rn(value, scale, 12582912.f + 128.f));
      const uint32_t minus = __float_as_uint(__fmaf_rn(value, -scale, 12582912.f + 128.f));
      return __byte_perm(plus, minus, 0x4051);  // upper digits, lower digits
    };
    const uint32_t first = both(a), second = both(b);
    upper = __byte_perm(first, second, 0x5410), lower = __byte_perm(first, second, 0x7632) ^ 0x80808080u;
  }
};

}  // namespace ccq
