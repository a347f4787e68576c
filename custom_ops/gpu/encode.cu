// SPDX-License-Identifier: Apache-2.0
// One thread block encodes one output channel after another; the stages are those of custom_ops/cpu/encode.cpp.
//
// Every float sum runs over the groups (or rows) in order, in one thread, with single IEEE operations: the
// CPU's order. That is a few thousand dependent additions a channel, next to millions of integer scores.
#include "encode.cuh"

namespace ccq_encode_kernel {

constexpr int kChoices = CCQ_ENCODE_KEEP;

// A block's scratch in global memory: it stays in the caches, and K has no limit.
struct Scratch {
  double* rms;      // [groups]
  double* gains;    // [kChoices][groups]
  int* locals;      // [kChoices][groups]
  int* best_locals; // [groups]
  int* scores;      // [pairs][groups], of the screening
};

__host__ __device__ inline size_t scratch_bytes(int64_t groups, int pairs) {
  const size_t bytes = groups * (8 + 8 * kChoices + 4 * kChoices + 4 + 4 * static_cast<size_t>(pairs));
  return (bytes + 255) / 256 * 256;
}

__device__ inline Scratch scratch_of(void* workspace, int64_t groups, int pairs) {
  char* p = static_cast<char*>(workspace) + blockIdx.x * scratch_bytes(groups, pairs);
  Scratch s;
  s.rms = reinterpret_cast<double*>(p);
  s.gains = s.rms + groups;
  s.locals = reinterpret_cast<int*>(s.gains + kChoices * groups);
  s.best_locals = s.locals + kChoices * groups;
  s.scores = s.best_locals + groups;
  return s;
}

struct Shared {
  alignas(16) int2 books[CCQ_ENCODE_ENTRIES];
  int8_t states[kThreads / 16][kGroup];
  double totals[CCQ_ENCODE_PAIRS];
  double best_gain;
  float supers[CCQ_ENCODE_KAPPAS];
  int super_count;
  int kept[kChoices], kept_count;
  float super;
  int pair, better;
};

template <int kTeam, bool kOneBook>
struct Encoder {
  const ccq_encode_args& a;
  Shared& sh;
  Scratch scratch;
  const int groups, entries, team, lane;
  const Vector v;
  int walk;  // entries of the longest book

  __device__ Encoder(const ccq_encode_args& args, Shared& shared)
      : a(args), sh(shared), scratch(scratch_of(args.workspace, args.k / kGroup, args.pairs)),
        groups(static_cast<int>(args.k / kGroup)),
        entries(args.layout.entries[0] + (args.layout.books > 1 ? args.layout.entries[1] : 0)),
        team(threadIdx.x / kTeam), lane(threadIdx.x % kTeam), v(vector_of(args.layout, threadIdx.x % kTeam)) {
    walk = args.layout.entries[0];
    if (args.layout.books > 1) walk = max(walk, args.layout.entries[1]);
  }

  static constexpr int kTeams = kThreads / kTeam;

  __device__ void load_books(int slot, int pair) {
    const int2* from = reinterpret_cast<const int2*>(a.entries) + static_cast<int64_t>(pair) * entries;
    for (int e = threadIdx.x; e < entries; e += kThreads) sh.books[slot * entries + e] = from[e];
  }

  __device__ int nominal_scale(int g, float super) const {
    return clamp_scale(a.layout, __ddiv_rn(__dmul_rn(a.recipe.nominal, scratch.rms[g]), super));
  }

  __device__ void measure(const float* w) {
    for (int g = threadIdx.x; g < groups; g += kThreads) {
      const float4* p = reinterpret_cast<const float4*>(w + static_cast<int64_t>(g) * kGroup);
      double sum = 0;
      for (int i = 0; i < kGroup / 4; ++i) {
        const float4 q = p[i];
        const double x[4] = {q.x, q.y, q.z, q.w};
        for (int j = 0; j < 4; ++j) sum = __dadd_rn(sum, __dmul_rn(x[j], x[j]));
      }
      // The energy for now; thread 0 sums it and the block then turns it into rms.
      scratch.rms[g] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0;
      for (int g = 0; g < groups; ++g) total = __dadd_rn(total, scratch.rms[g]);
      sh.best_gain = total;
    }
    __syncthreads();
    for (int g = threadIdx.x; g < groups; g += kThreads) scratch.rms[g] = __dsqrt_rn(scratch.rms[g] / kGroup);
    __syncthreads();
  }

  // Returns the channel's energy (thread 0 only).
  __device__ double choose_supers() {
    const double total = sh.best_gain;
    double reference = 0;
    if (a.recipe.ratio_count) {
      for (int g = 0; g < groups; ++g) reference = fmax(reference, scratch.rms[g]);
    } else {
      reference = __dsqrt_rn(__ddiv_rn(total, static_cast<double>(groups) * kGroup));
    }
    sh.super_count = 0;
    for (int i = 0; i < a.recipe.kappa_count; ++i) {
      const float super = to_bfloat16(__ddiv_rn(__dmul_rn(a.recipe.nominal, reference), a.recipe.kappas[i]));
      bool fresh = super >= kSmallestSuper;
      for (int j = 0; j < sh.super_count; ++j) fresh = fresh && sh.supers[j] != super;
      if (fresh) sh.supers[sh.super_count++] = super;
    }
    sh.best_gain = -1;
    return total;
  }

  // Pairs worth a full search: the best few on every group's nominal scale.
  __device__ void screen(const float* w) {
    const float super = sh.supers[0];
    if (a.pairs <= a.recipe.keep_pairs) {
      if (threadIdx.x == 0) {
        sh.kept_count = a.pairs;
        for (int p = 0; p < a.pairs; ++p) sh.kept[p] = p;
      }
      __syncthreads();
      return;
    }
    for (int first = 0; first < groups; first += kBatch * kTeams) {
      Point points[kBatch];
      int rest[kBatch];
      for (int b = 0; b < kBatch; ++b) {
        const int g = min(first + b * kTeams + team, groups - 1);
        const float inverse = reciprocal(a.layout, local_scale(nominal_scale(g, super), super));
        const float* group = w + static_cast<int64_t>(g) * kGroup;
        points[b] = load_point(group, v, inverse);
        rest[b] = remainder_score(a.layout, group, inverse);
      }
      for (int p = 0; p < a.pairs; ++p) {
        __syncthreads();
        load_books(0, p);
        __syncthreads();
        int best[kBatch];
        best_scores<kBatch, kOneBook>(sh.books, v, walk, points, best);
        for (int b = 0; b < kBatch; ++b) {
          const int score = team_sum<kTeam>(v.used ? best[b] : 0) + rest[b];
          const int g = first + b * kTeams + team;
          if (lane == 0 && g < groups) scratch.scores[p * groups + g] = score;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < a.pairs) {
      double total = 0;
      for (int g = 0; g < groups; ++g) {
        if (scratch.rms[g] == 0) continue;
        const float scale = local_scale(nominal_scale(g, super), super);
        total = __dadd_rn(total, gain(scale, scratch.scores[threadIdx.x * groups + g]));
      }
      sh.totals[threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      // A stable sort's first entries: of equal gains the smaller pair.
      sh.kept_count = a.recipe.keep_pairs;
      for (int i = 0; i < sh.kept_count; ++i) {
        int top = -1;
        for (int p = 0; p < a.pairs; ++p) {
          bool taken = false;
          for (int j = 0; j < i; ++j) taken = taken || sh.kept[j] == p;
          if (!taken && (top < 0 || sh.totals[p] > sh.totals[top])) top = p;
        }
        sh.kept[i] = top;
      }
    }
    __syncthreads();
  }

  // Scores of `count` local scales of one group with the books of `slot`.
  template <int kCount>
  __device__ void score(const float* group, int slot, const int* local, float super, int* scores) {
    Point points[kCount];
    int best[kCount], rest[kCount];
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      const float inverse = reciprocal(a.layout, local_scale(local[b], super));
      points[b] = load_point(group, v, inverse);
      rest[b] = remainder_score(a.layout, group, inverse);
    }
    best_scores<kCount, kOneBook>(sh.books + slot * entries, v, walk, points, best);
#pragma unroll
    for (int b = 0; b < kCount; ++b) scores[b] = team_sum<kTeam>(v.used ? best[b] : 0) + rest[b];
  }

  // Coarse local scales: every integer of the window around the nominal one, kCount at a time.
  // The number of rounds is the same for every group, though windows are cut: teams of a warp shuffle together.
  template <int kCount, int kRounds>
  __device__ void search_window(const float* w, float super) {
    for (int first = 0; first < groups; first += kTeams) {
      const int g = min(first + team, groups - 1);
      const float* group = w + static_cast<int64_t>(g) * kGroup;
      const int nominal = nominal_scale(g, super);
      const int low = max(nominal + a.recipe.window_low, 1);
      const int high = min(nominal + a.recipe.window_high, a.layout.scale_max);
      for (int c = 0; c < sh.kept_count; ++c) {
        double top = -1;
        int at = 0;
#pragma unroll 1
        for (int start = 0; start < kCount * kRounds; start += kCount) {
          int local[kCount], scores[kCount];
#pragma unroll
          for (int b = 0; b < kCount; ++b) local[b] = min(low + start + b, a.layout.scale_max);
          score<kCount>(group, c, local, super, scores);
#pragma unroll
          for (int b = 0; b < kCount; ++b) {
            const double value = gain(local_scale(local[b], super), scores[b]);
            if (low + start + b <= high && value > top) {
              top = value;
              at = local[b];
            }
          }
        }
        store_choice(c, first + team, top, at);
      }
    }
  }

  __device__ void store_choice(int c, int g, double value, int local) {
    if (lane != 0 || g >= groups) return;
    const bool live = scratch.rms[g] != 0;
    scratch.gains[c * groups + g] = live ? value : 0;
    scratch.locals[c * groups + g] = live ? local : 0;
  }

  // The states of one group at one scale into shared memory, its words if asked for; returns the score.
  __device__ int decode(const float* group, int slot, float scale, uint16_t* words) {
    const float inverse = reciprocal(a.layout, scale);
    const Point point = load_point(group, v, inverse);
    int index;
    const int best = best_entry(sh.books + slot * entries, v, walk, point, index);
    const int states = sh.books[slot * entries + v.base + index].x;
    __syncwarp();
    if (v.used)
      for (int d = 0; d < v.dims; ++d) sh.states[team][v.first + d] = static_cast<int8_t>(states >> (8 * d));
    int rest = 0, last = 0;
    if (a.layout.remainder_shift) {
      rest = remainder_score(a.layout, group, inverse);
      const int q = remainder_state(a.layout, fixed_point(group[kGroup - 1], inverse));
      if (lane == 0) sh.states[team][kGroup - 1] = static_cast<int8_t>(q);
      last = (q - a.layout.state_min) << a.layout.remainder_shift;
    }
    __syncwarp();
    if (words) {
      // Two vectors may share a word: its first one collects the others' bits.
      for (int word = 0; word < a.layout.words; ++word) {
        unsigned mine = v.used && v.word == word ? static_cast<unsigned>(index) << v.shift : 0u;
        const int value = team_sum<kTeam>(static_cast<int>(mine));
        if (lane == 0)
          words[word] = static_cast<uint16_t>(word + 1 == a.layout.words && a.layout.remainder_shift ? last : value);
      }
    }
    return team_sum<kTeam>(v.used ? best : 0) + rest;
  }

  // Fine local scales (a warp a group): multiples of the nominal one, then eq. (4) and a new search while it helps.
  __device__ void search_ratios(const float* w, float super) {
    for (int g = team; g < groups; g += kTeams) {
      const float* group = w + static_cast<int64_t>(g) * kGroup;
      for (int c = 0; c < sh.kept_count; ++c) {
        int local[kBatch], scores[kBatch];
        for (int b = 0; b < kBatch; ++b) {
          const double ratio = a.recipe.ratios[min(b, a.recipe.ratio_count - 1)];
          const double wanted = __dmul_rn(__dmul_rn(a.recipe.nominal, scratch.rms[g]), ratio);
          local[b] = clamp_scale(a.layout, __ddiv_rn(wanted, super));
        }
        score<kBatch>(group, c, local, super, scores);
        double best = -1;
        int at = local[0];
        for (int b = 0; b < a.recipe.ratio_count; ++b) {
          const double value = gain(local_scale(local[b], super), scores[b]);
          if (value > best) {
            best = value;
            at = local[b];
          }
        }
        if (a.recipe.refits) decode(group, c, local_scale(at, super), nullptr);
        for (int round = 0; round < a.recipe.refits; ++round) {
          double dot = 0;
          int norm = 0;
          for (int r = 0; r < kGroup; ++r) {
            const int state = sh.states[team][r];
            dot = __dadd_rn(dot, __dmul_rn(static_cast<double>(group[r]), static_cast<double>(state)));
            norm += state * state;
          }
          if (norm == 0) break;
          const int fitted = clamp_scale(a.layout, __ddiv_rn(__ddiv_rn(dot, static_cast<double>(norm)), super));
          if (fitted == at) break;
          const int found = decode(group, c, local_scale(fitted, super), nullptr);
          const double value = gain(local_scale(fitted, super), found);
          if (!(value > best)) break;
          best = value;
          at = fitted;
        }
        store_choice(c, g, best, at);
      }
    }
  }

  // The choices of one super scale against the best so far.
  __device__ void compare(float super) {
    __syncthreads();
    if (threadIdx.x < sh.kept_count) {
      double total = 0;
      for (int g = 0; g < groups; ++g) total = __dadd_rn(total, scratch.gains[threadIdx.x * groups + g]);
      sh.totals[threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      sh.better = -1;
      for (int c = 0; c < sh.kept_count; ++c) {
        if (sh.totals[c] > sh.best_gain) {
          sh.best_gain = sh.totals[c];
          sh.super = super;
          sh.pair = c;
          sh.better = c;
        }
      }
    }
    __syncthreads();
    if (sh.better >= 0)
      for (int g = threadIdx.x; g < groups; g += kThreads) scratch.best_locals[g] = scratch.locals[sh.better * groups + g];
    __syncthreads();
  }

  // The words of the chosen scales, and the error as the decoder will see it.
  __device__ void finish(const float* w, uint16_t* words, uint16_t* scales, double* sums, double energy) {
    const float super = sh.super;
    double dot = 0, norm = 0;
    for (int first = 0; first < groups; first += kTeams) {
      const int g = min(first + team, groups - 1);
      const int local = scratch.best_locals[g];
      const bool mine = first + team < groups;
      uint16_t* out = words + static_cast<int64_t>(g) * a.layout.words;
      // Teams of one warp take the shuffles together: past the last group they write its words once more, and a
      // group of scale 0 is cleared afterwards.
      decode(w + static_cast<int64_t>(g) * kGroup, sh.pair, local_scale(max(local, 1), super), out);
      if (mine && lane == 0) scales[g] = static_cast<uint16_t>(local);
      __syncthreads();
      if (mine && local == 0)
        for (int i = lane; i < a.layout.words; i += kTeam) out[i] = 0;
      if (threadIdx.x == 0) {
        for (int t = 0; t < kTeams && first + t < groups; ++t) {
          const int chosen = scratch.best_locals[first + t];
          if (chosen == 0) continue;
          const float scale = local_scale(chosen, super);
          const float* group = w + static_cast<int64_t>(first + t) * kGroup;
          for (int r = 0; r < kGroup; ++r) {
            const double value = __fmul_rn(static_cast<float>(sh.states[t][r]), scale);
            dot = __dadd_rn(dot, __dmul_rn(static_cast<double>(group[r]), value));
            norm = __dadd_rn(norm, __dmul_rn(value, value));
          }
        }
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      sums[0] = energy;
      sums[1] = dot;
      sums[2] = norm;
    }
  }

  __device__ void run(int64_t channel) {
    const float* w = a.weight + channel * a.k;
    uint16_t* words = a.words + channel * groups * a.layout.words;
    uint16_t* scales = a.scales + channel * groups;
    measure(w);
    double energy = 0;
    if (threadIdx.x == 0) energy = choose_supers();
    __syncthreads();
    if (sh.super_count == 0) {
      for (int i = threadIdx.x; i < groups * a.layout.words; i += kThreads) words[i] = 0;
      for (int g = threadIdx.x; g < groups; g += kThreads) scales[g] = 0;
      if (threadIdx.x == 0) {
        a.supers[channel] = 0;
        a.chosen[channel] = 0;
        a.sums[3 * channel] = energy;
        a.sums[3 * channel + 1] = a.sums[3 * channel + 2] = 0;
      }
      __syncthreads();
      return;
    }
    screen(w);
    for (int c = 0; c < sh.kept_count; ++c) load_books(c, sh.kept[c]);
    __syncthreads();
    for (int i = 0; i < sh.super_count; ++i) {
      const float super = sh.supers[i];
      const int width = a.recipe.window_high - a.recipe.window_low + 1;
      if (kTeam == 32 && a.recipe.ratio_count) search_ratios(w, super);
      else if (width <= 6) search_window<6, 1>(w, super);
      else if (width <= 8) search_window<8, 1>(w, super);
      else search_window<5, 2>(w, super);
      compare(super);
    }
    finish(w, words, scales, a.sums + 3 * channel, energy);
    if (threadIdx.x == 0) {
      a.supers[channel] = sh.super;
      a.chosen[channel] = sh.kept[sh.pair];
    }
    __syncthreads();
  }
};

// Three blocks a multiprocessor: 80 registers, so that eight scales fit without spilling.
constexpr int kBlocks = 3;

template <int kTeam, bool kOneBook>
__global__ void __launch_bounds__(kThreads, kBlocks) encode_channels(const __grid_constant__ ccq_encode_args args) {
  __shared__ Shared shared;
  Encoder<kTeam, kOneBook> encoder(args, shared);
  for (int64_t channel = blockIdx.x; channel < args.n; channel += gridDim.x) encoder.run(channel);
}

// As many blocks as the device holds at once; each walks through its channels.
int block_count() {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return processors * kBlocks;
}

bool valid(const ccq_encode_args& a) {
  const ccq_encode_layout& l = a.layout;
  const ccq_encode_recipe& r = a.recipe;
  if (a.n < 1 || a.k < kGroup || a.k % kGroup || a.k > (int64_t{1} << 24)) return false;
  if (l.vectors < 1 || l.vectors > CCQ_ENCODE_VECTORS || l.books < 1 || l.books > CCQ_ENCODE_BOOKS) return false;
  int entries = 0;
  for (int b = 0; b < l.books; ++b) {
    if (l.entries[b] < 2 || (l.entries[b] & (l.entries[b] - 1))) return false;
    entries += l.entries[b];
  }
  for (int i = 0; i < l.vectors; ++i)
    if (l.vector[i].book >= l.books || l.vector[i].dims < 1 || l.vector[i].dims > 4 ||
        l.vector[i].first + l.vector[i].dims > kGroup || l.vector[i].word >= l.words)
      return false;
  if (a.pairs < 1 || a.pairs > CCQ_ENCODE_PAIRS || r.keep_pairs < 1 || r.keep_pairs > CCQ_ENCODE_KEEP) return false;
  const int kept = a.pairs < r.keep_pairs ? a.pairs : r.keep_pairs;
  if (entries * kept > CCQ_ENCODE_ENTRIES) return false;
  if (r.kappa_count < 1 || r.kappa_count > CCQ_ENCODE_KAPPAS || r.refits < 0) return false;
  if (r.ratio_count < 0 || r.ratio_count > CCQ_ENCODE_BATCH) return false;
  return r.ratio_count || (r.window_low <= r.window_high && r.window_high - r.window_low < 10);
}

}  // namespace ccq_encode_kernel

using namespace ccq_encode_kernel;

extern "C" size_t ccq_encode_workspace(int64_t k, int pairs) { return block_count() * scratch_bytes(k / kGroup, pairs); }

extern "C" cudaError_t ccq_encode(const ccq_encode_args* args, cudaStream_t stream) {
  if (!valid(*args)) return cudaErrorInvalidValue;
  const int blocks = block_count();
  if (blocks == 0) return cudaGetLastError();
  const int grid = static_cast<int>(args->n < blocks ? args->n : blocks);
  // Half a warp holds the sixteen vectors of WINT2; formats with more, or with fine scales, take a warp.
  const bool one_book = args->layout.books == 1;
  const bool half = one_book && args->layout.vectors <= 16 && args->recipe.ratio_count == 0;
  if (half) encode_channels<16, true><<<grid, kThreads, 0, stream>>>(*args);
  else if (one_book) encode_channels<32, true><<<grid, kThreads, 0, stream>>>(*args);
  else encode_channels<32, false><<<grid, kThreads, 0, stream>>>(*args);
  return cudaGetLastError();
}
