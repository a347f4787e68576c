// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA to run kernels on a processor, for tests: every thread of a block is a fiber, blocks run one after the
// other. Threads switch only at barriers and shuffles, forwards or (CCQ_EMULATE_REVERSED=1) backwards, so a missing
// barrier shows as a difference between the two orders. Asynchronous copies happen when they are waited for. Device
// memory is poisoned and ends at a page that must not be touched. Streams and events do nothing: all is in order.
//
// Compile the .cu files as C++ with -ffp-contract=off.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
typedef void* cudaStream_t;
typedef void* cudaEvent_t;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr int kWarpSize = 32;
constexpr size_t kStack = 64 << 10;
constexpr size_t kStaticShared = 48 << 10, kMostShared = 227 << 10;

enum class Stop { kShuffle, kBarrier, kEnd };

struct Copy {
  void* to;
  const void* from;
  size_t size, zeros;
};

struct Fiber {
  dim3 thread;
  Stop stop = Stop::kEnd;
  bool started = false;
  int shuffles = 0;
  ucontext_t context;
  jmp_buf resume;
  char* stack = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  uint64_t slots[2][1024];
  uint32_t columns[2][1024];
  jmp_buf scheduler;
  std::function<void()> kernel;
  std::map<const void*, int> shared_limits;
  size_t memory_in_use = 0;
  std::map<void*, size_t> allocations;
};

extern Machine machine;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated GPU: %s\n", what);
  abort();
}

inline bool reversed() {
  const char* set = getenv("CCQ_EMULATE_REVERSED");
  return set && *set == '1';
}

inline void stop(Stop why) {
  Fiber* me = machine.current;
  me->stop = why;
  if (_setjmp(me->resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
  machine.kernel();
  for (;;) stop(Stop::kEnd);
}

inline void run(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

// Runs a warp up to a barrier or its end: its threads must all stop at the same thing.
inline Stop run_warp(int warp, bool backwards) {
  for (;;) {
    for (int i = 0; i < kWarpSize; ++i) run(machine.fibers[warp * kWarpSize + (backwards ? kWarpSize - 1 - i : i)]);
    const Stop why = machine.fibers[warp * kWarpSize].stop;
    for (int i = 1; i < kWarpSize; ++i)
      if (machine.fibers[warp * kWarpSize + i].stop != why) fail("threads of a warp have parted");
    if (why != Stop::kShuffle) return why;
  }
}

inline void run_block(int threads, bool backwards) {
  for (int t = 0; t < threads; ++t) {
    Fiber& f = machine.fibers[t];
    f.thread = dim3(t, 0, 0), f.started = false, f.shuffles = 0;
    f.open.clear(), f.groups.clear();
  }
  const int warps = threads / kWarpSize;
  for (;;) {
    int ended = 0;
    for (int w = 0; w < warps; ++w) ended += run_warp(backwards ? warps - 1 - w : w, backwards) == Stop::kEnd;
    if (ended == warps) return;
    if (ended) fail("some warps ended where others wait at a barrier");
  }
}

void poison_shared();

inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> call) {
  const dim3 grid = config.gridDim;
  const int threads = config.blockDim.x;
  auto limit = machine.shared_limits.find(kernel);
  const size_t allowed = limit == machine.shared_limits.end() ? kStaticShared : limit->second;
  if (config.dynamicSmemBytes > allowed || threads % kWarpSize || threads > 1024 || threads < 1) return cudaErrorInvalidValue;
  if (grid.x < 1 || grid.y < 1 || grid.y > 65535 || grid.z != 1) return cudaErrorInvalidValue;
  if (machine.fibers.size() < 1024) {
    machine.fibers.resize(1024);
    for (Fiber& f : machine.fibers) f.stack = static_cast<char*>(malloc(kStack));
  }
  machine.kernel = std::move(call);
  gridDim = grid, blockDim = config.blockDim;
  const bool backwards = reversed();
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = backwards ? dim3(grid.x - 1 - x, grid.y - 1 - y, 0) : dim3(x, y, 0);
      poison_shared();
      run_block(threads, backwards);
    }
  return cudaSuccess;
}

template <typename T>
T shuffle(T value, int source_in_warp) {
  static_assert(sizeof(T) <= 8);
  Fiber* me = machine.current;
  uint64_t* slots = machine.slots[me->shuffles++ & 1];
  const int t = me->thread.x, base = t / kWarpSize * kWarpSize;
  memcpy(&slots[t], &value, sizeof value);
  stop(Stop::kShuffle);
  memcpy(&value, &slots[base + source_in_warp], sizeof value);
  return value;
}

// The bits of an integer as fp16; it must hold it.
inline uint32_t half_of_integer(int value) {
  const uint32_t sign = value < 0 ? 0x8000u : 0u, m = value < 0 ? -value : value;
  if (m == 0) return 0;
  int top = 31;
  while (!(m >> top)) --top;
  if (top > 15 || (top > 10 && m & ((1u << (top - 10)) - 1))) fail("an integer that fp16 does not hold");
  return sign | static_cast<uint32_t>(top + 15) << 10 | ((top > 10 ? m >> (top - 10) : m << (10 - top)) & 0x3FF);
}
// fp16 numbers that are integers.
inline float half_value(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31) - 25;
  const float size = bits & 0x7FFF ? ldexpf(static_cast<float>(1024 + (bits & 0x3FF)), exponent) : 0.0f;
  return bits & 0x8000 ? -size : size;
}
inline const float* half_values() {
  static const std::vector<float> all = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) values[bits] = half_value(bits);
    return values;
  }();
  return all.data();
}

// mma.m16n8k8 of fp16 with sums in float32: the fragments of PTX, one exchange for a warp.
inline void multiply_16x8x8(float* d, uint32_t low_rows, uint32_t high_rows, uint32_t columns) {
  Fiber* me = machine.current;
  const int parity = me->shuffles++ & 1, t = me->thread.x, base = t / kWarpSize * kWarpSize, lane = t % kWarpSize;
  machine.slots[parity][t] = static_cast<uint64_t>(high_rows) << 32 | low_rows;
  machine.columns[parity][t] = columns;
  stop(Stop::kShuffle);
  const float* value = half_values();
  for (int i = 0; i < 4; ++i) d[i] = 0;
  for (int k = 0; k < 4; ++k) {
    const uint64_t a = machine.slots[parity][base + lane / 4 * 4 + k];
    const uint32_t b[2] = {machine.columns[parity][base + lane % 4 * 8 + k], machine.columns[parity][base + lane % 4 * 8 + 4 + k]};
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        d[i] += value[a >> (32 * (i / 2) + 16 * half) & 0xFFFF] * value[b[i % 2] >> (16 * half) & 0xFFFF];
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::stop(emulated::Stop::kBarrier); }
inline void __syncwarp() { emulated::shuffle(0, 0); }
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width) {
  const int lane = threadIdx.x % emulated::kWarpSize;
  return emulated::shuffle(value, lane / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width) {
  const int lane = threadIdx.x % emulated::kWarpSize;
  if ((lane ^ mask) / width != lane / width) emulated::fail("a shuffle leaves its part of the warp");
  return emulated::shuffle(value, lane ^ mask);
}

inline unsigned __ballot_sync(unsigned, bool holds) {
  emulated::Fiber* me = emulated::machine.current;
  uint64_t* slots = emulated::machine.slots[me->shuffles++ & 1];
  const int t = threadIdx.x, base = t / emulated::kWarpSize * emulated::kWarpSize;
  slots[t] = holds;
  emulated::stop(emulated::Stop::kShuffle);
  unsigned all = 0;
  for (int i = 0; i < emulated::kWarpSize; ++i) all |= static_cast<unsigned>(slots[base + i]) << i;
  return all;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline int __float2int_rn(float a) { return static_cast<int>(rintf(a)); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline int __float_as_int(float v) { return static_cast<int>(__float_as_uint(v)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __vimin3_s32(int a, int b, int c) {
  const int low = a < b ? a : b;
  return low < c ? low : c;
}
inline int atomicMin(int* at, int value) {
  const int before = *at;
  if (value < before) *at = value;
  return before;
}
template <typename T>
T atomicOr(T* at, T bits) {
  const T before = *at;
  *at = before | bits;
  return before;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  return emulated::launch(*config, reinterpret_cast<const void*>(kernel), [=] { kernel(arguments...); });
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (static_cast<size_t>(bytes) > emulated::kMostShared) return cudaErrorInvalidValue;
  emulated::machine.shared_limits[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
inline cudaError_t cudaMallocHost(void** p, size_t bytes) {
  *p = malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* p) {
  free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = malloc(1);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = malloc(1);
  return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
