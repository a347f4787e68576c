// SPDX-License-Identifier: Apache-2.0
// Encoder and decoder over host memory, for callers without a framework: allocate, copy, run, copy back.
#include <vector>

#include "dequant.h"
#include "../encode/encode.h"

namespace {

// Device memory of one call; the first error sticks and makes the rest no-ops.
class Session {
 public:
  ~Session() {
    for (void* p : owned_) cudaFree(p);
    if (stream_) cudaStreamDestroy(stream_);
  }
  cudaError_t error() const { return error_; }
  cudaStream_t stream() {
    if (!stream_) check(cudaStreamCreate(&stream_));
    return stream_;
  }
  void check(cudaError_t e) {
    if (error_ == cudaSuccess) error_ = e;
  }

  template <typename T>
  T* allocate(size_t bytes) {
    void* p = nullptr;
    if (error_ == cudaSuccess) check(cudaMalloc(&p, bytes ? bytes : 1));
    if (p) owned_.push_back(p);
    return static_cast<T*>(p);
  }
  template <typename T>
  T* upload(const T* host, size_t bytes) {
    if (!host) return nullptr;
    T* p = allocate<T>(bytes);
    if (error_ == cudaSuccess) check(cudaMemcpyAsync(p, host, bytes, cudaMemcpyHostToDevice, stream()));
    return p;
  }
  void download(void* host, const void* device, size_t bytes) {
    if (error_ == cudaSuccess) check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream()));
  }
  void wait() {
    if (error_ == cudaSuccess) check(cudaStreamSynchronize(stream()));
  }

 private:
  cudaError_t error_ = cudaSuccess;
  cudaStream_t stream_ = nullptr;
  std::vector<void*> owned_;
};

}  // namespace

extern "C" const char* ccq_error_text(cudaError_t error) { return cudaGetErrorString(error); }

extern "C" int ccq_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

extern "C" cudaError_t ccq_encode_host(const ccq_encode_args* args, float* kernel_milliseconds) {
  const ccq_encode_args& a = *args;
  const size_t groups = a.k / 64, n = a.n;
  size_t entries = 0;
  for (int b = 0; b < a.layout.books && b < CCQ_ENCODE_BOOKS; ++b) entries += a.layout.entries[b];
  Session s;
  ccq_encode_args d = a;
  d.weight = s.upload(a.weight, n * a.k * sizeof(float));
  d.entries = s.upload(a.entries, a.pairs * entries * 8);
  d.words = s.allocate<uint16_t>(n * groups * a.layout.words * 2);
  d.scales = s.allocate<uint16_t>(n * groups * 2);
  d.supers = s.allocate<float>(n * 4);
  d.chosen = s.allocate<int32_t>(n * 4);
  d.sums = s.allocate<double>(n * 3 * 8);
  d.workspace = s.allocate<void>(ccq_encode_workspace(a.k, a.pairs));
  cudaEvent_t start, stop;
  s.check(cudaEventCreate(&start));
  s.check(cudaEventCreate(&stop));
  if (s.error() != cudaSuccess) return s.error();
  s.check(cudaEventRecord(start, s.stream()));
  s.check(ccq_encode(&d, s.stream()));
  s.check(cudaEventRecord(stop, s.stream()));
  s.download(a.words, d.words, n * groups * a.layout.words * 2);
  s.download(a.scales, d.scales, n * groups * 2);
  s.download(a.supers, d.supers, n * 4);
  s.download(a.chosen, d.chosen, n * 4);
  s.download(a.sums, d.sums, n * 3 * 8);
  s.wait();
  float milliseconds = 0;
  if (s.error() == cudaSuccess) s.check(cudaEventElapsedTime(&milliseconds, start, stop));
  if (kernel_milliseconds) *kernel_milliseconds = milliseconds;
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return s.error();
}

extern "C" cudaError_t ccq_dequant_host(const ccq_dequant_args* args) {
  const ccq_dequant_args& a = *args;
  const bool wint2 = a.format == CCQ_WINT2;
  const size_t group_bytes = wint2 ? 16 : a.format == CCQ_CCQ25 ? 20 : 22;
  const size_t item = a.runtime == CCQ_RUNTIME_FP32 ? 4 : 2;
  Session s;
  ccq_dequant_args d = a;
  d.quant_weight = s.upload(static_cast<const char*>(a.quant_weight), a.k / 64 * group_bytes * a.n);
  d.super_scales = s.upload(a.super_scales, a.n * 2);
  if (wint2) {
    d.weight_scale = s.upload(a.weight_scale, a.k / 128 * a.n);
    d.code_scale = s.upload(a.code_scale, a.n * 4);
    d.code_zp = s.upload(a.code_zp, a.n * 4);
  }
  d.out = s.allocate<void>(a.k * a.n * item);
  if (s.error() != cudaSuccess) return s.error();
  s.check(ccq_dequant(&d, s.stream()));
  s.download(a.out, d.out, a.k * a.n * item);
  s.wait();
  return s.error();
}
