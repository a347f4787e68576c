// SPDX-License-Identifier: Apache-2.0
// What the encoders over host memory keep between calls: buffers, a stream and its events.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>

namespace ccq {

// Page-locking and freeing memory stall the device, so buffers live as long as the process and only grow.
template <bool kPinned = false>
struct HeldBuffer {
  char* data = nullptr;
  size_t size = 0;

  cudaError_t grow(size_t bytes) {
    if (bytes <= size) return cudaSuccess;
    if (data) kPinned ? cudaFreeHost(data) : cudaFree(data);
    data = nullptr, size = 0;
    void* found = nullptr;
    const cudaError_t error = kPinned ? cudaMallocHost(&found, bytes) : cudaMalloc(&found, bytes);
    if (error == cudaSuccess) data = static_cast<char*>(found), size = bytes;
    return error;
  }
};

// A stream on which kernels are timed.
struct TimedStream {
  cudaStream_t stream = nullptr;
  cudaEvent_t begun = nullptr, done = nullptr;

  cudaError_t open() {
    cudaError_t error = stream ? cudaSuccess : cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (cudaEvent_t* event : {&begun, &done})
      if (error == cudaSuccess && !*event) error = cudaEventCreate(event);
    return error;
  }
};

// A call's steps: the first error sticks, and is the call's.
class Steps {
 protected:
  bool ok() const { return error_ == cudaSuccess; }
  void keep(cudaError_t error) {
    if (ok()) error_ = error;
  }
  void fetch(void* host, const void* device, size_t bytes, cudaStream_t stream) {
    if (ok()) error_ = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream);
  }
  // The end of a call; also after an error, since nothing may still write into the caller's arrays.
  cudaError_t finish(const TimedStream& timed, float* milliseconds) {
    if (timed.stream) keep(cudaStreamSynchronize(timed.stream));
    if (ok() && milliseconds) keep(cudaEventElapsedTime(milliseconds, timed.begun, timed.done));
    if (!ok()) cudaGetLastError();  // told here; not to be found by the next launch
    return error_;
  }

  cudaError_t error_ = cudaSuccess;
};

}  // namespace ccq
