// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM with CCQ-2T weights for one to four rows an expert, in a single launch.
//
// Work. A tile is (expert, kRows of its rows or fewer, 64 columns) and all of K. Blocks take equal contiguous ranges of tiles. A stage
// is 512 input rows of a tile's 64 columns, contiguous in memory: one copy. The stages of a range go in turn to eight teams of two
// warps, each warp of which has 32 of the columns: what it reads of the activations serves two 16-column tiles. (Before Hopper, where
// shared memory is less: four teams of four.) Sums of a tile's parts
// meet in shared memory.
//
// Warps. Two request stages. Sixteen multiply. One adds up the sums of a tile and writes them.
//
// Weights. The two hash words of a code byte are the tensor cores' unsigned bytes as they stand (trellis.cuh).
//
// Activations are integers of 16 bits, two signed digits of 8, of the value and of its negative, in blocks of 512 values of a row with a
// scale each. They stand in shared memory, all of K, as lanes read them. Integer sums are exact. Where a tile has one row or two, the
// empty columns of the second operand carry other groups (moe_few.cuh, "slots"), so that groups share accumulators and scales.
#pragma once

#include "moe_few.cuh"
#include "trellis.cuh"
#include "wgmma.cuh"  // registers from warps to warps

namespace ccq {

// 64 columns x 128 rows of packed weights: codes of four 16-column tiles, then a word for each two columns (trellis_repack.h).
constexpr int kTrellisUnitBytes = 4 * 512 + 4 * 32;

// kGroups: groups that share an accumulator. kR: 16-column tiles a warp.
template <int kRows_, int kGroups_, int kR_ = 2>
struct TrellisFewConfig {
  static constexpr int kRows = kRows_, kGroups = kGroups_;
  static_assert(kRows * kGroups <= 4 && (kGroups == 1 || kRows * kGroups == 4));
  static constexpr int kR = kR_, kTiles = 4, kTeamWarps = kTiles / kR, kWarps = 16, kTeams = kWarps / kTeamWarps, kThreads = kWarps * 32;
  // Two warps that request, one that writes, and an idle one: of four, so that they can hand registers over.
  static constexpr int kProducers = 2, kProducer = kWarps, kWriter = kProducer + kProducers, kAllThreads = kThreads + 128;
  static constexpr int kOtherRegisters = 32, kConsumerRegisters = 112;  // of a thread; 96 at the beginning
  static constexpr int kUnits = 4, kStageBytes = kUnits * kTrellisUnitBytes;
  // Copies on their way: a multiple of the teams (a stage's place is always the same team's).
  static constexpr int kLeastStages = kTeams, kMostStages = 2 * kTeams;
  static_assert(kMaxExperts % kThreads == 0);
  // Tiles whose super scales are there or on their way: more than the teams, for a tile of 512 input rows is one stage, of one team.
  static constexpr int kSlots = 16, kColumnBytes = kTiles * 16 * 4, kEntries = kTiles * 8 * kRows;
  // Tiles whose sums are under way. Where K has less stages than there are teams, a team must have a part in each tile of a slot or in
  // none, or it would mistake one round of a barrier for another.
  static constexpr int kMostSums = kTeams;
  __host__ __device__ static constexpr int sums_slots(int blocks_k) {
    const int stages = stages_of(blocks_k);
    int slots = stages < kTeams ? kTeams : 2;
    while (slots > 2 && slots / 2 * stages % kTeams == 0) slots /= 2;
    return slots;
  }
  static constexpr int kBarriers = 2 * kMostStages + 2 * kSlots + 2 * kMostSums;
  // Of a group's activations, for the first two code bytes of a lane and for the other two: [columns][4 lanes of a quad][16 bytes].
  // 16 bytes more, so that the same lanes of several groups write to different banks. Lanes read 8 columns, also where there are
  // less: what the others give is not used.
  static constexpr int kHalfBytes = 128 * kRows * kGroups, kGroupBytes = 2 * kHalfBytes + 16, kStageRows = 2 * kUnits * kGroupBytes;
  static constexpr int kKept = kRows;  // chunks that a lane loads at once

  __host__ __device__ static constexpr int stages_of(int blocks_k) { return (blocks_k + kUnits - 1) / kUnits; }
  __host__ __device__ static constexpr int slices(int blocks_k) { return stages_of(blocks_k) < kTeams ? stages_of(blocks_k) : kTeams; }
  __host__ __device__ static constexpr int activation_bytes(int blocks_k) { return stages_of(blocks_k) * kStageRows + 512 - kHalfBytes; }
  __host__ __device__ static constexpr int back_bytes(int blocks_k) { return (stages_of(blocks_k) * kRows * 4 + 15) / 16 * 16; }
  __host__ __device__ static constexpr int entries(int experts) { return kRows > 1 ? experts + 1 : 64; }
  // Without the ring of stages.
  static constexpr size_t shared_bytes(int k, int experts) {
    const int blocks_k = k / 128;
    return kSlots * kColumnBytes + sums_slots(blocks_k) * slices(blocks_k) * kEntries * 8 + activation_bytes(blocks_k) + back_bytes(blocks_k) + kBarriers * 8 +
           sizeof(FewStart) + 2 * entries(experts) * sizeof(int);
  }
};

// Where things lie in shared memory; of FewShared (few_schedule.cuh) what the scans of offsets use.
template <int kRows, int kGroups, int kR>
struct FewShared<TrellisFewConfig<kRows, kGroups, kR>> {
  using C = TrellisFewConfig<kRows, kGroups, kR>;
  char *rings, *columns, *activations;
  float2* sums;  // [slots][slices][kEntries]
  float* back;   // [stages of K][kRows]: undoes the scale of 512 values of a row, times the caller's row scale
  Barrier *full, *free, *columns_full, *columns_free, *sums_ready, *sums_free;
  FewStart* start;
  int *blocks, *rows;

  __device__ FewShared(char* at, int blocks_k, int experts, int stages) {
    auto take = [&at](int bytes) { char* p = at; at += bytes; return p; };
    rings = take(stages * C::kStageBytes);
    columns = take(C::kSlots * C::kColumnBytes);
    sums = reinterpret_cast<float2*>(take(C::sums_slots(blocks_k) * C::slices(blocks_k) * C::kEntries * 8));
    activations = take(C::activation_bytes(blocks_k));
    back = reinterpret_cast<float*>(take(C::back_bytes(blocks_k)));
    full = reinterpret_cast<Barrier*>(take(C::kBarriers * 8));
    free = full + C::kMostStages, columns_full = free + C::kMostStages, columns_free = columns_full + C::kSlots;
    sums_ready = columns_free + C::kSlots, sums_free = sums_ready + C::kMostSums;
    start = reinterpret_cast<FewStart*>(take(sizeof(FewStart)));
    blocks = reinterpret_cast<int*>(take(4 * C::entries(experts)));
    rows = reinterpret_cast<int*>(take(4 * C::entries(experts)));
  }
};

// A warp converts blocks of 512 values, a lane 16 of them: block `item` of a tile's rows is (row, block of K).
template <typename C>
__device__ void trellis_load(const FewParams& p, const FewShared<C>& s, const FewRows& rows, int first, Chunk (&kept)[C::kKept]) {
  int row, count;
  rows.place<C>(p, s, &row, &count);
  const int stages = C::stages_of(p.k / 128);
#pragma unroll
  for (int i = 0; i < C::kKept; ++i) {
    const int item = first + i * C::kWarps, r = item / stages, c = (item - r * stages) * 32 + threadIdx.x % 32;
    kept[i] = Chunk{};
    if (r < count && c < p.k / 16) kept[i].load(static_cast<const char*>(p.x) + static_cast<size_t>(row + r) * p.k * 2, c);
  }
}

// The consumer warps together: a tile's rows become digits in shared memory. `kept`: each warp's first items.
template <typename C>
__device__ void trellis_convert(const FewParams& p, const FewShared<C>& s, const FewRows& rows, int warp, Chunk (&kept)[C::kKept]) {
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
      const int group = block * 8 + lane / 4, column = group % C::kGroups * (2 * C::kRows) + 2 * row;
      char* const to = s.activations + group * C::kGroupBytes + column * 64 + lane % 4 * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t upper[4], lower[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const TrellisDigits digits(v[8 * half + 2 * j], v[8 * half + 2 * j + 1], own.scale);
          upper[j] = digits.upper, lower[j] = digits.lower;
        }
        *reinterpret_cast<uint4*>(to + half * C::kHalfBytes) = make_uint4(upper[0], upper[1], upper[2], upper[3]);
        *reinterpret_cast<uint4*>(to + half * C::kHalfBytes + 64) = make_uint4(lower[0], lower[1], lower[2], lower[3]);
      }
    }
  }
}

// The weights of a unit's group kGroup: of each byte of a lane's two words (columns g and g + 8) the four registers of A.
template <int kGroup>
__device__ inline void trellis_decode(uint32_t left, uint32_t right, uint32_t before, uint32_t addend0, uint32_t addend1,
                                      uint32_t (&a)[4][4]) {
  trellis_words<0, 2 * kGroup>(left, before, addend0, addend1, a[0][0], a[0][2]);
  trellis_words<0, 2 * kGroup + 1>(right, before, addend0, addend1, a[0][1], a[0][3]);
  trellis_words<1, 0>(left, 0, addend0, addend1, a[1][0], a[1][2]);
  trellis_words<1, 0>(right, 0, addend0, addend1, a[1][1], a[1][3]);
  trellis_words<2, 0>(left, 0, addend0, addend1, a[2][0], a[2][2]);
  trellis_words<2, 0>(right, 0, addend0, addend1, a[2][1], a[2][3]);
  trellis_words<3, 0>(left, 0, addend0, addend1, a[3][0], a[3][2]);
  trellis_words<3, 0>(right, 0, addend0, addend1, a[3][1], a[3][3]);
}

// A stage's part of the sums into `out`: of kR 16-column tiles columns g and g + 8, row t % kRows. `codes`: a lane's 16 bytes of the first tile, `sides`:
// its column's word of the unit's side. What is read of the stage is asked for a unit ahead.
template <typename C>
__device__ void trellis_stage(const char* codes, const char* sides, const char* x, const float* back, Barrier* free, uint32_t selector,
                              uint32_t addend0, uint32_t addend1, float2 (&out)[C::kR]) {
  constexpr int kAll = 2 * C::kUnits, kGroups = C::kGroups, kR = C::kR;
  const int t = threadIdx.x % 4, shift = kGroups == 4 ? t % 2 * 4 : kGroups == 2 ? t / 2 * 4 : 0;
  int o[kR][4] = {}, d[2][kR][4] = {}, f[kR][2] = {};
  uint32_t next_side[kR], scales[kR] = {}, next_scales[kR] = {}, before[kR] = {};
  uint4 q[kR] = {}, next[kR];
  auto load = [&](int u) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      next[r] = load_words(codes + u * kTrellisUnitBytes + r * 512);
      next_side[r] = *reinterpret_cast<const uint32_t*>(sides + u * kTrellisUnitBytes + r * 32);
      if (kGroups == 4 && u % 2 == 0) next_scales[r] = *reinterpret_cast<const uint32_t*>(sides + (u + t / 2) * kTrellisUnitBytes + r * 32);
    }
  };
  auto scaled = [&](int set) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      o[r][0] += f[r][0] * d[set][r][0], o[r][1] += f[r][0] * d[set][r][1];
      o[r][2] += f[r][1] * d[set][r][2], o[r][3] += f[r][1] * d[set][r][3];
    }
  };
  load(0);
#pragma unroll
  for (int group = 0; group < kAll; ++group) {
    const int u = group / 2, half = group % 2, set = group / kGroups % 2;
    const bool first = group % kGroups == 0, last = group % kGroups == kGroups - 1;
    if (half == 0)
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        q[r] = next[r];
        before[r] = TrellisBefore(q[r], next_side[r], selector).bytes;
        if (kGroups < 4) scales[r] = next_side[r];
        else if (u % 2 == 0) scales[r] = next_scales[r];
      }
    uint4 v[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = *reinterpret_cast<const uint4*>(x + group * C::kGroupBytes + i * C::kHalfBytes);
    uint32_t a[kR][4][4];
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      if (half == 0) trellis_decode<0>(q[r].x, q[r].y, before[r], addend0, addend1, a[r]);
      else trellis_decode<1>(q[r].z, q[r].w, before[r], addend0, addend1, a[r]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t(&e)[4] = a[r][j];
        if (first && j == 0) mma_bytes(d[set][r], e[0], e[1], e[2], e[3], v[0].x, v[0].y, 0, 0);
        else mma_bytes(d[set][r], e[0], e[1], e[2], e[3], j % 2 ? v[j / 2].z : v[j / 2].x, j % 2 ? v[j / 2].w : v[j / 2].y);
      }
    if (half == 0 && u + 1 < C::kUnits) {
      load(u + 1);
      if (u + 2 == C::kUnits) free->arrive_together();  // every lane has what it needs of the stage
    }
    if (first && group > 0) scaled(set ^ 1);
    if (last)
#pragma unroll
      for (int r = 0; r < kR; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) f[r][i] = scales[r] >> (8 * i + (kGroups > 1 ? shift : 4 * half)) & 15;
  }
  scaled((kAll - 1) / kGroups % 2);
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    out[r].x = fmaf(fmaf(static_cast<float>(o[r][0]), 256.f, static_cast<float>(o[r][1])), *back, out[r].x);
    out[r].y = fmaf(fmaf(static_cast<float>(o[r][2]), 256.f, static_cast<float>(o[r][3])), *back, out[r].y);
  }
}

// The warps that request: super scales of a tile, then its stages, each warp every kProducers-th.
template <typename C>
__device__ void trellis_request(const FewParams& p, const FewShared<C>& s, int begin, int end, FewRows rows, int own) {
  const int lane = threadIdx.x % 32, blocks_k = p.k / 128, column_tiles = p.column_tiles.by;
  int column = begin - rows.block * column_tiles, stage = 0, turn = 0;
  uint32_t parity = 1;  // of the round before: passed at once in the first
  const uint64_t policy = streaming_policy();
  for (int tile = begin; tile < end; ++tile) {
    const int i = tile - begin, slot = i % C::kSlots;
    const size_t four = static_cast<size_t>(min(rows.expert, p.experts - 1)) * column_tiles + column;
    if (own == 0) {
      s.columns_free[slot].wait((i / C::kSlots + 1) & 1);
      if (lane < C::kColumnBytes / 16) copy16(s.columns + slot * C::kColumnBytes + lane * 16, p.columns + four * 64 + lane * 4);
      s.columns_full[slot].arrive_after_copies();
    }
    const uint8_t* from = p.quant + four * blocks_k * kTrellisUnitBytes;
    for (int kb = 0; kb < blocks_k; kb += C::kUnits, from += C::kStageBytes) {
      if (turn == own) {
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
      }
      if (++turn == C::kProducers) turn = 0;
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
    if (++column == column_tiles) {
      column = 0, ++rows.block;
      if (tile + 1 < end) rows.expert = uniform(expert_of<C>(s, rows.block, rows.expert));
    }
  }
}

// The warp that writes: adds up the parts of a tile in the order of K. A lane has columns g and g + 8 of one 16-column tile.
template <typename C>
__device__ void trellis_write(const FewParams& p, const FewShared<C>& s, int begin, int end, FewRows rows) {
  const int column_tiles = p.column_tiles.by, slices = C::slices(p.k / 128), slots = C::sums_slots(p.k / 128), lane = threadIdx.x % 32;
  const int left = lane / 8 * 16 + lane % 8;
  int column = begin - rows.block * column_tiles, first_row, count;
  rows.place<C>(p, s, &first_row, &count);
  for (int tile = begin; tile < end; ++tile) {
    const int i = tile - begin, slot = i & (slots - 1), columns_slot = i % C::kSlots, at = column * (C::kTiles * 16) + left;
    s.columns_full[columns_slot].wait((i / C::kSlots) & 1);
    const float* const supers = reinterpret_cast<const float*>(s.columns + columns_slot * C::kColumnBytes) + left;
    const float super0 = supers[0], super1 = supers[8];
    s.columns_free[columns_slot].arrive_together();
    const float2* const from = s.sums + slot * (slices * C::kEntries) + lane;
    s.sums_ready[slot].wait((i & slots) != 0);
#pragma unroll 2
    for (int r = 0; r < count; ++r) {
      float2 sum = from[r * 32];
      for (int w = 1; w < slices; ++w) {
        const float2 v = from[w * C::kEntries + r * 32];
        sum.x += v.x, sum.y += v.y;
      }
      if (at >= p.n) continue;
      const size_t to = static_cast<size_t>(first_row + r) * p.n + at;
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
__device__ void trellis_consume(const FewParams& p, const FewShared<C>& s, int begin, int end, FewRows rows, int warp,
                                Chunk (&kept)[C::kKept]) {
  constexpr int R = C::kRows;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, wk = warp / C::kTeamWarps, wn = warp % C::kTeamWarps * C::kR;
  const int column_tiles = p.column_tiles.by, blocks_k = p.k / 128, stages_k = C::stages_of(blocks_k);
  const int slots = C::sums_slots(blocks_k), slices = C::slices(blocks_k);
  const uint32_t selector = TrellisBefore::selector();
  uint32_t addend0 = kTrellisAddend0, addend1 = kTrellisAddend1;
  asm volatile("" : "+r"(addend0), "+r"(addend1));
  int tile = begin, part = wk, stage = wk;
  uint32_t parity = 0;
  while (part >= stages_k) part -= stages_k, ++tile;
  for (int block = rows.block;; ++block) {
    const int block_end = min(end, (block + 1) * column_tiles);
    if (block > rows.block) {
      rows = FewRows{uniform(expert_of<C>(s, block, rows.expert)), block};
      trellis_load<C>(p, s, rows, warp, kept);
      named_barrier<1, C::kThreads>();  // the activations there are no longer read
    }
    trellis_convert<C>(p, s, rows, warp, kept);
    named_barrier<1, C::kThreads>();
    while (tile < block_end) {
      const int i = tile - begin, slot = i & (slots - 1), slice = part;
      const char* x = s.activations + part * C::kStageRows + lane * 16;
      const float* back = s.back + part * R + t % R;
      float2 out[C::kR] = {};
#pragma unroll 1
      for (; part < stages_k; part += C::kTeams) {
        const char* const at = s.rings + stage * C::kStageBytes;
        s.full[stage].wait(parity);
        trellis_stage<C>(at + wn * 512 + lane * 16, at + 2048 + wn * 32 + g * 4, x, back, s.free + stage, selector, addend0, addend1, out);
        x += C::kTeams * C::kStageRows, back += C::kTeams * R;
        if ((stage += C::kTeams) >= p.stages) stage -= p.stages, parity ^= 1;
      }
      s.sums_free[slot].wait((i & slots) == 0);
#pragma unroll
      for (int r = 0; r < C::kR; ++r) {
        // With slots lanes t and t ^ 2 have the same row, with one row all four lanes of a quad.
        if (C::kGroups > 1) out[r].x += __shfl_xor_sync(~0u, out[r].x, 2), out[r].y += __shfl_xor_sync(~0u, out[r].y, 2);
        if (C::kGroups > 2) out[r].x += __shfl_xor_sync(~0u, out[r].x, 1), out[r].y += __shfl_xor_sync(~0u, out[r].y, 1);
        if (t < R) s.sums[(slot * slices + slice) * C::kEntries + t * 32 + (wn + r) * 8 + g] = out[r];
      }
      s.sums_ready[slot].arrive_together();
      for (part -= stages_k, ++tile; part >= stages_k; part -= stages_k) ++tile;
    }
    if (block_end == end) break;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kAllThreads, 1) trellis_few_kernel(const FewParams p) {
  dependents_may_start();
  extern __shared__ __align__(128) char shared[];
  const int blocks_k = p.k / 128;
  const FewShared<C> s(shared, blocks_k, p.experts, p.stages);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (lane == 0) {  // of each warp, for the lanes of one would do it one after another
    if (warp < C::kMostStages) s.full[warp].init(CCQ_BULK ? 1 : 32), s.free[warp].init(C::kTeamWarps * kWarpArrivals);
    if (warp < C::kSlots) s.columns_full[warp].init(32), s.columns_free[warp].init(kWarpArrivals);
    if (warp < C::kMostSums) s.sums_ready[warp].init(C::slices(blocks_k) * C::kTeamWarps * kWarpArrivals), s.sums_free[warp].init(kWarpArrivals);
    publish_barriers();
  }
  if (C::kGroups > 1)  // columns of a group that hold other groups are zero, and stay so
    for (int i = threadIdx.x * 16; i < C::activation_bytes(blocks_k); i += C::kAllThreads * 16)
      *reinterpret_cast<uint4*>(s.activations + i) = uint4{};
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
  FewRows rows{uniform(known ? 0 : s.start->expert), first_block};
  Chunk kept[C::kKept];
  if (warp < C::kWarps) trellis_load<C>(p, s, rows, warp, kept);
  if (C::kRows == 1 && p.offsets) find_experts<C>(p, s, first_block, p.column_tiles.divide(end - 1));
  else if (!p.offsets && warp == 0) one_expert<C>(p, s, first_block, end);
  __syncthreads();  // barriers stand, and no weights are requested before all activations are: those would wait behind them
  if (C::kRows == 1) rows.expert = uniform(expert_of<C>(s, first_block, 0));
  if (warp >= C::kWarps) {
    deallocate_registers<C::kOtherRegisters>();
    if (warp < C::kWriter) trellis_request<C>(p, s, begin, end, rows, warp - C::kProducer);
    else if (warp == C::kWriter) trellis_write<C>(p, s, begin, end, rows);
  } else {
    allocate_registers<C::kConsumerRegisters>();
    trellis_consume<C>(p, s, begin, end, rows, warp, kept);
  }
}

}  // namespace ccq
