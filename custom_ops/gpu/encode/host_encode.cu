// SPDX-License-Identifier: Apache-2.0
// The encoder over host memory with copies and kernel at the same time: channels go through two slots in turn, each with
// page-locked buffers, device buffers and a stream of its own. While one slot encodes, the host fills the other.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "../common/held.h"
#include "encode.h"

namespace {

constexpr size_t kSlotBytes = size_t{32} << 20;  // of float weights: a few waves of channels

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Results of some channels, one array behind the other; the same on both sides of the bus.
struct Results {
  uint16_t *words, *scales;
  float* supers;
  int32_t* chosen;
  double* sums;
  size_t bytes;

  Results(void* base, size_t n, size_t groups, size_t words_per_group) {
    char* next = static_cast<char*>(base);
    sums = take<double>(next, n * 3);
    supers = take<float>(next, n);
    chosen = take<int32_t>(next, n);
    scales = take<uint16_t>(next, n * groups);
    words = take<uint16_t>(next, n * groups * words_per_group);
    bytes = next - static_cast<char*>(base);
  }

 private:
  template <typename T>
  static T* take(char*& next, size_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += rounded(count * sizeof(T));
    return p;
  }
};

struct Slot {
  cudaStream_t stream = nullptr;
  ccq::HeldBuffer<true> host_in, host_out;
  ccq::HeldBuffer<false> weight, entries, out, workspace;
  size_t first = 0, count = 0;  // channels in flight
};

class Pipeline {
 public:
  explicit Pipeline(const ccq_encode_args& args) : a_(args), groups_(args.k / 64) {
    for (int b = 0; b < a_.layout.books && b < CCQ_ENCODE_BOOKS; ++b) entry_bytes_ += 8 * a_.layout.entries[b];
    entry_bytes_ *= a_.pairs;
    step_ = std::min<size_t>(a_.n, std::max<size_t>(1, kSlotBytes / (4 * a_.k)));
  }

  cudaError_t run(Slot* slots) {
    cudaError_t error = cudaSuccess;
    for (int s = 0; s < 2 && error == cudaSuccess; ++s) error = prepare(slots[s]);
    const size_t n = a_.n;
    for (size_t first = 0, i = 0; first < n && error == cudaSuccess; first += step_, ++i) {
      error = collect(slots[i % 2]);
      if (error == cudaSuccess) error = start(slots[i % 2], first, std::min(step_, n - first));
    }
    for (int s = 0; s < 2; ++s) {
      const cudaError_t last = collect(slots[s]);
      if (error == cudaSuccess) error = last;
    }
    return error;
  }

 private:
  cudaError_t prepare(Slot& s) {
    const size_t out = Results(nullptr, step_, groups_, a_.layout.words).bytes, in = step_ * a_.k * 4;
    cudaError_t error = s.stream ? cudaSuccess : cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = s.host_in.grow(in);
    if (error == cudaSuccess) error = s.host_out.grow(out);
    if (error == cudaSuccess) error = s.weight.grow(in);
    if (error == cudaSuccess) error = s.out.grow(out);
    if (error == cudaSuccess) error = s.entries.grow(entry_bytes_);
    if (error == cudaSuccess) error = s.workspace.grow(ccq_encode_workspace(a_.k, a_.pairs));
    if (error == cudaSuccess)
      error = cudaMemcpyAsync(s.entries.data, a_.entries, entry_bytes_, cudaMemcpyHostToDevice, s.stream);
    s.count = 0;
    return error;
  }

  cudaError_t start(Slot& s, size_t first, size_t count) {
    const size_t in = count * a_.k * 4;
    std::memcpy(s.host_in.data, a_.weight + first * a_.k, in);
    const Results device(s.out.data, count, groups_, a_.layout.words);
    ccq_encode_args d = a_;
    d.n = count;
    d.weight = reinterpret_cast<const float*>(s.weight.data);
    d.entries = reinterpret_cast<const int32_t*>(s.entries.data);
    d.words = device.words, d.scales = device.scales, d.supers = device.supers;
    d.chosen = device.chosen, d.sums = device.sums, d.workspace = s.workspace.data;
    cudaError_t error = cudaMemcpyAsync(s.weight.data, s.host_in.data, in, cudaMemcpyHostToDevice, s.stream);
    if (error == cudaSuccess) error = ccq_encode(&d, s.stream);
    if (error == cudaSuccess)
      error = cudaMemcpyAsync(s.host_out.data, s.out.data, device.bytes, cudaMemcpyDeviceToHost, s.stream);
    if (error == cudaSuccess) s.first = first, s.count = count;
    return error;
  }

  // Waits for the slot and puts its results where the caller wants them.
  cudaError_t collect(Slot& s) {
    if (!s.stream) return cudaSuccess;
    const cudaError_t error = cudaStreamSynchronize(s.stream);
    const size_t n = s.count, words = groups_ * a_.layout.words;
    s.count = 0;
    if (error != cudaSuccess || n == 0) return error;
    const Results host(s.host_out.data, n, groups_, a_.layout.words);
    std::memcpy(a_.words + s.first * words, host.words, n * words * 2);
    std::memcpy(a_.scales + s.first * groups_, host.scales, n * groups_ * 2);
    std::memcpy(a_.supers + s.first, host.supers, n * 4);
    std::memcpy(a_.chosen + s.first, host.chosen, n * 4);
    std::memcpy(a_.sums + 3 * s.first, host.sums, n * 24);
    return cudaSuccess;
  }

  const ccq_encode_args& a_;
  const size_t groups_;
  size_t entry_bytes_ = 0, step_ = 1;
};

}  // namespace

extern "C" cudaError_t ccq_encode_overlapped(const ccq_encode_args* args) {
  static std::mutex one_at_a_time;
  static Slot slots[2];
  const ccq_encode_args& a = *args;
  if (a.n < 1 || a.k < 64 || a.k % 64 || a.pairs < 1 || a.layout.words < 1) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return Pipeline(a).run(slots);
}
