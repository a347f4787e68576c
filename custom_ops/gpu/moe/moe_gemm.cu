// SPDX-License-Identifier: Apache-2.0
// Choice of kernel, workspace and launch of the grouped GEMM (moe_gemm.h).
//
// Five kernels: moe_few.cuh and few_stream.cuh for few rows an expert, some_stream.cuh and moe_gemm.cuh for some, moe_wide.cuh for
// more (wide_halves.cu) and many. few_stream.cuh, some_stream.cuh and moe_wide.cuh are compiled with -DCCQ_SM90A, which says that
// sm_90a is among the targets; without it, and on other GPUs, the other two serve all.

#include "moe_gemm.h"

#include <algorithm>

#include "few_stream.h"
#include "gemm_launch.cuh"
#include "moe_few.cuh"
#include "moe_gemm.cuh"
#include "some_stream.h"
#include "trellis_gemm.h"
#include "wide_halves.h"
#ifdef CCQ_SM90A
#include "moe_wide.cuh"
#include "wide_map.h"
#endif

namespace ccq {
namespace {

// Configurations of moe_few.cuh: 16-column tiles a warp, warps along K and along N, rows a tile, stages.
template <Pairs kPairs, typename F>
auto with_few(int variant, F&& use) {
  switch (variant) {
    case kFew: return use(FewConfig<kPairs, 1, 16, 1, 1, 4>{});
    case kFew + 1: return use(FewConfig<kPairs, 2, 16, 1, 1, 3>{});
    case kFew + 2: return use(FewConfig<kPairs, 4, 16, 1, 1, 2>{});
    case kFew + 3: return use(FewConfig<kPairs, 4, 4, 4, 1, 2>{});
    case kFew + 4: return use(FewConfig<kPairs, 4, 2, 8, 1, 2>{});
    case kFew + 5: return use(FewConfig<kPairs, 4, 16, 1, 2, 2>{});
    case kFew + 6: return use(FewConfig<kPairs, 4, 8, 2, 2, 2>{});
    case kFew + 7: return use(FewConfig<kPairs, 1, 16, 1, 4, 4>{});
    case kFew + 8: return use(FewConfig<kPairs, 2, 16, 1, 4, 3>{});
    default: return use(FewConfig<kPairs, 4, 16, 1, 4, 2>{});
  }
}

// Of moe_gemm.cuh: 16-column tiles a warp, blocks of 8 rows, stages. The last two are for less shared memory than Hopper's.
template <Pairs kPairs, typename F>
auto with_some(int variant, F&& use) {
  switch (variant) {
    case 0: return use(Config<kPairs, 4, 2, 3>{});
    case 1: return use(Config<kPairs, 2, 4, 4>{});
    case 2: return use(Config<kPairs, 2, 2, 4>{});
    default: return use(Config<kPairs, 1, 2, 3>{});
  }
}
constexpr int kLeastShared = 99 * 1024;  // of the GPUs we compile for: 8.6, 8.9 and 12.0
static_assert(Config<Pairs::kGeneral, 1, 2, 3>::shared_bytes(kMaxExperts) <= kLeastShared, "one must fit everywhere");

#ifdef CCQ_SM90A
// Of moe_wide.cuh: 16-column tiles a warp, rows, stages, units of a stage.
template <Pairs kPairs, bool kBf16, typename F>
auto with_wide(int variant, F&& use) {
  switch (variant) {
    case kWide: return use(WideConfig<PairWeights<kPairs>, kBf16, 4, 32, 3, 2>{});
    case kWide + 1: return use(WideConfig<PairWeights<kPairs>, kBf16, 4, 48, 3, 2>{});
    case kWide + 2: return use(WideConfig<PairWeights<kPairs>, kBf16, 4, 64, 2, 2>{});
    case kWide + 3: return use(WideConfig<PairWeights<kPairs>, kBf16, 2, 96, 5>{});
    case kWide + 4: return use(WideConfig<PairWeights<kPairs>, kBf16, 2, 128, 4>{});
    default: return use(WideConfig<PairWeights<kPairs>, kBf16, 2, 144, 4>{});
  }
}
#endif

#ifdef CCQ_SM90A
// One of choice.h's candidates has the configuration's tiles.
template <typename C>
constexpr bool of_wide() {
  for (const WideCost& c : kWideCosts)
    if (c.columns == C::kTiles * 16 && c.rows == C::kN) return true;
  return false;
}
#endif

// Bytes of shared memory for a call: with general pairs, which take more, for both kinds run the same kernel.
size_t shared_of(int variant, int k, int experts) {
  if (variant >= kHalves) return wide_halves_shared(variant);
  if (variant >= kSome) return some_stream_shared(variant);
  if (variant >= kStreamFew) return stream_few_shared(variant, k, experts);
  if (variant >= kFew)
    return with_few<Pairs::kGeneral>(variant, [&](auto c) { return decltype(c)::shared_bytes(k, experts); });
#ifdef CCQ_SM90A
  if (variant >= kWide)
    return with_wide<Pairs::kGeneral, true>(variant, [](auto c) {
      using C = decltype(c);
      static_assert(of_wide<C>(), "choice.h knows the same tiles");
      return C::shared_bytes(kMaxExperts);
    });
#endif
  return with_some<Pairs::kGeneral>(variant, [](auto c) { return decltype(c)::shared_bytes(kMaxExperts); });
}

int variant_of(const Device& device, const ccq_moe_gemm_args& a) {
  if (a.pairs == CCQ_PAIRS_TRELLIS) return trellis_variant(device, {a.rows, a.k, a.n, a.experts});
#ifdef CCQ_TUNING
  if (forced_variant() >= 0) return forced_variant();
#endif
#ifdef CCQ_SM90A
  constexpr bool kHasWide = true;
#else
  constexpr bool kHasWide = false;
#endif
  return kernel_choice(device, {a.rows, a.k, a.n, a.experts}, kHasWide, [&](int variant) {
    return shared_of(variant, a.k, a.experts) <= static_cast<size_t>(device.shared);
  });
}

template <Pairs kPairs>
cudaError_t choose_gemm(int variant, const Device& device, const GemmParams& p, const void* x, size_t partial,
                        cudaStream_t stream) {
#ifdef CCQ_SM90A
  if (variant >= kWide) {
    auto launch = [&](auto config) {
      CUtensorMap map;
      const cudaError_t error = map_rows(x, p.rows, p.k, p.dtype, decltype(config)::kN / 2, &map);
      if (error != cudaSuccess) return error;
      return launch_gemm<decltype(config)>(device, wide_kernel<decltype(config)>, p, partial, stream, map);
    };
    return p.dtype == CCQ_BF16 ? with_wide<kPairs, true>(variant, launch) : with_wide<kPairs, false>(variant, launch);
  }
#endif
  return with_some<kPairs>(variant, [&](auto config) {
    return launch_gemm<decltype(config)>(device, gemm_kernel<decltype(config)>, p, partial, stream);
  });
}

bool valid(const ccq_moe_gemm_args* a) {
  if (!a || a->rows < 0 || a->k <= 0 || a->k % 128 || a->n <= 0 || a->n % 16 || a->experts < 1 ||
      a->experts > kMaxExperts || (a->dtype != CCQ_BF16 && a->dtype != CCQ_FP16) ||
      (a->pairs != CCQ_PAIRS_INTEGER && a->pairs != CCQ_PAIRS_GENERAL && a->pairs != CCQ_PAIRS_TRELLIS) ||
      (a->row_order != CCQ_ROWS_PLAIN && (a->row_order != CCQ_ROWS_FASTDEPLOY || a->pairs == CCQ_PAIRS_TRELLIS)))
    return false;
  if (a->rows == 0) return true;
  if (!a->x || !a->quant || (!a->scales && a->pairs != CCQ_PAIRS_TRELLIS) || !a->columns || !a->out || !a->workspace || (!a->offsets && a->experts != 1) ||
      !aligned(a->x, 16) || !aligned(a->quant, 16) || !aligned(a->scales, 16) || !aligned(a->columns, 16) ||
      !aligned(a->workspace, 256) || !aligned(a->out, 16))
    return false;
  // Units are counted in 32 bits: row blocks (of 8, at worst) x column tiles (of 128) x K blocks.
  return (a->rows / 8.0 + a->experts) * (a->n / 128.0 + 1) * (a->k / 128.0) < 2147483647.0;
}

cudaError_t launch_prepare(const ccq_moe_gemm_args& a, const Device& device, int tile_rows, const Prepared& out,
                           cudaStream_t stream) {
  const int counters = kWarpsPerSm * device.sms;
  return launch_early(prepare_kernel, a.rows, kPrepareThreads, 0, stream, a.x, a.offsets, a.experts, a.k, a.dtype,
                      a.row_order == CCQ_ROWS_FASTDEPLOY, a.row_scale, tile_rows, Prepare::kSome, counters, out);
}

// Prologue of moe_wide.cuh: activations in plain order are arranged in the workspace. *x: where the kernel shall read them.
cudaError_t launch_arrange(const ccq_moe_gemm_args& a, const Device& device, const Prepared& workspace, const void** x,
                           cudaStream_t stream) {
  const int64_t chunks = static_cast<int64_t>(a.rows) * (a.k / 16);
  const bool arrange = a.row_order == CCQ_ROWS_PLAIN;
  const unsigned blocks = arrange ? static_cast<unsigned>((chunks + kPrepareThreads - 1) / kPrepareThreads) : 1;
  if (arrange) *x = workspace.x;
  return launch_early(arrange_kernel, blocks, kPrepareThreads, 0, stream, static_cast<const uint4*>(a.x),
                      arrange ? reinterpret_cast<uint4*>(workspace.x) : nullptr, chunks, workspace.counters,
                      kWarpsPerSm * device.sms);
}

}  // namespace
}  // namespace ccq

extern "C" size_t ccq_moe_gemm_workspace(int rows, int k, int n, int experts) {
  (void)n;
  ccq::Device device;
  if (rows < 0 || k <= 0 || experts <= 0 || ccq::current_device(&device) != cudaSuccess) return 0;
  ccq::Arena arena(nullptr);
  ccq::Workspace(arena, rows, k, experts, device.sms);
  return arena.most();
}

extern "C" int ccq_moe_gemm_variant(const ccq_moe_gemm_args* a) {
  ccq::Device device;
  return ccq::valid(a) && a->rows > 0 && ccq::current_device(&device) == cudaSuccess ? ccq::variant_of(device, *a) : -1;
}

extern "C" cudaError_t ccq_moe_gemm(const ccq_moe_gemm_args* a, cudaStream_t stream) {
  using namespace ccq;
  if (!valid(a)) return cudaErrorInvalidValue;
  if (a->rows == 0) return cudaSuccess;
  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const int variant = variant_of(device, *a);
  if (a->pairs == CCQ_PAIRS_TRELLIS) return trellis_gemm(device, *a, variant, stream);
  if (variant >= kHalves) return wide_halves_gemm(*a, variant, device, stream);
  if (variant >= kSome) return some_stream_gemm(*a, variant, device, stream);
  if (variant >= kStreamFew) return stream_few_gemm(*a, variant, device.sms, device.shared, stream);
  if (variant >= kFew) {
    const FewParams p{a->x, a->offsets, a->quant, a->scales, a->columns, a->row_scale, a->out,
                      a->rows, a->k, a->n, a->experts, a->dtype, a->row_order == CCQ_ROWS_FASTDEPLOY};
    auto launch = [&](auto config) {
      using C = decltype(config);
      return launch_few<C>(device, few_kernel<C>, p, C::shared_bytes(p.k, p.experts), C::kThreads, stream);
    };
    return a->pairs == CCQ_PAIRS_INTEGER ? with_few<Pairs::kInteger>(variant, launch)
                                         : with_few<Pairs::kGeneral>(variant, launch);
  }
  Arena arena(a->workspace);
  const Workspace w(arena, a->rows, a->k, a->experts, device.sms);
  GemmParams p = gemm_params(*a, w);
  p.caller_scale = a->row_scale;
  const void* x = a->x;
  error = variant >= kWide ? launch_arrange(*a, device, p.prepared, &x, stream)
                           : launch_prepare(*a, device, variant == 1 ? 32 : 16, p.prepared, stream);
  if (error != cudaSuccess) return error;
  return a->pairs == CCQ_PAIRS_INTEGER
             ? choose_gemm<Pairs::kInteger>(variant, device, p, x, w.partial_float4, stream)
             : choose_gemm<Pairs::kGeneral>(variant, device, p, x, w.partial_float4, stream);
}

extern "C" int ccq_moe_gemm_choice(int sms, int major, int shared, int rows, int k, int n, int experts) {
  return ccq::kernel_choice(ccq::Gpu{sms, major, shared}, {rows, k, n, experts}, major == 9, [&](int variant) {
    return ccq::shared_of(variant, k, experts) <= static_cast<size_t>(shared);
  });
}

#ifdef CCQ_TUNING
extern "C" void ccq_moe_gemm_force_variant(int variant) { ccq::forced_variant() = variant; }
#endif
