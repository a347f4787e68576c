// SPDX-License-Identifier: Apache-2.0
// The calibrated ccq-2t encoder over host memory. The search takes many times as long as the copies, which therefore go
// one after the other.
#include <mutex>

#include "../common/held.h"
#include "trellis_ldlq.h"

namespace {

struct Held {
  ccq::TimedStream timed;
  ccq::HeldBuffer<> in, out, workspace;
};

Held held;
std::mutex one_at_a_time;

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

class Run : ccq::Steps {
 public:
  explicit Run(const ccq_trellis_ldlq_args& args) : a_(args), d_(args) {}

  cudaError_t run(float* kernel_milliseconds) {
    keep(held.timed.open());
    const cudaStream_t stream = held.timed.stream;
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
    if (ok()) keep(cudaEventRecord(held.timed.begun, stream));
    if (ok()) keep(ccq_trellis_ldlq(&d_, stream));
    if (ok()) keep(cudaEventRecord(held.timed.done, stream));
    const size_t n = a_.n, k = a_.k;
    fetch(a_.words, d_.words, n * (k / 4), stream);
    fetch(a_.scales, d_.scales, n * (k / 64), stream);
    fetch(a_.found_supers, d_.found_supers, n * 4, stream);
    fetch(a_.loss, d_.loss, n * 8, stream);
    return finish(held.timed, kernel_milliseconds);
  }

 private:
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
    if (ok()) keep(cudaMemcpyAsync(at, host, count * 4, cudaMemcpyHostToDevice, held.timed.stream));
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

  const ccq_trellis_ldlq_args& a_;
  ccq_trellis_ldlq_args d_;  // the same on the device
  size_t in_ = 0, out_ = 0;
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
