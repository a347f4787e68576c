// SPDX-License-Identifier: Apache-2.0
// The ccq-2t encoder over host memory. The search takes several times as long as the copies, which therefore go one
// after the other.
#include <mutex>

#include "../common/held.h"
#include "trellis.h"

namespace {

constexpr int64_t kLeastRunBytes = int64_t{1} << 20;

using Buffer = ccq::HeldBuffer<>;

struct Held {
  ccq::TimedStream timed;
  Buffer weight, words, scales, supers, sums, workspace;

  size_t bytes() const {
    size_t sum = 0;
    for (const Buffer* b : {&weight, &words, &scales, &supers, &sums, &workspace}) sum += b->size;
    return sum;
  }
};

Held held;
std::mutex one_at_a_time;

class Run : ccq::Steps {
 public:
  explicit Run(const ccq_trellis_args& args) : a_(args), d_(args) {}

  cudaError_t run(float* kernel_milliseconds) {
    const size_t n = a_.n, k = a_.k;
    keep(held.timed.open());
    allocate();
    const cudaStream_t stream = held.timed.stream;
    if (ok()) keep(cudaMemcpyAsync(held.weight.data, a_.weight, n * k * 4, cudaMemcpyHostToDevice, stream));
    if (ok()) keep(cudaEventRecord(held.timed.begun, stream));
    if (ok()) keep(ccq_trellis(&d_, stream));
    if (ok()) keep(cudaEventRecord(held.timed.done, stream));
    fetch(a_.words, d_.words, n * (k / 4), stream);
    fetch(a_.scales, d_.scales, n * (k / 64), stream);
    fetch(a_.supers, d_.supers, n * 4, stream);
    fetch(a_.sums, d_.sums, n * 24, stream);
    return finish(held.timed, kernel_milliseconds);
  }

 private:
  template <typename T>
  T* take(Buffer& buffer, size_t bytes) {
    if (ok()) error_ = buffer.grow(bytes);
    return reinterpret_cast<T*>(buffer.data);
  }

  void allocate() {
    const size_t n = a_.n, k = a_.k;
    d_.weight = take<float>(held.weight, n * k * 4);
    d_.words = take<uint8_t>(held.words, n * (k / 4));
    d_.scales = take<uint8_t>(held.scales, n * (k / 64));
    d_.supers = take<float>(held.supers, n * 4);
    d_.sums = take<double>(held.sums, n * 24);
    while (ok()) {
      const size_t bytes = ccq_trellis_workspace(&d_);
      if (bytes == 0) {
        // Halved too often, if there was enough to begin with.
        error_ = d_.run_bytes == a_.run_bytes ? cudaErrorInvalidValue : cudaErrorMemoryAllocation;
        return;
      }
      error_ = held.workspace.grow(bytes);
      if (error_ != cudaErrorMemoryAllocation || d_.run_bytes / 2 < kLeastRunBytes) break;
      cudaGetLastError();  // not the next launch's
      error_ = cudaSuccess;
      d_.run_bytes /= 2;
    }
    d_.workspace = held.workspace.data;
  }

  const ccq_trellis_args& a_;
  ccq_trellis_args d_;  // the same on the device
};

}  // namespace

extern "C" cudaError_t ccq_trellis_host(const ccq_trellis_args* args, float* kernel_milliseconds) {
  if (ccq_trellis_workspace(args) == 0) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return Run(*args).run(kernel_milliseconds);
}

extern "C" size_t ccq_trellis_held_bytes(void) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return held.bytes();
}
