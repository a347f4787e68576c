// SPDX-License-Identifier: Apache-2.0
// WINT2 bytes to wgmma's A operand in fp16, with activations that a kernel before has brought to fp16 and into the order that decodes
// best: three operations a byte on the pipe for logic, where activations as the caller has them cost six (wide_weights.cuh).
//
// Of a 64-group, lane t has stored rows 16t to 16t + 15, four bytes. The codes of bytes p and p + 2 lie in one register, so its
// halves give the same window of both: step 2p + s takes windows 3 - 2s and 2 - 2s. The weights are exact.
#pragma once

#include "epilogue.cuh"

namespace ccq {

constexpr float kHalfWeights = 524288.f;  // what weights are divided by, 2^19

// Two fp16 in a register.
__device__ inline uint32_t multiply_add_half2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t v;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  return v;
}

// What turns a column's windows, subnormals w * 2^-24 or eight times that (decode.cuh), into weights (w - 32) * n * 2^-19 with the
// group's scale n: multiplications by `one` or `eighth` and an addition. All of it is exact in fp16.
struct HalfScale {
  uint32_t one, eighth, offset;
  HalfScale() = default;
  // `both`: the column's byte of scales in both halves of a word; kGroup: which of its nibbles.
  template <int kGroup>
  __device__ static HalfScale of(uint32_t both, uint32_t magic) {
    HalfScale s;
    if (kGroup == 0) {  // 2^10 + n: times 2^5, 2^2 and -2^-14
      const uint32_t v = (both & 0x000F000Fu) | magic;
      s.one = multiply_add_half2(v, 0x50005000u, 0xF800F800u), s.eighth = multiply_add_half2(v, 0x44004400u, 0xEC00EC00u);
      s.offset = multiply_add_half2(v, 0x84008400u, 0x2C002C00u);
    } else {  // 2^10 + 16 n: times 2, 2^-2 and -2^-18
      const uint32_t v = (both & 0x00F000F0u) | magic;
      s.one = multiply_add_half2(v, 0x40004000u, 0xE800E800u), s.eighth = multiply_add_half2(v, 0x34003400u, 0xDC00DC00u);
      s.offset = multiply_add_half2(v, 0x80408040u, 0x1C001C00u);
    }
    return s;
  }
};

// Rows scaled by a power of two to fp16, in the order above, [rows, k]; `back`: what undoes the scale, times the caller's row scale.
// A block a row. Counters are set to zero.
static __global__ void __launch_bounds__(kPrepareThreads)
halve_kernel(const void* x, int k, int dtype, bool fastdeploy, const float* row_scale, uint4* to, float* back, int* counter, int counters) {
  wait_for_prerequisites();
  dependents_may_start();
  __shared__ uint32_t largest_of_warp[kPrepareThreads / 32];
  const RowToPrepare row(x, nullptr, 0, k);
  const int chunks = k / 16;
  if (row.row == 0)
    for (int i = threadIdx.x; i < counters; i += kPrepareThreads) counter[i] = 0;
  Chunk chunk{};
  if (static_cast<int>(threadIdx.x) < chunks) chunk.load(row.from, threadIdx.x);
  const RowScale scale(row.largest(chunk, chunks, dtype, largest_of_warp));
  if (threadIdx.x == 0) back[row.row] = row_scale ? scale.back * row_scale[row.row] : scale.back;
  uint4* const out = to + static_cast<size_t>(row.row) * (k / 8);
  // Quads share a group, so whole warps walk the loop together and guard inside it.
  for (int c0 = 0; c0 < chunks; c0 += kPrepareThreads) {
    const int c = c0 + threadIdx.x;
    if (c0 > 0) {
      chunk = Chunk{};
      if (c < chunks) chunk.load(row.from, c);
    }
    if (fastdeploy) chunk.arrange();
    float v[16];
    chunk.values(dtype, v);
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] *= scale.scale;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const uint4 h = fragment_half(v, p, 1.f, 1.f);
      uint32_t words[4] = {h.x, h.y, h.z, h.w};
      transpose_quad(words);
      if (c < chunks) out[c / 4 * 8 + p * 4 + c % 4] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

template <Pairs kPairs, int kR, int kTiles, int kUnits>
struct TileCodes;

template <Pairs kPairs, int kR, int kTiles, int kUnits>
struct HalfDecoder : TileCodes<kPairs, kR, kTiles, kUnits> {
  uint32_t magic;
  // K is even: a constant that the compiler does not know, and so leaves in a register.
  __device__ HalfDecoder(const GemmParams& p, int first) : TileCodes<kPairs, kR, kTiles, kUnits>(first), magic(0x64006400u | (p.k & 1)) {}
  // A's registers of the four steps of its group `half`.
  __device__ void decode(int half, int r, uint32_t (&v)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t both = i ? this->right : this->left;
      const HalfScale s = half ? HalfScale::of<1>(both, magic) : HalfScale::of<0>(both, magic);
      const uint32_t word = half ? (i ? this->q.w : this->q.z) : i ? this->q.y : this->q.x;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const Windows w(pair ? this->column[r][i].template codes<1>(word) : this->column[r][i].template codes<0>(word));
#pragma unroll
        for (int j = 0; j < 4; ++j)
          v[2 * pair + j / 2][j % 2 * 2 + i] = multiply_add_half2(w.w[j], j % 2 ? s.eighth : s.one, s.offset);
      }
    }
  }
};

}  // namespace ccq
