// SPDX-License-Identifier: Apache-2.0
// Launch of the grouped GEMM with CCQ-2T weights: trellis_few.cuh for few rows an expert, on Hopper moe_wide.cuh for more.

#include "trellis_gemm.h"

#include "gemm_launch.cuh"
#include "trellis_few.cuh"
#ifdef CCQ_SM90A
#include "moe_wide.cuh"
#include "wide_map.h"
#include "wide_trellis.cuh"
#endif

namespace ccq {
namespace {

// Rows a tile, stages under way, the instruction.
template <typename F>
auto with_trellis_few(int variant, F&& use) {
  switch (variant) {
#ifdef CCQ_SM90A
    case kTrellisFew: return use(TrellisFewConfig<1, 8, true>{});
    case kTrellisFew + 1: return use(TrellisFewConfig<4, 8, true>{});
    case kTrellisFew + 2: return use(TrellisFewConfig<8, 8, true, 2>{});
    case kTrellisFew + 5: return use(TrellisFewConfig<8, 8, true, 2>{});
    case kTrellisFew + 6: return use(TrellisFewConfig<8, 8, true, 4>{});
#endif
    case kTrellisFew + 3: return use(TrellisFewConfig<1, 4, false>{});
    default: return use(TrellisFewConfig<4, 4, false>{});
  }
}

#ifdef CCQ_SM90A
// As in moe_gemm.cu: 16-column tiles a warp, rows, stages.
template <bool kBf16, typename F>
auto with_trellis_wide(int variant, F&& use) {
  switch (variant) {
    case kWide: return use(WideConfig<TrellisWeights, kBf16, 4, 32, 6>{});
    case kWide + 1: return use(WideConfig<TrellisWeights, kBf16, 4, 48, 5>{});
    case kWide + 2: return use(WideConfig<TrellisWeights, kBf16, 4, 64, 5>{});
    case kWide + 3: return use(WideConfig<TrellisWeights, kBf16, 2, 96, 5>{});
    case kWide + 4: return use(WideConfig<TrellisWeights, kBf16, 2, 128, 4>{});
    default: return use(WideConfig<TrellisWeights, kBf16, 2, 144, 4>{});
  }
}

template <bool kBf16>
cudaError_t launch_wide(const Device& device, const ccq_moe_gemm_args& a, int variant, cudaStream_t stream) {
  Arena arena(a.workspace);
  const Workspace w(arena, a.rows, a.k, a.experts, device.sms);
  GemmParams p{};
  p.offsets = a.offsets, p.quant = a.quant, p.columns = a.columns, p.caller_scale = a.row_scale, p.out = a.out;
  p.prepared = w.prepared, p.partial = w.partial;
  p.rows = a.rows, p.k = a.k, p.n = a.n, p.experts = a.experts, p.dtype = a.dtype;
  // Counters alone: activations are read as they are.
  const cudaError_t error = launch_early(arrange_kernel, 1, kPrepareThreads, 0, stream, nullptr, nullptr, 0, p.prepared.counters,
                                         kWarpsPerSm * device.sms);
  if (error != cudaSuccess) return error;
  return with_trellis_wide<kBf16>(variant, [&](auto config) {
    using C = decltype(config);
    CUtensorMap map;
    const cudaError_t error = map_rows(a.x, a.rows, a.k, a.dtype, C::kN / 2, &map);
    if (error != cudaSuccess) return error;
    return launch_gemm<C>(device, wide_kernel<C>, p, w.partial_float4, stream, map);
  });
}
#endif

// Launches that share K, and the input rows of each (of the last one, at most).
int parts_of(int variant) { return variant == kTrellisFew + 5 ? 2 : 1; }
int part_of(int variant, int k) { return ceil_div(k / 128, parts_of(variant)) * 128; }

bool fits(const Gpu& gpu, int variant, const Call& call) {
  const auto shared = static_cast<size_t>(gpu.shared);
  if (variant >= kTrellisFew) {
    if (parts_of(variant) > 1) {  // their sums lie in the workspace
      Arena arena(nullptr);
      Workspace(arena, call.rows, call.k, call.experts, gpu.sms);
      if (int64_t{4} * call.rows * call.n > static_cast<int64_t>(arena.most())) return false;
    }
    return with_trellis_few(variant, [&](auto c) {
      using C = decltype(c);
      const int k = part_of(variant, call.k);
      return C::suits(call.k - (parts_of(variant) - 1) * k) && C::shared_bytes(k, call.experts) <= shared;
    });
  }
#ifdef CCQ_SM90A
  return with_trellis_wide<true>(variant, [&](auto c) { return decltype(c)::shared_bytes(kMaxExperts) <= shared; });
#else
  return false;
#endif
}

}  // namespace

int trellis_variant(const Gpu& gpu, const Call& call) {
#ifdef CCQ_TUNING
  if (forced_variant() >= 0) return fits(gpu, forced_variant(), call) ? forced_variant() : -1;
#endif
#ifdef CCQ_SM90A
  constexpr bool kHasWide = true;
#else
  constexpr bool kHasWide = false;
#endif
  return trellis_choice(gpu, call, kHasWide, [&](int variant) { return fits(gpu, variant, call); });
}

cudaError_t trellis_gemm(const Device& device, const ccq_moe_gemm_args& a, int variant, cudaStream_t stream) {
  if (variant < 0) return cudaErrorInvalidConfiguration;
#ifdef CCQ_SM90A
  if (variant < kTrellisFew)
    return a.dtype == CCQ_BF16 ? launch_wide<true>(device, a, variant, stream) : launch_wide<false>(device, a, variant, stream);
#endif
  const int part = part_of(variant, a.k);
  for (int first = 0; first < a.k; first += part) {
    TrellisFewParams p{};
    p.x = a.x, p.offsets = a.offsets, p.quant = a.quant, p.columns = a.columns, p.row_scale = a.row_scale, p.out = a.out;
    p.rows = a.rows, p.k = std::min(part, a.k - first), p.n = a.n, p.experts = a.experts, p.dtype = a.dtype;
    p.all_k = a.k, p.first_k = first, p.partial = static_cast<float*>(a.workspace), p.adds = first > 0, p.hands = first + part < a.k;
    const cudaError_t error = with_trellis_few(variant, [&](auto config) {
      using C = decltype(config);
      return launch_few<C>(device, trellis_few_kernel<C>, p, C::shared_bytes(p.k, p.experts), C::kAllThreads, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace ccq
