// SPDX-License-Identifier: Apache-2.0
// The inner loop of ccq-2t at one token with AVX-512 VNNI, beside wint2's, and what was tried to make it faster.
//
//   g++ -O3 -march=native -std=c++17 benchmarks/cpu_trellis_loop.cpp -o loop && ./loop
//
// Both formats by turns on 1024 x 2048 from cache, processor time, the lower quartile of many. Every variant but those marked * gives the bits of the
// loop as it is in custom_ops/cpu/matmul.inc, which is checked; those leave an instruction out to show what it costs.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

#include "../custom_ops/gpu/common/trellis_code.h"

using V = __m512i;
using ccq::kTrellisAddend;
using ccq::kTrellisMultiplier;

struct Activations {
  std::vector<int32_t> pairs, sums;
  std::vector<float> scale;
};

struct Weights {
  int64_t groups;
  const uint8_t *words, *scales;
};

enum Difference { kMultiply, kHalfByShuffle, kHalfByMask, kByMask, kLeftOut };

static V all(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
static V dot(V sum, V a, int32_t b) { return _mm512_dpwssd_epi32(sum, a, all(static_cast<uint32_t>(b))); }

template <int P0, int P1>
static V two_bytes(V a) {
  auto lane = [](int at) {
    const uint32_t low = P0 < 0 ? 0x80u : P0 + at, high = P1 < 0 ? 0x80u : P1 + at;
    return static_cast<int>(low | high << 8 | 0x80800000u);
  };
  return _mm512_shuffle_epi8(a, _mm512_set4_epi32(lane(12), lane(8), lane(4), lane(0)));
}

static V by_mask(V a) { return _mm512_sub_epi16(_mm512_and_si512(a, all(0x00FF00FFu)), _mm512_srli_epi16(a, 8)); }
// h - 257 b of every half h = a + 256 b
static V by_shuffle(V a) {
  return _mm512_sub_epi16(a, _mm512_shuffle_epi8(a, _mm512_set4_epi32(0x0F0F0D0D, 0x0B0B0909, 0x07070505, 0x03030101)));
}
template <Difference kDifference, bool kSecond>
static V difference(V a) {
  if (kDifference == kLeftOut) return a;
  if (kDifference == kByMask || (kSecond && kDifference == kHalfByMask)) return by_mask(a);
  if (kSecond && kDifference == kHalfByShuffle) return by_shuffle(a);
  return _mm512_maddubs_epi16(a, all(0xFF01FF01u));
}

static __m512 scaled(V sum, const Weights& w, const Activations& x, int64_t g) {
  const V both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + g / 2 * 16)));
  const V local = g % 2 ? _mm512_and_si512(both, all(15)) : _mm512_srli_epi32(both, 4);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(_mm512_cvtepi32_ps(local), _mm512_set1_ps(x.scale[g])));
}

__attribute__((noinline)) static void wint2(const Weights& w, const Activations& x, float* y) {
  // A constant would become shifts and additions; in the product both are loaded.
  volatile int16_t pair[2] = {121, 1000};
  const V code_scale = _mm512_set1_epi16(pair[0]), code_zp = _mm512_set1_epi16(pair[1]);
  const V mask1 = all(0x0FC00FC0u), mask2 = all(0x01F801F8u), mask3 = all(0x003F003Fu);
  __m512 total = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    V sum[4] = {all(static_cast<uint32_t>(-32 * x.sums[g])), all(0), all(0), all(0)};
    for (int t = 0; t < 4; ++t) {
      __builtin_prefetch(w.words + g * 256 + t * 64 + 2048);
      const V bytes = _mm512_loadu_si512(w.words + g * 256 + t * 64);
      const V low = _mm512_and_si512(bytes, all(0x00FF00FFu)), high = _mm512_srli_epi16(bytes, 8);
      const int32_t* p = &x.pairs[g * 32 + t * 8];
      auto half = [&](V part) {
        const V code = _mm512_add_epi16(_mm512_mullo_epi16(part, code_scale), code_zp);
        sum[0] = dot(sum[0], _mm512_srli_epi16(code, 9), p[0]);
        sum[1] = dot(sum[1], _mm512_and_si512(code, mask1), p[1]);
        sum[2] = dot(sum[2], _mm512_and_si512(code, mask2), p[2]);
        sum[3] = dot(sum[3], _mm512_and_si512(code, mask3), p[3]);
        p += 4;
      };
      half(low);
      half(high);
    }
    const V rest = _mm512_add_epi32(_mm512_srai_epi32(sum[1], 6), _mm512_srai_epi32(sum[2], 3));
    total = _mm512_add_ps(total, scaled(_mm512_add_epi32(_mm512_add_epi32(sum[0], sum[3]), rest), w, x, g));
  }
  _mm512_storeu_ps(y, total);
}

template <Difference kDifference, int kSums, bool kPermute, bool kAdd = true>
__attribute__((noinline)) static void ccq_2t(const Weights& w, const Activations& x, float* y) {
  const V m0 = all(kTrellisMultiplier[0]), m1 = all(kTrellisMultiplier[1]);
  const V a0 = all(kTrellisAddend[0]), a1 = all(kTrellisAddend[1]);
  alignas(64) uint8_t places[64] = {};
  for (int lane = 0; lane < 16; ++lane) {
    places[4 * lane] = static_cast<uint8_t>(64 + 4 * lane);
    places[4 * lane + 1] = static_cast<uint8_t>(4 * lane + 3);
  }
  const V place = _mm512_load_si512(places);
  __m512 total = _mm512_setzero_ps();
  V before = all(0);
  for (int64_t g = 0; g < w.groups; ++g) {
    V sum0[kSums], sum1[kSums];
    for (int i = 0; i < kSums; ++i) sum0[i] = sum1[i] = all(0);
    for (int t = 0; t < 4; ++t) {
      __builtin_prefetch(w.words + g * 256 + t * 64 + 2048);
      const V bytes = _mm512_loadu_si512(w.words + g * 256 + t * 64);
      const V first = kPermute ? _mm512_maskz_permutex2var_epi8(0x3333333333333333ull, before, place, bytes)
                               : _mm512_or_si512(two_bytes<-1, 3>(before), two_bytes<0, -1>(bytes));
      const V word[4] = {first, two_bytes<1, 0>(bytes), two_bytes<2, 1>(bytes), two_bytes<3, 2>(bytes)};
      before = bytes;
      for (int b = 0; b < 4; ++b) {
        V x0 = _mm512_mullo_epi32(word[b], m0), x1 = _mm512_mullo_epi32(word[b], m1);
        if (kAdd) x0 = _mm512_add_epi32(x0, a0), x1 = _mm512_add_epi32(x1, a1);
        const int32_t* p = &x.pairs[g * 32 + t * 8 + 2 * b];
        sum0[b % kSums] = dot(sum0[b % kSums], difference<kDifference, false>(x0), p[0]);
        sum1[b % kSums] = dot(sum1[b % kSums], difference<kDifference, true>(x1), p[1]);
      }
    }
    V sum = all(0);
    for (int i = 0; i < kSums; ++i) sum = _mm512_add_epi32(sum, _mm512_add_epi32(sum0[i], sum1[i]));
    total = _mm512_add_ps(total, scaled(sum, w, x, g));
  }
  _mm512_storeu_ps(y, total);
}

static double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main() {
  constexpr int64_t kRows = 1024, kColumns = 2048, kGroups = kRows / 64, kBlocks = kColumns / 16;
  std::vector<uint8_t> words(kBlocks * kGroups * 256), scales(kBlocks * kGroups / 2 * 16);
  for (auto& byte : words) byte = static_cast<uint8_t>(rand());
  for (auto& byte : scales) byte = static_cast<uint8_t>(rand());
  Activations x{std::vector<int32_t>(kGroups * 32), std::vector<int32_t>(kGroups), std::vector<float>(kGroups, 1e-4f)};
  for (auto& pair : x.pairs) pair = (rand() & 0xFFFF) | rand() << 16;
  struct Variant {
    const char* name;
    void (*run)(const Weights&, const Activations&, float*);
    bool exact;
  };
  const std::vector<Variant> variants = {
      {"wint2", wint2, false},
      {"ccq-2t as it is", ccq_2t<kMultiply, 1, false>, true},
      {"two accumulators", ccq_2t<kMultiply, 2, false>, true},
      {"four accumulators", ccq_2t<kMultiply, 4, false>, true},
      {"half of the differences by a shuffle", ccq_2t<kHalfByShuffle, 1, false>, true},
      {"half of the differences by mask and shift", ccq_2t<kHalfByMask, 2, false>, true},
      {"all differences by mask and shift", ccq_2t<kByMask, 2, false>, true},
      {"first word by vpermi2b", ccq_2t<kMultiply, 1, true>, true},
      {"* without vpmaddubsw", ccq_2t<kLeftOut, 1, false>, false},
      {"* without additions", ccq_2t<kMultiply, 1, false, false>, false},
  };
  std::vector<float> wanted(kColumns), found(kColumns);
  auto run = [&](const Variant& v, std::vector<float>& y) {
    for (int64_t b = 0; b < kBlocks; ++b)
      v.run({kGroups, words.data() + b * kGroups * 256, scales.data() + b * kGroups / 2 * 16}, x, &y[b * 16]);
  };
  run(variants[1], wanted);
  for (const Variant& v : variants) {
    run(v, found);
    if (v.exact && std::memcmp(found.data(), wanted.data(), kColumns * 4)) return std::printf("%s: other bits\n", v.name), 1;
  }
  constexpr int kRounds = 2000;
  std::vector<std::vector<double>> times(variants.size());
  for (int round = 0; round < kRounds; ++round)
    for (size_t i = 0; i < variants.size(); ++i) {
      const double start = seconds();
      run(variants[i], found);
      times[i].push_back(seconds() - start);
    }
  for (auto& t : times) std::nth_element(t.begin(), t.begin() + kRounds / 4, t.end());
  for (size_t i = 0; i < variants.size(); ++i) {
    const double time = times[i][kRounds / 4];
    std::printf("%-44s %6.1f 10^9 weights/s, of wint2 %.2f\n", variants[i].name, kRows * kColumns / time / 1e9,
                times[0][kRounds / 4] / time);
  }
}
