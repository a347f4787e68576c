// SPDX-License-Identifier: Apache-2.0
#include "wide_halves.h"

#ifdef CCQ_SM90A
#include "moe_wide.cuh"
#include "wide_map.h"
#endif

namespace ccq {

#ifdef CCQ_SM90A
namespace {

// 16-column tiles a warp, rows, stages, units of a stage.
template <Pairs kPairs, bool kBf16, typename F>
auto with_config(int variant, F&& use) {
  using Weights = PairWeights<kPairs, true>;
  switch (variant) {
    case kHalves: return use(WideConfig<Weights, kBf16, 4, 32, 3, 2>{});
    default: return use(WideConfig<Weights, kBf16, 4, 48, 3, 2>{});
  }
}

}  // namespace

size_t wide_halves_shared(int variant) {
  // With general pairs, which take more, for both kinds run the same kernel.
  return with_config<Pairs::kGeneral, true>(variant, [](auto config) { return decltype(config)::shared_bytes(kMaxExperts); });
}

cudaError_t wide_halves_gemm(const ccq_moe_gemm_args& a, int variant, const Device& device, cudaStream_t stream) {
  Arena arena(a.workspace);
  const Workspace w(arena, a.rows, a.k, a.experts, device.sms);
  GemmParams p = gemm_params(a, w);
  p.caller_scale = w.prepared.row_scale;
  cudaError_t error = launch_early(halve_kernel, a.rows, kPrepareThreads, 0, stream, a.x, a.k, a.dtype,
                                   a.row_order == CCQ_ROWS_FASTDEPLOY, a.row_scale, reinterpret_cast<uint4*>(w.prepared.x),
                                   w.prepared.row_scale, w.prepared.counters, kWarpsPerSm * device.sms);
  if (error != cudaSuccess) return error;
  auto launch = [&](auto config) {
    using C = decltype(config);
    CUtensorMap map;
    const cudaError_t failed = map_rows(w.prepared.x, a.rows, a.k, CCQ_FP16, C::kN / 2, &map);
    return failed != cudaSuccess ? failed : launch_gemm<C>(device, wide_kernel<C>, p, w.partial_float4, stream, map);
  };
  auto typed = [&](auto pairs) {
    constexpr Pairs kPairs = decltype(pairs)::value;
    return a.dtype == CCQ_BF16 ? with_config<kPairs, true>(variant, launch) : with_config<kPairs, false>(variant, launch);
  };
  return a.pairs == CCQ_PAIRS_INTEGER ? typed(std::integral_constant<Pairs, Pairs::kInteger>{})
                                      : typed(std::integral_constant<Pairs, Pairs::kGeneral>{});
}
#else
size_t wide_halves_shared(int) { return ~size_t{0}; }
cudaError_t wide_halves_gemm(const ccq_moe_gemm_args&, int, const Device&, cudaStream_t) { return cudaErrorInvalidConfiguration; }
#endif

}  // namespace ccq
