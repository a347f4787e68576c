// SPDX-License-Identifier: Apache-2.0
// Order of the calibrated search: memory, passes over the groups, and the three steps (custom_ops/cpu/ldlq.cpp).
//
// Most of the time goes into taking the errors of earlier groups over to later rows. On the CPU every group does so at
// once; here the groups of a panel (256 rows) first, and the rows outside the panel afterwards with all its errors, which
// is one large product. For each sum the order of its terms is the same.
#include "ldlq.h"

#include <algorithm>

#include "../common/arena.h"
#include "ldlq_descend.cuh"
#include "ldlq_feedback.cuh"
#include "ldlq_lanes.cuh"
#include "ldlq_product.cuh"

namespace ccq_ldlq {

using ccq::Arena;

constexpr int kPanel = 256;
constexpr int kPlain = 256;  // threads of the kernels that do little
constexpr int64_t kMostLanes = int64_t{65535} * kTileLanes;  // rows of a grid

int64_t rounded(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
unsigned pieces(int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); }

// Launches on one stream; the first error sticks and makes the rest no-ops.
class Queue {
 public:
  explicit Queue(cudaStream_t stream) : stream_(stream) {}
  cudaError_t error() const { return error_; }
  void record(cudaEvent_t event) {
    if (error_ == cudaSuccess && event) error_ = cudaEventRecord(event, stream_);
  }

  template <typename T>
  void copy(T* to, const T* from, int64_t count) {
    if (error_ == cudaSuccess) error_ = cudaMemcpyAsync(to, from, count * sizeof(T), cudaMemcpyDeviceToDevice, stream_);
  }

  // As many blocks of this kernel as fit; more than 48 KB for one must be asked for.
  template <typename... P>
  void give_shared_memory(void (*kernel)(P...), size_t bytes) {
    if (error_ == cudaSuccess)
      error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error_ == cudaSuccess && bytes)
      error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  }

  template <typename... P, typename... A>
  void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, A... arguments) {
    if (error_ != cudaSuccess || grid.x == 0 || grid.y == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

// Channels at a time, and the lanes they take.
struct Chunks {
  int64_t channels = 0, lanes = 0;

  // `each` lanes a channel and `lane_bytes` a lane; as few pieces as fit, of about one size.
  Chunks(int64_t n, int64_t each, int64_t lane_bytes, int64_t memory) {
    const int64_t most = std::min<int64_t>(memory / lane_bytes, kMostLanes) / kTileLanes * kTileLanes / each;
    if (most < 1) return;
    const int64_t count = (n + most - 1) / most;
    channels = (n + count - 1) / count;
    lanes = rounded(channels * each, kTileLanes);
  }
};

class Search {
 public:
  Search(const ccq_ldlq_args& args, void* workspace)
      : a_(args), k_(static_cast<int>(args.k)), n_(static_cast<int>(args.n)), screens_(args.pairs > args.keep_pairs),
        keep_(screens_ ? args.keep_pairs : args.pairs), tries_(args.high - args.low + 1),
        screened_(args.n, args.pairs, feedback_bytes(), args.run_bytes),
        tried_(args.n, static_cast<int64_t>(keep_) * args.candidates, feedback_bytes(), args.run_bytes),
        descended_(args.n, 1, descent_bytes(), args.run_bytes), arena_(workspace) {
    best_.stride = ccq_ldlq_stride(n_);
    best_.words = arena_.take<uint8_t>(best_.stride * (k_ / kBlock));
    best_.local = arena_.take<uint8_t>(best_.stride * (k_ / kGroup));
    best_.super = arena_.take<float>(n_);
    best_.pair = arena_.take<int>(n_);
    best_.loss = arena_.take<double>(n_);
    best_.lane = arena_.take<int>(n_);
    kept_ = arena_.take<int>(int64_t{n_} * keep_);
    place_ = arena_.take<int>(int64_t{n_} * keep_);
    picked_ = arena_.take<uint8_t>(screens_ ? screened_.channels * a_.pairs : 0);
    counts_ = arena_.take<int>(a_.pairs);
    lanes_.begin = arena_.take<int>(a_.pairs + 1);
    shared_end_ = arena_.used();
    feedback_memory();
    descent_memory();
  }

  bool fits() const { return (!screens_ || screened_.channels > 0) && tried_.channels > 0 && descended_.channels > 0; }
  size_t workspace() const { return arena_.most(); }

  // 1. Which pairs suit a channel?  2. Error feedback with those, every super scale and several local ones.
  void feed_back(Queue& q) {
    feedback_memory();
    q.give_shared_memory(feed_back_group, sizeof(GroupShared));
    prepare_products(q);
    if (!screens_) {
      const int64_t all = int64_t{n_} * a_.pairs;
      q.launch(keep_all, dim3(pieces(all, kPlain)), kPlain, 0, n_, a_.pairs, kept_);
    } else {
      for (int first = 0; first < n_; first += screened_.channels) {
        const int count = std::min<int>(screened_.channels, n_ - first), lanes = count * a_.pairs;
        q.launch(list_all, dim3(pieces(std::max(lanes, a_.pairs + 1), kPlain)), kPlain, 0, lanes_, a_.pairs, count, first,
                 a_.supers);
        run_feedback(q, lanes, 0, 1, true);
        q.launch(keep_pairs, dim3(pieces(count, kPlain)), kPlain, 0, run_loss_, count, a_.pairs, keep_, first, picked_,
                 kept_);
      }
    }
    q.record(a_.screened);
    for (int first = 0; first < n_; first += tried_.channels) {
      const int count = std::min<int>(tried_.channels, n_ - first), lanes = count * keep_ * a_.candidates;
      list(q, kept_, keep_, first, count, a_.supers, a_.candidates);
      run_feedback(q, lanes, a_.low, tries_, false);
      q.launch(choose, dim3(pieces(count, kPlain)), kPlain, 0, lanes_, run_loss_, kept_, keep_, place_, first, count,
               a_.candidates, best_);
      q.launch(take_choice, dim3(pieces(count, kPlain), k_ / kBlock), kPlain, 0, words_, local_, stride_, first, count,
               best_);
    }
  }

  // 3. Coordinate descent from there, and the outputs.
  void descend(Queue& q) {
    descent_memory();
    q.give_shared_memory(descend_group, sizeof(DescentShared));
    prepare_products(q);
    for (int first = 0; a_.sweeps && first < n_; first += descended_.channels) {
      const int count = std::min<int>(descended_.channels, n_ - first);
      list(q, best_.pair, 1, first, count, best_.super, 1);
      run_descent(q, count);
    }
    const dim3 word_tiles(pieces(n_, 32), pieces(k_ / kBlock, 32)), scale_tiles(pieces(n_, 32), pieces(k_ / kGroup, 32));
    q.launch(transpose<uint8_t, uint16_t>, word_tiles, 256, 0, best_.words, k_ / kBlock, n_, best_.stride, a_.words,
             k_ / kBlock);
    q.launch(transpose<uint8_t, uint16_t>, scale_tiles, 256, 0, best_.local, k_ / kGroup, n_, best_.stride, a_.scales,
             k_ / kGroup);
    q.copy(a_.found_supers, best_.super, n_);
    q.copy(a_.found_pairs, best_.pair, n_);
    q.copy(a_.loss, best_.loss, n_);
  }

 private:
  // What a lane takes, lists included.
  int64_t feedback_bytes() const { return 4 * a_.k + 4 * kPanel + a_.k / kBlock + a_.k / kGroup + 64; }
  int64_t descent_bytes() const { return 16 * a_.k + 4 * kPanel + a_.k / kBlock + a_.k / kGroup + 64; }

  // Both halves lay out the rest of the workspace anew.
  void run_memory(int64_t lanes) {
    arena_.back_to(shared_end_);
    stride_ = lanes;
    lanes_.channel = arena_.take<int>(lanes);
    lanes_.pair = arena_.take<int>(lanes);
    lanes_.super = arena_.take<float>(lanes);
    run_loss_ = arena_.take<double>(lanes);
    block_capacity_ = pieces(lanes, kBlockRuns / CCQ_LDLQ_SCALES) + a_.pairs;
    blocks_ = arena_.take<BlockLanes>(block_capacity_);
    words_ = arena_.take<uint8_t>(lanes * (k_ / kBlock));
    local_ = arena_.take<uint8_t>(lanes * (k_ / kGroup));
    panel_ = arena_.take<float>(lanes * kPanel);
  }
  void feedback_memory() {
    const int64_t lanes = screens_ ? std::max(screened_.lanes, tried_.lanes) : tried_.lanes;
    run_memory(lanes);
    x_ = arena_.take<float>(lanes * k_);
  }
  void descent_memory() {
    const int64_t lanes = descended_.lanes;
    run_memory(lanes);
    weight_ = arena_.take<float>(lanes * k_);
    error_ = arena_.take<float>(lanes * k_);
    gradient_ = arena_.take<float>(lanes * k_);
    target_ = arena_.take<float>(lanes * k_);
  }

  void list(Queue& q, const int* kept, int keep, int first, int count, const float* supers, int candidates) {
    q.launch(count_lanes, dim3(a_.pairs), kListThreads, 0, kept, keep, first, count, counts_);
    q.launch(list_kept, dim3(a_.pairs), kListThreads, 0, lanes_, counts_, a_.pairs, kept, keep, first, count, supers, a_.n,
             candidates, place_);
  }

  // Blocks of `size` lanes of one pair; returns how many there may be.
  unsigned cut(Queue& q, int lanes, int size) {
    const unsigned count = pieces(lanes, size) + a_.pairs;
    q.launch(cut_blocks, dim3(1), 1024, 0, lanes_.begin, a_.pairs, size, blocks_, static_cast<int>(count));
    return count;
  }

  static void prepare_products(Queue& q) {
    q.give_shared_memory(add_product<64>, 0);
    q.give_shared_memory(add_product<128>, 0);
  }

  // c[rows first .. last, without `skip` from skip_from on] += depth terms.
  void product(Queue& q, const float* matrix, int from, int depth, const float* b, float* c, int first, int last,
               int skip_from, int skip, int lanes, bool fresh) {
    Product p;
    p.a = matrix + static_cast<int64_t>(from) * k_, p.a_stride = k_;
    p.b = b, p.c = c, p.stride = static_cast<int>(stride_);
    p.rows = last, p.first = first, p.skip_from = skip_from, p.skip = skip, p.depth = depth, p.fresh = fresh;
    const int rows = last - first - skip;
    const unsigned lane_tiles = pieces(lanes, kTileLanes);
    if (rows > kPanel) q.launch(add_product<128>, dim3(pieces(rows, 128), lane_tiles), 256, 0, p);
    else if (rows > 0) q.launch(add_product<64>, dim3(pieces(rows, 64), lane_tiles), 128, 0, p);
  }

  void run_feedback(Queue& q, int lanes, int low, int tries, bool loss_only) {
    const unsigned blocks = cut(q, lanes, kBlockRuns / tries);
    q.launch(load_weights, dim3(pieces(lanes, kPlain), k_ / kBlock), kPlain, 0, a_.weight, best_.stride, lanes_.channel,
             lanes, x_, stride_);
    FeedbackArgs f{};
    f.k = k_, f.stride = stride_, f.weight = a_.weight, f.weight_stride = best_.stride, f.feedback = a_.feedback;
    f.d_root = a_.d_root, f.states = reinterpret_cast<const float4*>(a_.books), f.blocks = blocks_;
    f.channel = lanes_.channel, f.super = lanes_.super, f.x = x_, f.loss = run_loss_;
    f.words = loss_only ? nullptr : words_, f.local = local_;
    f.nominal = a_.nominal, f.low = low, f.tries = tries;
    for (int panel = 0; panel < k_; panel += kPanel) {
      const int end = std::min(panel + kPanel, k_);
      for (int first = panel; first < end; first += kGroup) {
        f.error = panel_ + (first - panel) * stride_;
        q.launch(feed_back_group, dim3(blocks), kGroupThreads, sizeof(GroupShared), f, first);
        product(q, a_.feedback, first, kGroup, f.error, x_, first + kGroup, end, end, 0, lanes, false);
      }
      product(q, a_.feedback, panel, end - panel, panel_, x_, end, k_, k_, 0, lanes, false);
    }
  }

  void run_descent(Queue& q, int lanes) {
    const unsigned blocks = cut(q, lanes, kTeams);
    const dim3 flat(pieces(lanes, kPlain)), by_word(pieces(lanes, kPlain), k_ / kBlock);
    DescentArgs d{};
    d.k = k_, d.stride = stride_, d.lanes = lanes, d.h = a_.h, d.h_root = a_.h_root, d.h_inverse = a_.h_inverse;
    d.states = reinterpret_cast<const float4*>(a_.books), d.blocks = blocks_, d.pair = lanes_.pair, d.super = lanes_.super;
    d.weight = weight_, d.error = error_, d.gradient = gradient_, d.target = target_, d.moves = panel_;
    d.words = words_, d.local = local_, d.loss = run_loss_;
    q.launch(load_weights, by_word, kPlain, 0, a_.weight, best_.stride, lanes_.channel, lanes, weight_, stride_);
    q.launch(move_choice<false>, by_word, kPlain, 0, best_, lanes_.channel, lanes, words_, local_, stride_);
    product(q, a_.h, 0, k_, weight_, target_, 0, k_, k_, 0, lanes, true);
    for (int sweep = 0; sweep <= a_.sweeps; ++sweep) {
      if (sweep > 0) {
        sweep_once(q, d, blocks, lanes);
        q.launch(fit_supers, flat, kPlain, 0, d);
      }
      q.launch(restore_errors, by_word, kPlain, 0, d);
      product(q, a_.h, 0, k_, error_, gradient_, 0, k_, k_, 0, lanes, true);
    }
    q.launch(sum_losses, flat, kPlain, 0, d);
    q.launch(move_choice<true>, by_word, kPlain, 0, best_, lanes_.channel, lanes, words_, local_, stride_);
    q.launch(return_results, flat, kPlain, 0, best_, lanes_.channel, lanes, lanes_.super, run_loss_);
  }

  // A group's moves change the gradient of all rows; those of the panel need it at once.
  void sweep_once(Queue& q, DescentArgs d, unsigned blocks, int lanes) {
    for (int panel = 0; panel < k_; panel += kPanel) {
      const int end = std::min(panel + kPanel, k_);
      for (int first = panel; first < end; first += kGroup) {
        d.moves = panel_ + (first - panel) * stride_;
        q.launch(descend_group, dim3(blocks), kGroupThreads, sizeof(DescentShared), d, first);
        product(q, a_.h, first, kGroup, d.moves, gradient_, panel, end, end, 0, lanes, false);
      }
      product(q, a_.h, panel, end - panel, panel_, gradient_, 0, k_, panel, end - panel, lanes, false);
    }
  }

  const ccq_ldlq_args& a_;
  const int k_, n_;
  const bool screens_;
  const int keep_, tries_;
  const Chunks screened_, tried_, descended_;
  Arena arena_;
  size_t shared_end_ = 0;
  Best best_{};
  Lanes lanes_{};
  int *kept_ = nullptr, *place_ = nullptr, *counts_ = nullptr;
  uint8_t *picked_ = nullptr, *words_ = nullptr, *local_ = nullptr;
  BlockLanes* blocks_ = nullptr;
  int64_t stride_ = 0, block_capacity_ = 0;
  double* run_loss_ = nullptr;
  float *x_ = nullptr, *panel_ = nullptr, *weight_ = nullptr, *error_ = nullptr, *gradient_ = nullptr, *target_ = nullptr;
};

bool valid(const ccq_ldlq_args& a) {
  const int64_t tries = static_cast<int64_t>(a.high) - a.low + 1;
  if (a.n < 1 || a.n > (1 << 20) || a.k < kGroup || a.k % kGroup || a.k > (1 << 17)) return false;
  if (a.pairs < 1 || a.pairs > CCQ_LDLQ_PAIRS || a.candidates < 1 || a.candidates > 64) return false;
  return tries >= 1 && tries <= CCQ_LDLQ_SCALES && a.keep_pairs >= 1 && a.sweeps >= 0;
}

}  // namespace ccq_ldlq

using namespace ccq_ldlq;

extern "C" int64_t ccq_ldlq_stride(int64_t n) { return rounded(n, kTileLanes); }

extern "C" size_t ccq_ldlq_workspace(const ccq_ldlq_args* args) {
  if (!valid(*args)) return 0;
  const Search search(*args, nullptr);
  return search.fits() ? search.workspace() : 0;
}

extern "C" cudaError_t ccq_ldlq_transpose(const float* in, int64_t rows, int64_t columns, int64_t in_stride, float* out,
                                          int64_t out_stride, cudaStream_t stream) {
  Queue q(stream);
  q.launch(transpose<float, float>, dim3(pieces(columns, 32), pieces(rows, 32)), 256, 0, in, rows, columns, in_stride, out,
           out_stride);
  return q.error();
}

extern "C" cudaError_t ccq_ldlq_feed_back(const ccq_ldlq_args* args, cudaStream_t stream) {
  if (!valid(*args)) return cudaErrorInvalidValue;
  Search search(*args, args->workspace);
  if (!search.fits()) return cudaErrorInvalidValue;
  Queue q(stream);
  search.feed_back(q);
  return q.error();
}

extern "C" cudaError_t ccq_ldlq_descend(const ccq_ldlq_args* args, cudaStream_t stream) {
  if (!valid(*args)) return cudaErrorInvalidValue;
  Search search(*args, args->workspace);
  if (!search.fits()) return cudaErrorInvalidValue;
  Queue q(stream);
  search.descend(q);
  return q.error();
}
