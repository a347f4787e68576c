// SPDX-License-Identifier: Apache-2.0
// The calibrated search over host memory: matrices go through two page-locked buffers in turn and are transposed on the
// device. The matrix that only the second half needs travels while the first half runs.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "../common/arena.h"
#include "../common/held.h"
#include "ldlq.h"

namespace {

constexpr size_t kSlabBytes = size_t{32} << 20;
constexpr int64_t kLeastRunBytes = int64_t{16} << 20;

template <bool kPinned>
using Buffer = ccq::HeldBuffer<kPinned>;

struct Slab {
  Buffer<true> host;
  Buffer<false> device;
  cudaEvent_t done = nullptr;
};

enum { kStart, kUploaded, kBegun, kScreened, kFedBack, kComplete, kDescended, kOut, kEvents };

struct Held {
  cudaStream_t work = nullptr, copies = nullptr;
  cudaEvent_t events[kEvents] = {};
  Slab slabs[2];
  Buffer<false> weight, h, feedback, small, out, workspace;

  size_t bytes() const {
    size_t sum = slabs[0].device.size + slabs[1].device.size;
    for (const Buffer<false>* b : {&weight, &h, &feedback, &small, &out, &workspace}) sum += b->size;
    return sum;
  }
};

Held held;
std::mutex one_at_a_time;

class Run {
 public:
  explicit Run(const ccq_ldlq_args& args) : a_(args), d_(args) {}

  cudaError_t run(float* milliseconds) {
    open();
    allocate();
    record(kStart, held.copies);
    upload_small();
    transposed(a_.weight, a_.n, a_.k, held.weight, ccq_ldlq_stride(a_.n));
    transposed(a_.feedback, a_.k, a_.k, held.feedback, a_.k);
    record(kUploaded, held.copies);
    wait(kUploaded);
    record(kBegun, held.work);
    d_.screened = held.events[kScreened];
    if (ok()) error_ = ccq_ldlq_feed_back(&d_, held.work);
    record(kFedBack, held.work);
    if (a_.sweeps) transposed(a_.h, a_.k, a_.k, held.h, a_.k);
    record(kComplete, held.copies);
    wait(kComplete);
    if (ok()) error_ = ccq_ldlq_descend(&d_, held.work);
    record(kDescended, held.work);
    download();
    record(kOut, held.work);
    // Also after an error: nothing may still write into buffers of the next call.
    for (cudaStream_t stream : {held.copies, held.work})
      if (stream) keep(cudaStreamSynchronize(stream));
    if (!ok()) cudaGetLastError();  // told here; not to be found by the next launch
    if (milliseconds && ok()) {
      const int from[5] = {kStart, kBegun, kScreened, kFedBack, kDescended};
      const int to[5] = {kUploaded, kScreened, kFedBack, kDescended, kOut};
      for (int i = 0; i < 5; ++i) keep(cudaEventElapsedTime(milliseconds + i, held.events[from[i]], held.events[to[i]]));
    }
    return error_;
  }

 private:
  bool ok() const { return error_ == cudaSuccess; }
  void keep(cudaError_t error) {
    if (ok()) error_ = error;
  }
  void record(int event, cudaStream_t stream) {
    if (ok()) error_ = cudaEventRecord(held.events[event], stream);
  }
  void wait(int event) {
    if (ok()) error_ = cudaStreamWaitEvent(held.work, held.events[event], 0);
  }

  void open() {
    for (cudaStream_t* stream : {&held.work, &held.copies})
      if (ok() && !*stream) error_ = cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
    for (cudaEvent_t& event : held.events)
      if (ok() && !event) error_ = cudaEventCreate(&event);
    for (Slab& slab : held.slabs)
      if (ok() && !slab.done) error_ = cudaEventCreateWithFlags(&slab.done, cudaEventDisableTiming);
  }

  // The small arrays that are sent, and those that come back; NULL, and counted, without a base.
  void take_small(ccq::Arena& arena) {
    const int64_t blocks = a_.k / 4 * 16;
    d_.d_root = arena.take<float>(blocks);
    d_.h_root = arena.take<float>(blocks);
    d_.h_inverse = arena.take<float>(blocks);
    d_.books = arena.take<float>(a_.pairs * int64_t{1024});
    d_.supers = arena.take<float>(a_.candidates * a_.n);
  }
  void take_out(ccq::Arena& arena) {
    d_.words = arena.take<uint16_t>(a_.n * (a_.k / 4));
    d_.scales = arena.take<uint16_t>(a_.n * (a_.k / 64));
    d_.found_supers = arena.take<float>(a_.n);
    d_.found_pairs = arena.take<int32_t>(a_.n);
    d_.loss = arena.take<double>(a_.n);
  }
  void give(Buffer<false>& buffer, void (Run::*take)(ccq::Arena&)) {
    ccq::Arena counted(nullptr);
    (this->*take)(counted);
    if (ok()) error_ = buffer.grow(counted.most());
    ccq::Arena arena(buffer.data);
    if (ok()) (this->*take)(arena);
  }

  void allocate() {
    const size_t n = a_.n, k = a_.k;
    for (Slab& slab : held.slabs) {
      if (ok()) error_ = slab.host.grow(std::max(kSlabBytes, k * 4));
      if (ok()) error_ = slab.device.grow(std::max(kSlabBytes, k * 4));
    }
    if (ok()) error_ = held.weight.grow(k * ccq_ldlq_stride(n) * 4);
    if (ok()) error_ = held.feedback.grow(k * k * 4);
    if (ok() && a_.sweeps) error_ = held.h.grow(k * k * 4);
    give(held.small, &Run::take_small);
    give(held.out, &Run::take_out);
    if (!ok()) return;
    while (true) {
      const size_t bytes = ccq_ldlq_workspace(&d_);
      error_ = bytes ? held.workspace.grow(bytes) : cudaErrorInvalidValue;
      if (error_ != cudaErrorMemoryAllocation || d_.run_bytes / 2 < kLeastRunBytes) break;
      cudaGetLastError();  // not the next launch's
      d_.run_bytes /= 2;
    }
    if (!ok()) return;
    d_.weight = reinterpret_cast<const float*>(held.weight.data);
    d_.feedback = reinterpret_cast<const float*>(held.feedback.data);
    d_.h = reinterpret_cast<const float*>(held.h.data);
    d_.workspace = held.workspace.data;
  }

  void upload(const float* device, const float* host, size_t count) {
    if (ok()) error_ = cudaMemcpyAsync(const_cast<float*>(device), host, count * 4, cudaMemcpyHostToDevice, held.copies);
  }
  void upload_small() {
    const size_t blocks = a_.k / 4 * 16;
    upload(d_.d_root, a_.d_root, blocks);
    upload(d_.h_root, a_.h_root, blocks);
    upload(d_.h_inverse, a_.h_inverse, blocks);
    upload(d_.books, a_.books, a_.pairs * size_t{1024});
    upload(d_.supers, a_.supers, a_.candidates * a_.n);
  }

  // host [rows, columns] -> device [columns, stride].
  void transposed(const float* host, int64_t rows, int64_t columns, Buffer<false>& to, int64_t stride) {
    const int64_t most = std::max<int64_t>(1, kSlabBytes / 4 / columns);
    for (int64_t row = 0; row < rows && ok(); row += most, next_ ^= 1) {
      Slab& slab = held.slabs[next_];
      const int64_t count = std::min(most, rows - row);
      const size_t bytes = count * columns * 4;
      error_ = cudaEventSynchronize(slab.done);  // at once where it was never recorded
      if (!ok()) return;
      std::memcpy(slab.host.data, host + row * columns, bytes);
      error_ = cudaMemcpyAsync(slab.device.data, slab.host.data, bytes, cudaMemcpyHostToDevice, held.copies);
      if (ok())
        error_ = ccq_ldlq_transpose(reinterpret_cast<const float*>(slab.device.data), count, columns, columns,
                                    reinterpret_cast<float*>(to.data) + row, stride, held.copies);
      if (ok()) error_ = cudaEventRecord(slab.done, held.copies);
    }
  }

  template <typename T>
  void fetch(T* host, const T* device, size_t count) {
    if (ok()) error_ = cudaMemcpyAsync(host, device, count * sizeof(T), cudaMemcpyDeviceToHost, held.work);
  }
  void download() {
    const size_t n = a_.n, k = a_.k;
    fetch(a_.words, d_.words, n * (k / 4));
    fetch(a_.scales, d_.scales, n * (k / 64));
    fetch(a_.found_supers, d_.found_supers, n);
    fetch(a_.found_pairs, d_.found_pairs, n);
    fetch(a_.loss, d_.loss, n);
  }

  const ccq_ldlq_args& a_;
  ccq_ldlq_args d_;  // the same on the device
  int next_ = 0;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

extern "C" cudaError_t ccq_ldlq_host(const ccq_ldlq_args* args, float milliseconds[5]) {
  if (ccq_ldlq_workspace(args) == 0) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return Run(*args).run(milliseconds);
}

extern "C" size_t ccq_ldlq_held_bytes() {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return held.bytes();
}
