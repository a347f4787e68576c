// SPDX-License-Identifier: Apache-2.0
#include "some_stream.h"

#ifdef CCQ_SM90A
#include "some_stream.cuh"
#endif

namespace ccq {

#ifdef CCQ_SM90A
namespace {

template <Pairs kPairs, typename F>
auto with_config(int variant, F&& use) {
  return variant == kSome ? use(SomeStream<kPairs, 4>{}) : use(SomeStream<kPairs, 2>{});
}

}  // namespace

size_t some_stream_shared(int variant) {
  // With general pairs, which take more, for both kinds run the same kernel.
  return with_config<Pairs::kGeneral>(variant, [](auto config) { return decltype(config)::shared_bytes(kMaxExperts); });
}

cudaError_t some_stream_gemm(const ccq_moe_gemm_args& a, int variant, const Device& device, cudaStream_t stream) {
  Arena arena(a.workspace);
  const Workspace w(arena, a.rows, a.k, a.experts, device.sms);
  const GemmParams p = gemm_params(a, w);
  auto use = [&](auto config) {
    using C = decltype(config);
    const cudaError_t error =
        launch_early(prepare_kernel, a.rows, kPrepareThreads, 0, stream, a.x, a.offsets, a.experts, a.k, a.dtype,
                     a.row_order == CCQ_ROWS_FASTDEPLOY, a.row_scale, C::kTileTokens, Prepare::kBlocks, kWarpsPerSm * device.sms,
                     p.prepared);
    return error != cudaSuccess ? error : launch_gemm<C>(device, some_kernel<C>, p, w.partial_float4, stream);
  };
  return a.pairs == CCQ_PAIRS_INTEGER ? with_config<Pairs::kInteger>(variant, use) : with_config<Pairs::kGeneral>(variant, use);
}
#else
size_t some_stream_shared(int) { return ~size_t{0}; }
cudaError_t some_stream_gemm(const ccq_moe_gemm_args&, int, const Device&, cudaStream_t) { return cudaErrorInvalidConfiguration; }
#endif

}  // namespace ccq
