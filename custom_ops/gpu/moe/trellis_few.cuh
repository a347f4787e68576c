// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM with CCQ-2T weights for one to eight rows an expert, in a single launch.
//
// Work. A tile is (expert, kRows of its rows or fewer, 64 columns) and all of K. Blocks take equal contiguous ranges of tiles. A stage
// is 512 input rows of a tile's 64 columns, contiguous in memory: one copy. The stages of a range go in turn to four warpgroups, each
// warp of which has 16 of the columns. Sums of a tile's parts meet in shared memory.
//
// Warps. Sixteen multiply; one requests stages; one adds up the sums of a tile and writes them.
//
// Weights. The two hash words of a code byte are the tensor cores' unsigned bytes as they stand (trellis.cuh). On Hopper `wgmma` takes
// them from registers and runs while the next group is decoded: two groups are under way, with accumulators of their own, and a group's
// scale meets its accumulators one group later. Before Hopper mma.sync does the same.
//
// Activations are integers of 16 bits, two signed digits of 8, of the value and of its negative, in blocks of 512 values of a row with a
// scale each. They stand in shared memory, all of K, in the order in which `wgmma` reads B: of each step of four code bytes (one a
// lane of a quad) two matrices of columns (row, digit) x 16 bytes, one for each hash word. Integer sums are exact.
#pragma once

#include "moe_few.cuh"
#include "trellis.cuh"
#include "wgmma.cuh"

namespace ccq {

// 64 columns x 128 rows of packed weights: codes of four 16-column tiles, then a word for each two columns (trellis_repack.h).
constexpr int kTrellisUnitBytes = 4 * 512 + 4 * 32;

// One launch multiplies K input rows `k` of `all_k`, from `first_k` on. More launches than one pass their sums on, as float32.
struct TrellisFewParams : FewParams {
  int all_k, first_k;
  float* partial;    // [rows, n], or NULL
  bool adds, hands;  // to what an earlier launch left there; to a later one
};

// kStages: copies on their way; a multiple of the warpgroups. kSumsSlots: tiles whose sums are under way; where K is below 2048, a
// warpgroup that has no part in every tile must have one in each tile of a slot or in none of it: four.
template <int kRows_, int kStages_, bool kWgmma_, int kSumsSlots_ = 4>
struct TrellisFewConfig {
  static constexpr bool kWgmma = kWgmma_;
  static constexpr int kRows = kRows_, kStages = kStages_;
  static constexpr int kNT = kRows > 4 ? kRows / 4 : 1;  // 8-column blocks of the second operand
  static constexpr int kWK = 4, kWN = 4, kWarps = kWK * kWN, kThreads = kWarps * 32, kTiles = 4;
  static constexpr int kProducer = kWarps, kWriter = kWarps + 1, kAllThreads = kThreads + 128;
  // Registers of a thread: 96 at the beginning; then those of the warps that request and write, and of those that multiply.
  static constexpr int kOtherRegisters = 64, kConsumerRegisters = 104;
  static_assert(kThreads * kConsumerRegisters + 128 * kOtherRegisters <= kAllThreads * 96, "what is given back is taken");
  static constexpr int kUnits = 4, kStageBytes = kUnits * kTrellisUnitBytes, kRingsBytes = kStages * kStageBytes;
  static_assert(kStages % kWK == 0 && kMaxExperts % kThreads == 0);
  static constexpr int kColumnSlots = 4, kColumnBytes = kTiles * 16 * 4;
  static constexpr int kSumsSlots = kSumsSlots_, kEntries = kTiles * 8 * kRows;
  static constexpr int kBarriers = 2 * kStages + 2 * kColumnSlots + 2 * kSumsSlots;
  // Of a group's activations: four steps of two matrices of 16 bytes a column (`wgmma` has whole blocks of 8); 16 more, so that lanes
  // of several groups write to different banks.
  static constexpr int kColumns = kWgmma ? 8 * kNT : 2 * kRows;
  static constexpr int kHalfStepBytes = 16 * kColumns, kStepBytes = 2 * kHalfStepBytes, kGroupBytes = 4 * kStepBytes + 16;
  static constexpr int kKept = 4;  // chunks that a lane loads at once

  __host__ __device__ static constexpr int stages_of(int blocks_k) { return (blocks_k + kUnits - 1) / kUnits; }
  __host__ __device__ static constexpr int slices(int blocks_k) { return stages_of(blocks_k) < kWK ? stages_of(blocks_k) : kWK; }
  // Whole stages; by mma.sync a lane may read 8 columns where there are less.
  __host__ __device__ static constexpr int activation_bytes(int blocks_k) {
    return stages_of(blocks_k) * 2 * kUnits * kGroupBytes + (kWgmma ? 0 : 128);
  }
  __host__ __device__ static constexpr int back_bytes(int blocks_k) { return (stages_of(blocks_k) * kRows * 4 + 15) / 16 * 16; }
  __host__ __device__ static constexpr int entries(int experts) { return kRows > 1 ? experts + 1 : 64; }
  static constexpr size_t shared_bytes(int k, int experts) {
    const int blocks_k = k / 128;
    return kRingsBytes + kColumnSlots * kColumnBytes + kSumsSlots * kWK * kEntries * 8 + activation_bytes(blocks_k) +
           back_bytes(blocks_k) + kBarriers * 8 + sizeof(FewStart) + 2 * entries(experts) * sizeof(int);
  }
  // `k` of one launch.
  static constexpr bool suits(int k) { return kSumsSlots == 4 || stages_of(k / 128) >= kWK; }
};

// Where things lie in shared memory; of FewShared (few_schedule.cuh) what the scans of offsets use.
template <int kRows, int kStages, bool kWgmma, int kSumsSlots>
struct FewShared<TrellisFewConfig<kRows, kStages, kWgmma, kSumsSlots>> {
  using C = TrellisFewConfig<kRows, kStages, kWgmma, kSumsSlots>;
  char *rings, *columns, *activations;
  float2* sums;  // [kSumsSlots][kWK][kEntries]
  float* back;   // [stages of K][kRows]: undoes the scale of 512 values of a row, times the caller's row scale
  Barrier *full, *free, *columns_full, *columns_free, *sums_ready, *sums_free;
  FewStart* start;
  int *blocks, *rows;

  __device__ FewShared(char* at, int blocks_k, int experts) {
    auto take = [&at](int bytes) { char* p = at; at += bytes; return p; };
    rings = take(C::kRingsBytes);
    columns = take(C::kColumnSlots * C::kColumnBytes);
    sums = reinterpret_cast<float2*>(take(C::kSumsSlots * C::kWK * C::kEntries * 8));
    activations = take(C::activation_bytes(blocks_k));
    back = reinterpret_cast<float*>(take(C::back_bytes(blocks_k)));
    full = reinterpret_cast<Barrier*>(take(C::kBarriers * 8));
    free = full + C::kStages, columns_full = free + C::kStages, columns_free = columns_full + C::kColumnSlots;
    sums_ready = columns_free + C::kColumnSlots, sums_free = sums_ready + C::kSumsSlots;
    start = reinterpret_cast<FewStart*>(take(sizeof(FewStart)));
    blocks = reinterpret_cast<int*>(take(4 * C::entries(experts)));
    rows = reinterpret_cast<int*>(take(4 * C::entries(experts)));
  }
};

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
// Until at most kPending groups are under way; then d may be read.
template <int kPending, int kNT>
__device__ inline void wgmma_wait_for(int (&d)[kNT][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %4;\n" : CCQ_D4(d, 0) : "n"(kPending) : "memory");
#pragma unroll
  for (int j = 1; j < kNT; ++j) asm volatile("" : CCQ_D4(d, j)::"memory");
#endif
}
#undef CCQ_D4

// The consumer warps' barrier.
__device__ inline void consumers_meet(int threads) { asm volatile("bar.sync 1, %0;\n" ::"r"(threads) : "memory"); }

// A warp converts blocks of 512 values, a lane 16 of them: block `item` of a tile's rows is (row, block of K).
template <typename C>
__device__ void trellis_load(const TrellisFewParams& p, const FewShared<C>& s, const FewRows& rows, int first, Chunk (&kept)[C::kKept]) {
  int row, count;
  rows.place<C>(p, s, &row, &count);
  const int stages = C::stages_of(p.k / 128);
#pragma unroll
  for (int i = 0; i < C::kKept; ++i) {
    const int item = first + i * C::kWarps, r = item / stages, c = (item - r * stages) * 32 + threadIdx.x % 32;
    kept[i] = Chunk{};
    const size_t value = static_cast<size_t>(row + r) * p.all_k + p.first_k;
    if (r < count && c < p.k / 16) kept[i].load(static_cast<const char*>(p.x) + value * 2, c);
  }
}

// The consumer warps together: a tile's rows become digits in shared memory. `kept`: each warp's first items.
template <typename C>
__device__ void trellis_convert(const TrellisFewParams& p, const FewShared<C>& s, const FewRows& rows, int warp, Chunk (&kept)[C::kKept]) {
  const int lane = threadIdx.x % 32, stages = C::stages_of(p.k / 128);
  int first_row, count;
  rows.place<C>(p, s, &first_row, &count);
  const int items = stages * count;
#pragma unroll 1
  for (int first = warp; first < items; first += C::kKept * C::kWarps) {
    if (first != warp) trellis_load<C>(p, s, rows, first, kept);
#pragma unroll
    for (int i = 0; i < C::kKept; ++i) {
      const int item = first + i * C::kWarps, row = item / stages, block = item - row * stages;
      if (item >= items) break;
      const IntegerScale own(__reduce_max_sync(~0u, kept[i].largest(p.dtype)));
      if (lane == 0) s.back[block * C::kRows + row] = p.row_scale ? own.back * p.row_scale[first_row + row] : own.back;
      float v[16];
      kept[i].values(p.dtype, v);
      // To the nearest integer, in the low bits of 1.5 * 2^23; 128 more, so that the upper byte is the upper digit and the lower
      // one, less 128, the lower digit.
      auto both = [&](float value) {
        const uint32_t plus = __float_as_uint(__fmaf_rn(value, own.scale, 12582912.f + 128.f));
        const uint32_t minus = __float_as_uint(__fmaf_rn(value, -own.scale, 12582912.f + 128.f));
        return __byte_perm(plus, minus, 0x4051);  // upper digits, lower digits
      };
      const int group = block * 8 + lane / 4;
      char* const to = s.activations + group * C::kGroupBytes + row * 32 + lane % 4 * 4;  // 8 columns are 128 bytes
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t a = both(v[4 * j + 2 * m]), b = both(v[4 * j + 2 * m + 1]);
          char* const at = to + j * C::kStepBytes + m * C::kHalfStepBytes;
          *reinterpret_cast<uint32_t*>(at) = __byte_perm(a, b, 0x5410);
          *reinterpret_cast<uint32_t*>(at + 16) = __byte_perm(a, b, 0x7632) ^ 0x80808080u;
        }
    }
  }
}

// A group's weights: of each byte of a lane's two words (columns g and g + 8) the four registers of A.
__device__ inline void trellis_decode(uint32_t left, uint32_t right, uint32_t before, uint32_t addend0, uint32_t addend1,
                                      uint32_t (&a)[4][4]) {
  trellis_words<0, 0>(left, before, addend0, addend1, a[0][0], a[0][2]);
  trellis_words<0, 1>(right, before, addend0, addend1, a[0][1], a[0][3]);
  trellis_words<1, 0>(left, 0, addend0, addend1, a[1][0], a[1][2]);
  trellis_words<1, 0>(right, 0, addend0, addend1, a[1][1], a[1][3]);
  trellis_words<2, 0>(left, 0, addend0, addend1, a[2][0], a[2][2]);
  trellis_words<2, 0>(right, 0, addend0, addend1, a[2][1], a[2][3]);
  trellis_words<3, 0>(left, 0, addend0, addend1, a[3][0], a[3][2]);
  trellis_words<3, 0>(right, 0, addend0, addend1, a[3][1], a[3][3]);
}

// d = a group's weights times its activations: `b` describes them, and they lie at `x`. By `wgmma`: is under way afterwards.
template <typename C>
__device__ void trellis_multiply(int (&d)[C::kNT][4], const uint32_t (&a)[4][4], uint64_t b, const char* x) {
  if constexpr (C::kWgmma) {
    wgmma_fence();
    wgmma_trellis<false>(d, a[0], b);
#pragma unroll
    for (int j = 1; j < 4; ++j) wgmma_trellis<true>(d, a[j], b + j * (C::kStepBytes / 16));
    wgmma_commit();
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < C::kNT; ++i) {
        const char* const own = x + j * C::kStepBytes + i * 128;
        const uint32_t b0 = *reinterpret_cast<const uint32_t*>(own);
        const uint32_t b1 = *reinterpret_cast<const uint32_t*>(own + C::kHalfStepBytes);
        if (j == 0) mma_bytes(d[i], a[j][0], a[j][1], a[j][2], a[j][3], b0, b1, 0, 0);
        else mma_bytes(d[i], a[j][0], a[j][1], a[j][2], a[j][3], b0, b1);
      }
  }
}

// A stage's part of the sums into `out`: columns g and g + 8, row t of each four. `codes`: a lane's first word, `sides`: its column's
// word of the unit's side; both are read a unit ahead.
template <typename C>
__device__ void trellis_stage(const char* codes, const char* sides, uint64_t b, const char* x, const float* back, Barrier* free,
                              uint32_t selector, uint32_t addend0, uint32_t addend1, float2 (&out)[C::kNT]) {
  int o[C::kNT][4] = {}, d[2][C::kNT][4];
  uint32_t a[2][4][4], side = 0, earlier_side = 0, next_side;
  uint4 q, next;
  auto load = [&](int u) {
    auto word = [&](int i) { return *reinterpret_cast<const uint32_t*>(codes + u * kTrellisUnitBytes + i * 128); };
    next = make_uint4(word(0), word(1), word(2), word(3));
    next_side = *reinterpret_cast<const uint32_t*>(sides + u * kTrellisUnitBytes);
  };
  auto scaled = [&](int half, uint32_t scales) {
    const int f0 = scales >> 4 * half & 15, f1 = scales >> (8 + 4 * half) & 15;
#pragma unroll
    for (int j = 0; j < C::kNT; ++j) {
      o[j][0] += f0 * d[half][j][0], o[j][1] += f0 * d[half][j][1];
      o[j][2] += f1 * d[half][j][2], o[j][3] += f1 * d[half][j][3];
    }
  };
  load(0);
#pragma unroll
  for (int u = 0; u < C::kUnits; ++u) {
    q = next, earlier_side = side, side = next_side;
    const uint32_t before = TrellisBefore(q, side, selector).bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = 2 * u + half;
      trellis_decode(half ? q.z : q.x, half ? q.w : q.y, half ? before >> 16 : before, addend0, addend1, a[half]);
      trellis_multiply<C>(d[half], a[half], b + group * (C::kGroupBytes / 16), x + group * C::kGroupBytes);
      if (half == 0 && u + 1 < C::kUnits) {
        load(u + 1);
        if (u + 2 == C::kUnits) {  // every lane has what it needs of the stage. Without a branch, which would serialize `wgmma`
          __syncwarp();
          const int arrives = kWarpArrivals == 32 || threadIdx.x % 32 == 0;
          asm volatile("{ .reg .pred p; .reg .b64 s; setp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 s, [%0]; }\n" ::"r"(
                           shared_address(free)),
                       "r"(arrives)
                       : "memory");
        }
      }
      if (group == 0) continue;
      if constexpr (C::kWgmma) wgmma_wait_for<1>(d[half ^ 1]);
      scaled(half ^ 1, half ? side : earlier_side);
    }
  }
  if constexpr (C::kWgmma) wgmma_wait_for<0>(d[1]);
  scaled(1, side);
#pragma unroll
  for (int j = 0; j < C::kNT; ++j) {
    const float scale = back[4 * j];
    out[j].x = fmaf(fmaf(static_cast<float>(o[j][0]), 256.f, static_cast<float>(o[j][1])), scale, out[j].x);
    out[j].y = fmaf(fmaf(static_cast<float>(o[j][2]), 256.f, static_cast<float>(o[j][3])), scale, out[j].y);
  }
}

// The warp that requests: super scales of a tile, then its stages.
template <typename C>
__device__ void trellis_request(const TrellisFewParams& p, const FewShared<C>& s, int begin, int end, FewRows rows) {
  const int lane = threadIdx.x % 32, blocks_k = p.k / 128, column_tiles = p.column_tiles.by;
  int column = begin - rows.block * column_tiles, stage = 0;
  uint32_t parity = 1;  // of the round before: passed at once in the first
  const uint64_t policy = streaming_policy();
  for (int tile = begin; tile < end; ++tile) {
    const int i = tile - begin, slot = i % C::kColumnSlots;
    const size_t four = static_cast<size_t>(min(rows.expert, p.experts - 1)) * column_tiles + column;
    s.columns_free[slot].wait((i / C::kColumnSlots + 1) & 1);
    if (lane < C::kColumnBytes / 16) copy16(s.columns + slot * C::kColumnBytes + lane * 16, p.columns + four * 64 + lane * 4);
    s.columns_full[slot].arrive_after_copies();
    const uint8_t* from = p.quant + (four * (p.all_k / 128) + p.first_k / 128) * kTrellisUnitBytes;
    for (int kb = 0; kb < blocks_k; kb += C::kUnits, from += C::kStageBytes) {
      const int bytes = min(C::kUnits, blocks_k - kb) * kTrellisUnitBytes;
      char* const to = s.rings + stage * C::kStageBytes;
      s.free[stage].wait(parity);
#if CCQ_BULK
      if (lane == 0) {
        s.full[stage].arrive_and_expect(bytes);
        bulk_copy(to, from, bytes, s.full + stage, policy);
      }
      __syncwarp();
#else
      for (int at = lane * 16; at < bytes; at += 512) copy16(to + at, from + at);
      s.full[stage].arrive_after_copies();
#endif
      if (++stage == C::kStages) stage = 0, parity ^= 1;
    }
    if (++column == column_tiles) {
      column = 0, ++rows.block;
      if (tile + 1 < end) rows.expert = uniform(expert_of<C>(s, rows.block, rows.expert));
    }
  }
}

// The warp that writes: adds up the parts of a tile in the order of K. A lane has columns g and g + 8 of one 16-column tile.
template <typename C>
__device__ void trellis_write(const TrellisFewParams& p, const FewShared<C>& s, int begin, int end, FewRows rows) {
  const int column_tiles = p.column_tiles.by, slices = C::slices(p.k / 128), lane = threadIdx.x % 32;
  const int left = lane / 8 * 16 + lane % 8;
  int column = begin - rows.block * column_tiles, first_row, count;
  rows.place<C>(p, s, &first_row, &count);
  for (int tile = begin; tile < end; ++tile) {
    const int i = tile - begin, slot = i % C::kSumsSlots, columns_slot = i % C::kColumnSlots, at = column * (C::kTiles * 16) + left;
    s.columns_full[columns_slot].wait((i / C::kColumnSlots) & 1);
    const float* const supers = reinterpret_cast<const float*>(s.columns + columns_slot * C::kColumnBytes) + left;
    const float super0 = supers[0], super1 = supers[8];
    s.columns_free[columns_slot].arrive_together();
    const float2* const from = s.sums + slot * (C::kWK * C::kEntries) + lane;
    s.sums_ready[slot].wait((i / C::kSumsSlots) & 1);
#pragma unroll 2
    for (int r = 0; r < count; ++r) {
      float2 sum = from[r * 32];
      for (int w = 1; w < slices; ++w) {
        const float2 v = from[w * C::kEntries + r * 32];
        sum.x += v.x, sum.y += v.y;
      }
      if (at >= p.n) continue;
      const size_t to = static_cast<size_t>(first_row + r) * p.n + at;
      if (p.adds) sum.x += p.partial[to], sum.y += p.partial[to + 8];
      if (p.hands) {
        p.partial[to] = sum.x, p.partial[to + 8] = sum.y;
        continue;
      }
      store(p.out, p.dtype, to, sum.x * super0);
      store(p.out, p.dtype, to + 8, sum.y * super1);
    }
    s.sums_free[slot].arrive_together();
    if (++column == column_tiles && tile + 1 < end) {
      column = 0, ++rows.block;
      rows.expert = uniform(expert_of<C>(s, rows.block, rows.expert));
      rows.place<C>(p, s, &first_row, &count);
    }
  }
}

// The warps that multiply.
template <typename C>
__device__ void trellis_consume(const TrellisFewParams& p, const FewShared<C>& s, int begin, int end, FewRows rows, int warp,
                                Chunk (&kept)[C::kKept]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, wk = warp / C::kWN, wn = warp % C::kWN;
  const int column_tiles = p.column_tiles.by, stages_k = C::stages_of(p.k / 128);
  const uint32_t selector = TrellisBefore::selector();
  uint32_t addend0 = kTrellisAddend0, addend1 = kTrellisAddend1;
  asm volatile("" : "+r"(addend0), "+r"(addend1));
  // Matrices of 8 columns x 16 bytes, the next 8 columns after them, the other half of a step after all columns.
  const uint64_t b0 = static_cast<uint64_t>((shared_address(s.activations) & 0x3FFFF) >> 4) |
                      static_cast<uint64_t>(C::kHalfStepBytes / 16) << 16 | 8ull << 32;
  const char* const x0 = s.activations + g * 16 + t * 4;  // by mma.sync
  int tile = begin, part = wk, stage = wk;
  uint32_t parity = 0;
  while (part >= stages_k) part -= stages_k, ++tile;
  for (int block = rows.block;; ++block) {
    const int block_end = min(end, (block + 1) * column_tiles);
    if (block > rows.block) {
      rows = FewRows{uniform(expert_of<C>(s, block, rows.expert)), block};
      trellis_load<C>(p, s, rows, warp, kept);
      consumers_meet(C::kThreads);  // the activations there are no longer read
    }
    trellis_convert<C>(p, s, rows, warp, kept);
    publish_barriers();  // for the tensor cores, which read shared memory as the copy engine does
    consumers_meet(C::kThreads);
    while (tile < block_end) {
      const int slot = (tile - begin) % C::kSumsSlots, slice = part;
      float2 out[C::kNT] = {};
#pragma unroll 1
      for (; part < stages_k; part += C::kWK) {
        const char* const at = s.rings + stage * C::kStageBytes;
        constexpr int kPartBytes = 2 * C::kUnits * C::kGroupBytes;
        s.full[stage].wait(parity);
        trellis_stage<C>(at + wn * 512 + lane * 4, at + 2048 + wn * 32 + g * 4, b0 + part * (kPartBytes / 16), x0 + part * kPartBytes,
                         s.back + part * C::kRows + t % C::kRows, s.free + stage, selector, addend0, addend1, out);
        if ((stage += C::kWK) >= C::kStages) stage -= C::kStages, parity ^= 1;
      }
      s.sums_free[slot].wait(((tile - begin) / C::kSumsSlots + 1) & 1);
      float2* const to = s.sums + (slot * C::kWK + slice) * C::kEntries + wn * 8 + g;
#pragma unroll
      for (int j = 0; j < C::kNT; ++j)
        if (4 * j + t < C::kRows) to[(4 * j + t) * 32] = out[j];
      s.sums_ready[slot].arrive_together();
      for (part -= stages_k, ++tile; part >= stages_k; part -= stages_k) ++tile;
    }
    if (block_end == end) break;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kAllThreads, 1) trellis_few_kernel(const TrellisFewParams p) {
  dependents_may_start();
  extern __shared__ __align__(128) char shared[];
  const int blocks_k = p.k / 128;
  const FewShared<C> s(shared, blocks_k, p.experts);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (lane == 0) {  // of each warp, for the lanes of one would do it one after another
    if (warp < C::kStages) s.full[warp].init(CCQ_BULK ? 1 : 32), s.free[warp].init(C::kWN * kWarpArrivals);
    if (warp < C::kColumnSlots) s.columns_full[warp].init(32), s.columns_free[warp].init(kWarpArrivals);
    if (warp < C::kSumsSlots) s.sums_ready[warp].init(C::slices(blocks_k) * C::kWN * kWarpArrivals), s.sums_free[warp].init(kWarpArrivals);
    publish_barriers();
  }
  // Whether the host knows the block's range of tiles: always, but with several matrices and rows a block.
  const bool known = C::kRows == 1 || !p.offsets;
  int begin = blockIdx.x * p.each + min(static_cast<int>(blockIdx.x), p.longer);
  int end = begin + p.each + (static_cast<int>(blockIdx.x) < p.longer), first_block = p.column_tiles.divide(begin);
  if (p.offsets && static_cast<int>(threadIdx.x) * 16 < p.experts) prefetch_line(p.offsets + threadIdx.x * 16);
  wait_for_prerequisites();  // before any read: an earlier kernel may have written anything, weights included
  if (!known) {
    scan_offsets<C>(p, s, &begin, &end);
    first_block = p.column_tiles.divide(begin);
  }
  if (begin == end) return;
  FewRows rows{known ? 0 : uniform(s.start->expert), first_block};
  Chunk kept[C::kKept];
  if (warp < C::kWarps) trellis_load<C>(p, s, rows, warp, kept);
  if (C::kRows == 1 && p.offsets) find_experts<C>(p, s, first_block, p.column_tiles.divide(end - 1));
  else if (!p.offsets && warp == 0) one_expert<C>(p, s, first_block, end);
  __syncthreads();  // barriers stand, and no weights are requested before all activations are: those would wait behind them
  if (C::kRows == 1) rows.expert = uniform(expert_of<C>(s, first_block, 0));
  if (warp >= C::kWarps) {
    if (C::kWgmma) deallocate_registers<C::kOtherRegisters>();
    if (warp == C::kProducer) trellis_request<C>(p, s, begin, end, rows);
    else if (warp == C::kWriter) trellis_write<C>(p, s, begin, end, rows);
  } else {
    if (C::kWgmma) allocate_registers<C::kConsumerRegisters>();
    trellis_consume<C>(p, s, begin, end, rows, warp, kept);
  }
}

}  // namespace ccq
