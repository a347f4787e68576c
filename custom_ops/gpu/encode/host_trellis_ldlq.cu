// SPDX-License-Identifier: Apache-2.0
// The calibrated ccq-2t encoder over host memory. The search takes many times as long as the copies, which therefore go
// one after the other.
#include <mutex>

#include "trellis_ldlq.h"

namespace {

// Freeing memory stalls the device, so buffers live as long as the process and only grow.
struct Buffer {
  char* data = nullptr;
  size_t size = 0;

  cudaError_t grow(size_t bytes) {
    if (bytes <= size) return cudaSuccess;
    if (data) cudaFree(data);
    data = nullptr, size = 0;
    void* found = nullptr;
    const cudaError_t error = cudaMalloc(&found, bytes);
    if (error == cudaSuccess) data = static_cast<char*>(found), size = bytes;
    return error;
  }
};

struct Held {
  cudaStream_t stream = nullptr;
  cudaEvent_t begun = nullptr, done = nullptr;
  Buffer in, out, workspace;
};

Held held;
std::mutex one_at_a_time;

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

class Run {
 public:
  explicit Run(const ccq_trellis_ldlq_args& args) : a_(args), d_(args) {}

  cudaError_t run(float* kernel_milliseconds) {
    if (!held.stream) keep(cudaStreamCreateWithFlags(&held.stream, cudaStreamNonBlocking));
    for (cudaEvent_t* event : {&held.begun, &held.done})
      if (ok() && !*event) keep(cudaEventCreate(event));
    inputs(false);
    outputs();
    if (ok()) keep(held.in.grow(in_));
    if (ok()) keep(held.out.grow(out_));
    if (ok()) keep(held.workspace.grow(ccq_trellis_ldlq_workspace(&a_)));
    if (ok()) {
      in_ = out_ = 0;
      inputs(true);
      outputs();
      d_.workspace = held.workspace.data;
    }
    if (ok()) keep(cudaEventRecord(held.begun, held.stream));
    if (ok()) keep(ccq_trellis_ldlq(&d_, held.stream));
    if (ok()) keep(cudaEventRecord(held.done, held.stream));
    const size_t n = a_.n, k = a_.k;
    fetch(a_.words, d_.words, n * (k / 4));
    fetch(a_.scales, d_.scales, n * (k / 64));
    fetch(a_.found_supers, d_.found_supers, n * 4);
    fetch(a_.loss, d_.loss, n * 8);
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

  // Counts the bytes of all inputs; with `copies` also gives them their places and copies them.
  void inputs(bool copies) {
    const size_t n = a_.n, k = a_.k, groups = k / 64, rows = CCQ_TRELLIS_WINDOW;
    input(d_.weight, a_.weight, n * k, copies);
    input(d_.supers, a_.supers, a_.candidates * n, copies);
    factors(d_.all, a_.all, k * k, k / 4, copies);
    if (!a_.sweeps) return;
    input(d_.h, a_.h, k * k, copies);
    factors(d_.windows, a_.windows, groups * rows * rows, groups * rows / 4, copies);
    input(d_.inverse, a_.inverse, groups * rows * rows, copies);
  }
  void factors(ccq_trellis_factors& device, const ccq_trellis_factors& host, size_t m, size_t blocks, bool copies) {
    input(device.m, host.m, m, copies);
    input(device.root, host.root, blocks * 16, copies);
    input(device.unit, host.unit, blocks, copies);
    input(device.ratio, host.ratio, blocks, copies);
    input(device.spread, host.spread, blocks, copies);
  }
  void input(const float*& device, const float* host, size_t count, bool copies) {
    char* at = held.in.data + in_;
    in_ += rounded(count * 4);
    if (!copies) return;
    device = reinterpret_cast<const float*>(at);
    if (ok()) keep(cudaMemcpyAsync(at, host, count * 4, cudaMemcpyHostToDevice, held.stream));
  }

  void outputs() {
    const size_t n = a_.n, k = a_.k;
    output(d_.words, n * (k / 4));
    output(d_.scales, n * (k / 64));
    output(d_.found_supers, n);
    output(d_.loss, n);
  }
  template <typename T>
  void output(T*& device, size_t count) {
    device = reinterpret_cast<T*>(held.out.data + out_);
    out_ += rounded(count * sizeof(T));
  }

  void fetch(void* host, const void* device, size_t bytes) {
    if (ok()) error_ = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, held.stream);
  }

  const ccq_trellis_ldlq_args& a_;
  ccq_trellis_ldlq_args d_;  // the same on the device
  size_t in_ = 0, out_ = 0;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

extern "C" cudaError_t ccq_trellis_ldlq_host(const ccq_trellis_ldlq_args* args, float* kernel_milliseconds) {
  if (ccq_trellis_ldlq_workspace(args) == 0) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return Run(*args).run(kernel_milliseconds);
}

extern "C" size_t ccq_trellis_ldlq_held_bytes(void) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return held.in.size + held.out.size + held.workspace.size;
}
