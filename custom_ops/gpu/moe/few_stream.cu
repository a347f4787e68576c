// SPDX-License-Identifier: Apache-2.0
#include "few_stream.h"

#include <algorithm>
#include <atomic>

#include "choice.h"
#ifdef CCQ_SM90A
#include "few_stream.cuh"
#endif

namespace ccq {

#ifdef CCQ_TUNING
int g_stream_stages = 0;
#endif

#ifdef CCQ_SM90A
namespace {

// Configurations, by rows a tile.
template <Pairs kPairs, typename F>
auto with_config(int variant, F&& use) {
  switch (variant) {
    case kStreamFew: return use(StreamFew<kPairs, 1>{});
    case kStreamFew + 1: return use(StreamFew<kPairs, 2>{});
    case kStreamFew + 2: return use(StreamFew<kPairs, 4>{});
    default: return use(StreamFew<kPairs, 8>{});
  }
}

template <typename C>
cudaError_t launch(FewParams p, int sms, int most_shared, cudaStream_t stream) {
  const size_t fixed = C::shared_bytes(p.k, p.experts);
  // A multiple of the teams: a stage's place is always the same team's, or that would mistake one round of its barrier for another.
  const int left = (most_shared - static_cast<int>(fixed)) / C::kStageBytes / C::kSlices * C::kSlices;
  p.stages = std::min(left, C::kUsualStages);
#ifdef CCQ_TUNING
  if (g_stream_stages) p.stages = std::min(left, g_stream_stages);
#endif
  if (p.stages < C::kLeastStages) return cudaErrorInvalidConfiguration;
  // More than half of what there is: of two blocks that share a multiprocessor because the next kernel starts early, one would
  // have to wait while other multiprocessors are idle.
  const size_t shared = std::max<size_t>(fixed + static_cast<size_t>(p.stages) * C::kStageBytes, most_shared / 2 + 1024);
  constexpr int kMaxDevices = 64;
  static std::atomic<size_t> raised[kMaxDevices];  // the shared-memory limit set so far
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices || raised[device].load() < shared) {
    error = cudaFuncSetAttribute(stream_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    if (device < kMaxDevices) raised[device].store(shared);
  }
  p.column_tiles = Divider((p.n / 16 + C::kTiles - 1) / C::kTiles);
  // At most; with one row a block, or one matrix, exactly.
  const int64_t tiles = static_cast<int64_t>(p.offsets ? p.rows : ceil_div(p.rows, C::kRows)) * p.column_tiles.by;
  if (tiles > 2147483647) return cudaErrorInvalidValue;
  const int grid = static_cast<int>(std::min<int64_t>(tiles, sms));
  p.each = static_cast<int>(tiles) / grid, p.longer = static_cast<int>(tiles) % grid;
  if (C::kRows == 1 && p.each / p.column_tiles.by + 2 > 2 * C::entries(p.experts)) return cudaErrorInvalidConfiguration;
  return launch_early(stream_kernel<C>, grid, C::kAllThreads, shared, stream, p);
}

}  // namespace

size_t stream_few_shared(int variant, int k, int experts) {
  // With general pairs, which take more, for both kinds run the same kernel.
  return with_config<Pairs::kGeneral>(variant, [&](auto config) {
    using C = decltype(config);
    return C::shared_bytes(k, experts) + C::kLeastStages * C::kStageBytes;
  });
}

cudaError_t stream_few_gemm(const ccq_moe_gemm_args& a, int variant, int sms, int shared, cudaStream_t stream) {
  const FewParams p{a.x, a.offsets, a.quant, a.scales, a.columns, a.row_scale, a.out,
                    a.rows, a.k, a.n, a.experts, a.dtype, a.row_order == CCQ_ROWS_FASTDEPLOY};
  auto use = [&](auto config) { return launch<decltype(config)>(p, sms, shared, stream); };
  return a.pairs == CCQ_PAIRS_INTEGER ? with_config<Pairs::kInteger>(variant, use) : with_config<Pairs::kGeneral>(variant, use);
}
#else
size_t stream_few_shared(int, int, int) { return ~size_t{0}; }
cudaError_t stream_few_gemm(const ccq_moe_gemm_args&, int, int, int, cudaStream_t) { return cudaErrorInvalidConfiguration; }
#endif

}  // namespace ccq

#ifdef CCQ_TUNING
extern "C" void ccq_moe_gemm_force_stages(int stages) { ccq::g_stream_stages = stages; }
#endif
