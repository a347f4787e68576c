// SPDX-License-Identifier: Apache-2.0
// Decoding whole matrices, and the way into the CPU's layout and back.
#include "dequant.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

namespace ccq {
namespace {

uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Both round to nearest even; infinities and NaN stay what they are.
uint16_t to_bfloat16(float f) {
  const uint32_t bits = bits_of(f);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

uint16_t to_float16(float f) {
  const uint32_t bits = bits_of(f), sign = (bits >> 16) & 0x8000u, value = bits & 0x7FFFFFFFu;
  if (value > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (value >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above round to inf
  if (value < 0x38800000u) {
    // Subnormal: adding 1/2 puts the last place of 2^-24 at the last place of the sum.
    const uint32_t shifted = bits_of(float_of(value) + 0.5f);
    return static_cast<uint16_t>(sign | (shifted - 0x3F000000u));
  }
  const uint32_t rounded = value + 0xFFFu + ((value >> 13) & 1) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, value = h & 0x7FFFu;
  if (value >= 0x7C00u) return float_of(sign | 0x7F800000u | (value & 0x3FFu) << 13);
  const float magnitude = value < 0x400u ? static_cast<float>(value) * 0x1p-24f
                                         : float_of((value << 13) + 0x38000000u);
  return sign ? -magnitude : magnitude;
}

template <Runtime kRuntime>
float rounded(float f) {
  if (kRuntime == Runtime::kBfloat16) return float_of(static_cast<uint32_t>(to_bfloat16(f)) << 16);
  if (kRuntime == Runtime::kFloat16) return from_float16(to_float16(f));
  return f;
}

template <Runtime kRuntime>
void put(void* out, int64_t at, float f) {
  if (kRuntime == Runtime::kFloat32) {
    static_cast<float*>(out)[at] = f;
  } else {
    static_cast<uint16_t*>(out)[at] = kRuntime == Runtime::kBfloat16 ? to_bfloat16(f) : to_float16(f);
  }
}

template <Runtime kRuntime>
void wint2_group(const Stored& t, int64_t g, void* out) {
  std::vector<float> scale(t.n), offset(t.n);
  for (int64_t c = 0; c < t.n; ++c) {
    const uint8_t both = t.scales[g / 2 * t.n + c];
    scale[c] = rounded<kRuntime>(static_cast<float>(g % 2 ? both & 15 : both >> 4) * t.super[c]);
    offset[c] = t.code_zp[c] + 0.5f;
  }
  for (int64_t byte_row = g * 16; byte_row < (g + 1) * 16; ++byte_row) {
    const uint8_t* q = t.words + byte_row * t.n;
    for (int64_t c = 0; c < t.n; ++c) {
      // float32 fused multiply-add: product and sum are exact in double, rounded once (codec/wint2.py).
      const double exact = static_cast<double>(q[c]) * t.code_scale[c] + offset[c];
      const int32_t code = static_cast<int32_t>(std::floor(static_cast<float>(exact)));
      for (int i = 0; i < 4; ++i) {
        const int state = ((code >> (9 - 3 * i)) & 63) - 32;
        put<kRuntime>(out, (byte_row * 4 + i) * t.n + c, static_cast<float>(state) * scale[c]);
      }
    }
  }
}

template <Runtime kRuntime>
void spare_scale_group(const Stored& t, int64_t g, void* out) {
  const FormatInfo& f = info(t.format);
  static constexpr int kNarrow[] = {4, 2, 0}, kWide[] = {13, 11, 9, 6, 4, 2, 0};
  const int* shifts = f.word_bytes == 1 ? kNarrow : kWide;
  const int per_word = f.word_bytes == 1 ? 3 : 7;
  const int mask = 2 * f.zero - 1;
  auto word = [&](int64_t i, int64_t c) {
    const int64_t at = (g * f.words + i) * t.n + c;
    return f.word_bytes == 1 ? t.words[at] : t.words[2 * at] | t.words[2 * at + 1] << 8;
  };
  for (int64_t c = 0; c < t.n; ++c) {
    const int local = word(f.words - 1, c) & ((1 << f.scale_bits) - 1);
    const float scale = static_cast<float>(local) * t.super[c];
    for (int r = 0; r < kRows; ++r) {
      const int state = ((word(r / per_word, c) >> shifts[r % per_word]) & mask) - f.zero;
      put<kRuntime>(out, (g * kRows + r) * t.n + c, static_cast<float>(state) * scale);
    }
  }
}

template <Runtime kRuntime>
void trellis_group(const Stored& t, int64_t g, void* out) {
  for (int64_t byte_row = g * 16; byte_row < (g + 1) * 16; ++byte_row) {
    const uint8_t* q = t.words + byte_row * t.n;
    const uint8_t* before = byte_row ? q - t.n : t.before;
    for (int64_t c = 0; c < t.n; ++c) {
      const uint8_t both = t.scales[g / 2 * t.n + c];
      const float scale = static_cast<float>(g % 2 ? both & 15 : both >> 4) * t.super[c];
      int32_t v[4];
      trellis_values((before ? before[c] : 0) << 8 | q[c], v);
      for (int i = 0; i < 4; ++i)
        put<kRuntime>(out, (byte_row * 4 + i) * t.n + c, static_cast<float>(v[i]) * scale);
    }
  }
}

template <Runtime kRuntime>
void dequantize_as(const Stored& t, void* out, int threads) {
  parallel(t.k / kRows, threads, [&](int64_t g) {
    if (t.format == Format::kWint2) wint2_group<kRuntime>(t, g, out);
    else if (t.format == Format::kCcq2t) trellis_group<kRuntime>(t, g, out);
    else spare_scale_group<kRuntime>(t, g, out);
  });
}

// Calls move(packed offset, stored offset) for every word, offsets in words.
template <typename Move>
void each_word(const Packed& w, const Move& move) {
  const int count = info(w.format).words;
  for (int64_t block = 0; block < w.blocks(); ++block)
    for (int64_t g = 0; g < w.groups(); ++g)
      for (int i = 0; i < count; ++i) {
        const int64_t stored = (g * count + i) * w.n + block * kColumns;
        const int64_t packed = (block * w.groups() + g) * count * kColumns;
        for (int c = 0; c < kColumns; ++c) {
          // WINT2 and ccq-2t put four byte rows of a column into one lane.
          const int64_t inside = has_scales(w.format) ? i / 4 * 64 + c * 4 + i % 4 : i * kColumns + c;
          move(packed + inside, stored + c);
        }
      }
}

template <typename Move>
void each_scale(const Packed& w, const Move& move) {
  const int64_t rows = w.k / 128;
  for (int64_t block = 0; block < w.blocks(); ++block)
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < kColumns; ++c)
        move((block * rows + r) * kColumns + c, r * w.n + block * kColumns + c);
}

}  // namespace

bool integer_pairs(const float* code_scale, const float* code_zp, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const double s = code_scale[c], z = code_zp[c], last = 255 * s + z;
    const bool whole = s == std::floor(s) && z == std::floor(z);
    if (!(whole && z >= 0 && z <= 32767 && last >= 0 && last <= 32767)) return false;
  }
  return true;
}

void dequantize(const Stored& t, Runtime runtime, void* out, int threads) {
  switch (runtime) {
    case Runtime::kFloat32: return dequantize_as<Runtime::kFloat32>(t, out, threads);
    case Runtime::kBfloat16: return dequantize_as<Runtime::kBfloat16>(t, out, threads);
    case Runtime::kFloat16: return dequantize_as<Runtime::kFloat16>(t, out, threads);
  }
}

void repack(const Stored& t, Packed& out) {
  const int bytes = info(t.format).word_bytes;
  uint8_t* words = out.words.data();
  if (bytes == 1) each_word(out, [&](int64_t to, int64_t from) { words[to] = t.words[from]; });
  else each_word(out, [&](int64_t to, int64_t from) { std::memcpy(words + 2 * to, t.words + 2 * from, 2); });
  out.super.assign(t.super, t.super + t.n);
  if (!has_scales(t.format)) return;
  uint8_t* scales = out.scales.data();
  each_scale(out, [&](int64_t to, int64_t from) { scales[to] = t.scales[from]; });
  if (t.before) out.before.assign(t.before, t.before + t.n);
  if (t.format != Format::kWint2) return;
  out.code_scale.assign(t.code_scale, t.code_scale + t.n);
  out.code_zp.assign(t.code_zp, t.code_zp + t.n);
  out.integer = integer_pairs(t.code_scale, t.code_zp, t.n);
}

void unpack(const Packed& w, uint8_t* words, uint8_t* scales) {
  const uint8_t *from_words = w.words.data(), *from_scales = w.scales.data();
  if (info(w.format).word_bytes == 1)
    each_word(w, [&](int64_t from, int64_t to) { words[to] = from_words[from]; });
  else
    each_word(w, [&](int64_t from, int64_t to) { std::memcpy(words + 2 * to, from_words + 2 * from, 2); });
  if (has_scales(w.format))
    each_scale(w, [&](int64_t from, int64_t to) { scales[to] = from_scales[from]; });
}

}  // namespace ccq
