// SPDX-License-Identifier: Apache-2.0
// Launch of the encoder: one thread block encodes one output channel after another.
#include "encode_search.cuh"

namespace ccq_encode_kernel {

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
