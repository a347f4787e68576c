// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for many rows an expert, on Hopper's warpgroup tensor instructions (sm_90a).
//
// Decoding costs the same for 8 rows and for 64, so here a tile has up to kN rows and the weights, decoded once, meet
// all of them: `wgmma` takes A (weights) from the registers that decode.cuh fills, in the same layout as mma.sync, and B
// (activations) from shared memory. Scaling accumulators group by group, as moe_gemm.cuh does, would cost per row; so the
// weights become exact fp16 integers instead: (window - 32) * scale nibble, at most 480 in magnitude, times a power of
// two. One half-precision multiply-add makes two of them, nothing is rounded, and accumulators run through all of K.
//
// Tiles, stretches and partial results are moe_gemm.cuh's. Activations go through the same ring as the weights,
// fetched by all warps together; one block barrier a unit makes them common. A unit's stage is reused two rounds later,
// so that the barrier need not wait for the tensor cores.
#pragma once

#include "output.cuh"
#include "waves.cuh"

namespace ccq {

template <Pairs kPairs_, int kR_, int kN_, int kStages_, int kMinBlocks_>
struct WideConfig {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = kR_, kN = kN_, kNT = kN / 8, kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kWarps = 8, kThreads = kWarps * 32, kTileTokens = kN, kTiles = kR * kWarps;
  static constexpr int kAhead = kStages - 2;  // units on their way
  static constexpr int kRowsBytes = kN * 256;  // a stage's activations: two groups of [kN][64], 128-byte swizzle
  static constexpr int kStageBytes = kR * 528, kColumnSlots = kStages + 1;
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1, kColumnBytes = kR * kPlaneBytes * kPlanes;
  static constexpr int kRingBytes = kStages * kStageBytes, kWarpBytes = kRingBytes + kColumnSlots * kColumnBytes;
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;
  // Half-full tiles cost as much as full ones.
  static constexpr int kMostWeight = 1;
  __host__ __device__ static constexpr int weight(int) { return 1; }
  static size_t shared_bytes(int experts) {
    return 1024 + kStages * kRowsBytes + kWarps * kWarpBytes + 16 + Line<WideConfig>::shared_bytes(experts);
  }
};

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

// B's descriptor: rows of 128 bytes (64 values along K), 128-byte swizzle, 1024 bytes from 8 rows to the next 8.
__device__ inline uint64_t descriptor(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define CCQ_F4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define CCQ_F16(d, i) CCQ_F4(d, i), CCQ_F4(d, i + 1), CCQ_F4(d, i + 2), CCQ_F4(d, i + 3)

// d[64 x kN] = (add ? d : 0) + a[64 x 16] * b[16 x kN]; of the 64 rows a warp has 16.
__device__ inline void wgmma(float (&d)[2][4], const uint32_t (&a)[4], uint64_t b, int add) {
#if CCQ_WGMMA
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0; }\n"
      : CCQ_F4(d, 0), CCQ_F4(d, 1) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
__device__ inline void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, int add) {
#if CCQ_WGMMA
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16,%17,%18,%19}, %20, p, 1, 1, 0; }\n"
      : CCQ_F16(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
__device__ inline void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int add) {
#if CCQ_WGMMA
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,"
      "%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0; }\n"
      : CCQ_F16(d, 0), CCQ_F16(d, 4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
__device__ inline uint32_t half2_bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ inline __half2 bits_half2(uint32_t v) { return *reinterpret_cast<__half2*>(&v); }

// A column's scale in one group as fp16 pairs: the nibble (times 16 in odd groups, divided out of the activations), and
// -32 nibbles in the units of even and of odd windows.
struct Scale {
  __half2 n, even, odd;
  // `both`: the byte of the column's two nibbles, in both halves.
  template <int kGroup>
  __device__ static Scale of(uint32_t both) {
    const uint32_t bits = (both & (kGroup ? 0x00F000F0u : 0x000F000Fu)) | 0x64006400u;  // 1024 + nibble
    Scale s;
    s.n = __hsub2(bits_half2(bits), bits_half2(0x64006400u));
    s.even = __hmul2(s.n, bits_half2(0x80208020u));  // -2^-19
    s.odd = __hmul2(s.n, bits_half2(0x81008100u));   // -2^-16
    return s;
  }
  // (window - 32) * nibble of both halves: exact, see the head of this file.
  __device__ uint32_t even_window(uint32_t w) const { return half2_bits(__hfma2(bits_half2(w), n, even)); }
  __device__ uint32_t odd_window(uint32_t w) const { return half2_bits(__hfma2(bits_half2(w), n, odd)); }
};

template <typename C>
struct WideWarp {
  static constexpr int kR = C::kR;
  const GemmParams& p;
  const Line<C> line;
  char* const rows;       // shared: the activations' ring
  char* const ring;
  char* const ring_lane;  // ring + 16 * lane
  const int lane, warp, blocks_k, tiles_n;

  Waves<C> ahead;
  int ahead_stage, ahead_columns, ahead_rows_stage;
  int ahead_count, ahead_first, ahead_rows;
  const uint8_t* ahead_quant;
  const uint8_t* ahead_scales;
  const char* ahead_x;  // this thread's 16 bytes of the tile's first row

  __device__ static int next_stage(int at) { return at + C::kStageBytes == C::kRingBytes ? 0 : at + C::kStageBytes; }
  __device__ static int next_columns(int at) {
    return at + C::kColumnBytes == C::kWarpBytes ? C::kRingBytes : at + C::kColumnBytes;
  }
  __device__ static int next_rows(int at) { return at + C::kRowsBytes == C::kStages * C::kRowsBytes ? 0 : at + C::kRowsBytes; }
  __device__ int owner(const Part& part, int kb) const { return Waves<C>::owner(line, part, kb); }
  __device__ int tile16(int column_tile) const { return column_tile * C::kTiles + warp * kR; }

  __device__ void aim() {  // at the place `ahead`
    const Part t = ahead.part(line);
    ahead_rows = t.rows;
    const int t16 = min(tile16(t.column), (tiles_n - 1) / kR * kR);
    ahead_first = t16 % 4, ahead_count = min(4, tiles_n - t16 / 4 * 4);
    const size_t unit = ccq_unit_index(ahead.expert, t16, ahead.kb, tiles_n, blocks_k);
    ahead_quant = p.quant + unit * 512 + lane * 16;
    ahead_scales = p.scales + unit * 16 + lane * 16;
    ahead_x = p.prepared.rows + (static_cast<size_t>(t.row) * p.k + ahead.kb * 128) * 2 + threadIdx.x % 16 * 16;
    const uint32_t* column = p.columns + (static_cast<size_t>(ahead.expert) * tiles_n + t16) * 32 + lane * 4;
    const size_t plane = static_cast<size_t>(p.experts) * tiles_n * 32;
#pragma unroll
    for (int j = 0; j < C::kPlanes; ++j)
      if (lane < kR * 8 && ahead_first + lane / 8 < ahead_count)
        copy16(ring_lane + ahead_columns + j * (kR * kPlaneBytes), column + j * plane);
  }
  __device__ void request() {  // the next unit of the line, or nothing
    if (ahead.left > 0) {
      char* to = ring_lane + ahead_stage;
#pragma unroll
      for (int r = 0; r < kR; ++r)
        if (r == 0 || ahead_first + r < ahead_count) copy16(to + r * 512, ahead_quant + r * 512);
      if (lane < kR && ahead_first + lane < ahead_count) copy16(to + kR * 512, ahead_scales);
      ahead_quant += ahead_count * 512, ahead_scales += ahead_count * 16;
      ahead_stage = next_stage(ahead_stage);
      // Rows past the tile's last repeat it: their results are not stored.
      const int piece = threadIdx.x % 16;
      char* const x_to = rows + ahead_rows_stage + piece / 8 * (C::kN * 128);
#pragma unroll
      for (int row = threadIdx.x / 16; row < C::kN; row += 16)
        copy16(x_to + row * 128 + ((piece ^ row) & 7) * 16, ahead_x + static_cast<size_t>(min(row, ahead_rows - 1)) * p.k * 2);
      ahead_x += 256;
      ahead_rows_stage = next_rows(ahead_rows_stage);
      const int before = ahead.tile;
      ahead.next(line);
      if (ahead.left > 0 && ahead.tile != before) ahead_columns = next_columns(ahead_columns), aim();
    }
    copy_commit();
  }
};

// Units kb..kb_end of one tile into `acc`.
template <typename C>
__device__ void multiply_wide(WideWarp<C>& w, int kb, int kb_end, int& stage, int& rows_stage, int columns_at,
                              Accumulator<C, C::kNT>& acc) {
  constexpr int kR = C::kR;
  const int g = w.lane / 4;
  Column<C::kPairs> column[kR][2];
  bool first = true;
  int add = 0;  // the first step of all overwrites the accumulators: set to zero by moves they would serialize the rest
  uint32_t a[2][4][4];  // two steps' weights: one is multiplied while the other is decoded
  for (; kb < kb_end; ++kb) {
    copy_wait<C::kAhead - 1>();
#if CCQ_WGMMA
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");  // the tensor cores read what copies wrote
#endif
    __syncthreads();  // all warps' copies are there, and the stage requested now was left by the tensor cores
    if (first) {
      first = false;
      const char* c = w.ring + columns_at;
#pragma unroll
      for (int r = 0; r < kR; ++r) load_columns<C::kPairs>(c + r * kPlaneBytes, c + (kR + r) * kPlaneBytes, g, column[r]);
    }
    w.request();
    const char* const at = w.ring_lane + stage;
    const char* const scales_at = w.ring + stage + kR * 512 + g * 2;
    const uint64_t b = descriptor(static_cast<uint32_t>(__cvta_generic_to_shared(w.rows + rows_stage)));
    stage = WideWarp<C>::next_stage(stage), rows_stage = WideWarp<C>::next_rows(rows_stage);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const uint4 q = *reinterpret_cast<const uint4*>(at + r * 512);
      const uint32_t scale = *reinterpret_cast<const uint16_t*>(scales_at + r * 16);
      const uint32_t left = __byte_perm(scale, 0, 0x4040), right = __byte_perm(scale, 0, 0x4141);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t(&v)[4][4] = a[half];
        wgmma_wait<1>();  // the step before the last one, which read these registers
        const uint32_t low = half ? q.z : q.x, high = half ? q.w : q.y;
        const Scale s = half ? Scale::of<1>(left) : Scale::of<0>(left), u = half ? Scale::of<1>(right) : Scale::of<0>(right);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const Windows x(pair ? column[r][0].template codes<1>(low) : column[r][0].template codes<0>(low));
          const Windows y(pair ? column[r][1].template codes<1>(high) : column[r][1].template codes<0>(high));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[pair * 2 + i][0] = s.even_window(x.w[i * 2]), v[pair * 2 + i][1] = u.even_window(y.w[i * 2]);
            v[pair * 2 + i][2] = s.odd_window(x.w[i * 2 + 1]), v[pair * 2 + i][3] = u.odd_window(y.w[i * 2 + 1]);
          }
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma(acc.o[r], v[i], b + half * (C::kN * 128 / 16) + i * 2, half + i > 0 ? 1 : add);
        wgmma_commit();
      }
    }
    add = 1;
  }
  wgmma_wait<0>();
}

template <typename C>
__device__ void run_wide_part(WideWarp<C>& w, const Part& part, int& stage, int& rows_stage, int columns_at,
                              Shares<C>& shares) {
  constexpr int kNT = C::kNT;
  Accumulator<C, kNT> acc;
  multiply_wide<C>(w, part.kb, part.kb_end, stage, rows_stage, columns_at, acc);
  float super[C::kR][2];
#pragma unroll
  for (int r = 0; r < C::kR; ++r) {
    const float2 s = load_supers(w.ring + columns_at + r * kPlaneBytes, w.lane / 4);
    super[r][0] = s.x * 16777216.f, super[r][1] = s.y * 16777216.f;
  }
  finish_part<C, kNT>(w, part, super, shares, acc);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) wide_kernel(const GemmParams p) {
  dependents_may_start();
  extern __shared__ char unaligned[];
  char* const shared = unaligned + (-static_cast<int>(__cvta_generic_to_shared(unaligned)) & 1023);
  char* const rings = shared + C::kStages * C::kRowsBytes;
  Barrier* const shares_there = reinterpret_cast<Barrier*>(rings + C::kWarps * C::kWarpBytes);
  const int blocks_k = p.k / 128, tiles_n = p.n / 16;
  const Line<C> line{reinterpret_cast<char*>(shares_there + 2), p.experts, p.column_tiles, blocks_k};
  if (threadIdx.x == 0) shares_there->init(C::kWarps);
  line.prepare(p.offsets, p.rows);
  wait_for_prerequisites();
  Waves<C> walk(line);
  if (walk.left == 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* const ring = rings + warp * C::kWarpBytes;
  WideWarp<C> w{p, line, shared, ring, ring + lane * 16, lane, warp, blocks_k, tiles_n, walk, 0, C::kRingBytes, 0};
  w.aim();
#pragma unroll
  for (int i = 0; i < C::kAhead; ++i) w.request();

  Shares<C> shares{shares_there};
  int stage = 0, rows_stage = 0, columns_at = C::kRingBytes;
  while (walk.left > 0) {
    const Part part = walk.part(line);
    run_wide_part<C>(w, part, stage, rows_stage, columns_at, shares);
    columns_at = WideWarp<C>::next_columns(columns_at);
    walk.left -= part.kb_end - part.kb, walk.next_tile(line);
  }
  shares.publish(w);
}

}  // namespace ccq
