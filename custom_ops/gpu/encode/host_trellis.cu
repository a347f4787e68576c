// SPDX-License-Identifier: Apache-2.0
// The ccq-2t encoder over host memory. The search takes several times as long as the copies, which therefore go one
// after the other.
#include <mutex>

#include "trellis.h"

namespace {

constexpr int64_t kLeastRunBytes = int64_t{1} << 20;

// Freeing memory stalls the device, so buffers live as long as the process and only grow.
struct Buffer {
  void* data = nullptr;
  size_t size = 0;

  cudaError_t grow(size_t bytes) {
    if (bytes <= size) return cudaSuccess;
    if (data) cudaFree(data);
    data = nullptr, size = 0;
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaSuccess) size = bytes;
    return error;
  }
};

struct Held {
  cudaStream_t stream = nullptr;
  cudaEvent_t begun = nullptr, done = nullptr;
  Buffer weight, words, scales, supers, sums, workspace;

  size_t bytes() const {
    size_t sum = 0;
    for (const Buffer* b : {&weight, &words, &scales, &supers, &sums, &workspace}) sum += b->size;
    return sum;
  }
};

Held held;
std::mutex one_at_a_time;

class Run {
 public:
  explicit Run(const ccq_trellis_args& args) : a_(args), d_(args) {}

  cudaError_t run(float* kernel_milliseconds) {
    const size_t n = a_.n, k = a_.k;
    if (!held.stream) keep(cudaStreamCreateWithFlags(&held.stream, cudaStreamNonBlocking));
    for (cudaEvent_t* event : {&held.begun, &held.done})
      if (ok() && !*event) keep(cudaEventCreate(event));
    allocate();
    if (ok()) keep(cudaMemcpyAsync(held.weight.data, a_.weight, n * k * 4, cudaMemcpyHostToDevice, held.stream));
    if (ok()) keep(cudaEventRecord(held.begun, held.stream));
    if (ok()) keep(ccq_trellis(&d_, held.stream));
    if (ok()) keep(cudaEventRecord(held.done, held.stream));
    fetch(a_.words, d_.words, n * (k / 4));
    fetch(a_.scales, d_.scales, n * (k / 64));
    fetch(a_.supers, d_.supers, n * 4);
    fetch(a_.sums, d_.sums, n * 24);
    // Also after an error: nothing may still write into the caller's arrays.
    if (held.stream) keep(cudaStreamSynchronize(held.stream));
    if (ok() && kernel_milliseconds) keep(cudaEventElapsedTime(kernel_milliseconds, held.begun, held.done));
    if (!ok()) cudaGetLastError();  // told here; not to be found by the next launch
    return error_;
  }

 private:
  bool ok() const { return error_ == cudaSuccess; }
  void keep(cudaError_t error) {
    if (ok()) error_ = error;
  }

  template <typename T>
  T* take(Buffer& buffer, size_t bytes) {
    if (ok()) error_ = buffer.grow(bytes);
    return static_cast<T*>(buffer.data);
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

  void fetch(void* host, const void* device, size_t bytes) {
    if (ok()) error_ = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, held.stream);
  }

  const ccq_trellis_args& a_;
  ccq_trellis_args d_;  // the same on the device
  cudaError_t error_ = cudaSuccess;
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
