// SPDX-License-Identifier: Apache-2.0
// The emulated GPU's memory, and the library functions that are not emulated.
#include <unistd.h>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
Machine machine;
}

namespace ccq_ldlq {
alignas(1024) thread_local unsigned char dynamic_shared[emulated::kMostShared];
}

namespace ccq_trellis_kernel {
alignas(1024) thread_local unsigned char dynamic_shared[emulated::kMostShared];
}

namespace ccq_calibrated_trellis {
alignas(1024) thread_local unsigned char dynamic_shared[emulated::kMostShared];
}

void emulated::poison_shared() {
  memset(ccq_ldlq::dynamic_shared, 0xFF, sizeof ccq_ldlq::dynamic_shared);
  memset(ccq_calibrated_trellis::dynamic_shared, 0xFF, sizeof ccq_calibrated_trellis::dynamic_shared);
  memset(ccq_trellis_kernel::dynamic_shared, 0xFF, sizeof ccq_trellis_kernel::dynamic_shared);
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  const char* limit = getenv("CCQ_EMULATE_MEMORY");
  if (limit && emulated::machine.memory_in_use + bytes > strtoull(limit, nullptr, 10)) return cudaErrorMemoryAllocation;
  const size_t page = sysconf(_SC_PAGESIZE), used = (bytes + 255) / 256 * 256, whole = (used + page - 1) / page * page;
  void* base = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return cudaErrorMemoryAllocation;
  char* end = static_cast<char*>(base) + whole;
  mprotect(end, page, PROT_NONE);
  *p = end - used;
  memset(*p, 0xFF, used);
  emulated::machine.memory_in_use += bytes;
  emulated::machine.allocations[*p] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  // Left unmapped for good: a late access is a crash.
  auto found = emulated::machine.allocations.find(p);
  if (found == emulated::machine.allocations.end()) return cudaErrorInvalidValue;
  const size_t page = sysconf(_SC_PAGESIZE), first = reinterpret_cast<size_t>(p) / page * page;
  mprotect(reinterpret_cast<void*>(first), reinterpret_cast<size_t>(p) - first + found->second, PROT_NONE);
  emulated::machine.memory_in_use -= found->second;
  emulated::machine.allocations.erase(found);
  return cudaSuccess;
}

extern "C" {
int ccq_device_count() { return 1; }
const char* ccq_error_text(int error) { return error == 2 ? "out of memory" : "invalid argument"; }
int ccq_encode_overlapped(const void*) { return cudaErrorInvalidValue; }
int ccq_encode_host(const void*, float*) { return cudaErrorInvalidValue; }
int ccq_dequant_host(const void*) { return cudaErrorInvalidValue; }
}
