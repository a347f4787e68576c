// SPDX-License-Identifier: Apache-2.0
// Launch of the grouped GEMM with CCQ-2T weights: trellis_few.cuh for few rows an expert, on Hopper trellis_some.cuh for some and
// moe_wide.cuh for more.

#include "trellis_gemm.h"

#include "gemm_launch.cuh"
#include "trellis_few.cuh"
#ifdef CCQ_SM90A
#include "moe_wide.cuh"
#include "trellis_some.cuh"
#include "wide_map.h"
#include "wide_trellis.cuh"
#endif

namespace ccq {
namespace {

// By rows a tile.
template <typename F>
auto with_trellis_few(int variant, F&& use) {
  switch (variant) {
#ifdef CCQ_SM90A
    case kTrellisFew: return use(TrellisFewConfig<1, 4>{});
    case kTrellisFew + 1: return use(TrellisFewConfig<2, 2>{});
    case kTrellisFew + 2: return use(TrellisFewConfig<4, 1>{});
#endif
    // With less shared memory.
    case kTrellisFew + 3: return use(TrellisFewConfig<1, 1, 1>{});
    default: return use(TrellisFewConfig<4, 1, 1>{});
  }
}

// Stages on their way: as many as fit, of a multiple of the teams (a stage's place is always the same team's). 0: too few fit.
template <typename C>
int few_stages(int shared, int k, int experts) {
  const int left = (shared - static_cast<int>(C::shared_bytes(k, experts))) / C::kStageBytes / C::kTeams * C::kTeams;
  return left < C::kLeastStages ? 0 : std::min(left, C::kMostStages);
}

#ifdef CCQ_SM90A
static_assert(TrellisFewConfig<4, 1>::shared_bytes(8192, kMaxExperts) + TrellisFewConfig<4, 1>::kLeastStages * TrellisFewConfig<4, 1>::kStageBytes <= 227 * 1024,
              "rows of 8192 fit for any number of experts");

// As in moe_gemm.cu: 16-column tiles a warp, rows, stages.
template <bool kBf16, typename F>
auto with_trellis_wide(int variant, F&& use) {
  switch (variant) {
    case kWide: return use(WideConfig<TrellisWeights, kBf16, 4, 32, 6>{});
    case kWide + 1: return use(WideConfig<TrellisWeights, kBf16, 4, 48, 5>{});
    case kWide + 2: return use(WideConfig<TrellisWeights, kBf16, 4, 64, 5>{});
    case kWide + 3: return use(WideConfig<TrellisWeights, kBf16, 2, 96, 5>{});
    case kWide + 4: return use(WideConfig<TrellisWeights, kBf16, 2, 128, 4>{});
    case kWide + 5: return use(WideConfig<TrellisWeights, kBf16, 2, 144, 4>{});
    default: return use(WideConfig<TrellisWeights, kBf16, 1, 256, 3>{});
  }
}

// One of choice.h's candidates has the configuration's tiles.
template <typename C>
constexpr bool of_trellis_wide() {
  for (const WideCost& c : kTrellisWideCosts)
    if (c.columns == C::kTiles * 16 && c.rows == C::kN) return c.columns * c.rows / 4 == C::kPartialFloat4;
  return false;
}

template <bool kBf16>
cudaError_t launch_wide(const Device& device, const ccq_moe_gemm_args& a, int variant, cudaStream_t stream) {
  Arena arena(a.workspace);
  const Workspace w(arena, a.rows, a.k, a.experts, device.sms);
  GemmParams p = gemm_params(a, w);
  p.caller_scale = a.row_scale;
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

// By the most rows of a tile.
template <bool kBf16, typename F>
auto with_trellis_some(int variant, F&& use) {
  return variant == kTrellisSome ? use(TrellisSomeConfig<kBf16, 8>{}) : use(TrellisSomeConfig<kBf16, 16>{});
}

template <bool kBf16>
cudaError_t launch_some(const Device& device, const ccq_moe_gemm_args& a, int variant, cudaStream_t stream) {
  Arena arena(a.workspace);
  const Workspace w(arena, a.rows, a.k, a.experts, device.sms);
  GemmParams p = gemm_params(a, w);
  p.caller_scale = w.prepared.row_scale;
  const cudaError_t error = launch_early(trellis_prepare_kernel<kBf16>, trellis_prepare_blocks(a.rows, a.experts), kPrepareThreads, 0,
                                         stream, a.x, a.offsets, a.rows, a.experts, a.k, a.row_scale, kWarpsPerSm * device.sms, w.prepared);
  if (error != cudaSuccess) return error;
  return with_trellis_some<kBf16>(variant, [&](auto config) {
    using C = decltype(config);
    return launch_gemm<C>(device, trellis_some_kernel<C>, p, w.partial_float4, stream);
  });
}
#endif

bool fits(const Gpu& gpu, int variant, const Call& call) {
#ifdef CCQ_SM90A
  if (variant >= kTrellisSome)
    return call.mean() <= kMostSome && with_trellis_some<true>(variant, [&](auto c) {
      return decltype(c)::shared_bytes(kMaxExperts) <= static_cast<size_t>(gpu.shared);
    });
#endif
  if (variant >= kTrellisFew)
    return with_trellis_few(variant, [&](auto c) { return few_stages<decltype(c)>(gpu.shared, call.k, call.experts) > 0; });
#ifdef CCQ_SM90A
  return with_trellis_wide<true>(variant, [&](auto c) {
    static_assert(of_trellis_wide<decltype(c)>(), "choice.h knows the same tiles");
    return decltype(c)::shared_bytes(kMaxExperts) <= static_cast<size_t>(gpu.shared);
  });
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
  if (variant >= kTrellisSome)
    return a.dtype == CCQ_BF16 ? launch_some<true>(device, a, variant, stream) : launch_some<false>(device, a, variant, stream);
  if (variant < kTrellisFew)
    return a.dtype == CCQ_BF16 ? launch_wide<true>(device, a, variant, stream) : launch_wide<false>(device, a, variant, stream);
#endif
  FewParams p{};
  p.x = a.x, p.offsets = a.offsets, p.quant = a.quant, p.columns = a.columns, p.row_scale = a.row_scale, p.out = a.out;
  p.rows = a.rows, p.k = a.k, p.n = a.n, p.experts = a.experts, p.dtype = a.dtype;
  return with_trellis_few(variant, [&](auto config) {
    using C = decltype(config);
    p.stages = few_stages<C>(device.shared, p.k, p.experts);
    if (p.stages == 0) return cudaErrorInvalidConfiguration;
    const size_t shared = C::shared_bytes(p.k, p.experts) + static_cast<size_t>(p.stages) * C::kStageBytes;
    return launch_few<C>(device, trellis_few_kernel<C>, p, shared, C::kAllThreads, stream);
  });
}

}  // namespace ccq
