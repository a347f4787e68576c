// SPDX-License-Identifier: Apache-2.0
// The data-free encoder on the GPU: the same words, scales and sums as custom_ops/cpu/encode.h, bit for bit.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  CCQ_ENCODE_VECTORS = 32,   // vectors of a group
  CCQ_ENCODE_BOOKS = 2,      // code books of a pair
  CCQ_ENCODE_ENTRIES = 1024, // entries of all books of the kept pairs
  CCQ_ENCODE_KAPPAS = 8,
  CCQ_ENCODE_BATCH = 8,      // ratios tried for a group
  CCQ_ENCODE_KEEP = 4,       // pairs that survive the screening
  CCQ_ENCODE_PAIRS = 256
};

// How a group of 64 rows is cut into words (encode.h of the CPU, its lane sets spread out).
struct ccq_encode_layout {
  int vectors;               // at most 32; up to 16 of them share a half warp
  struct {
    uint8_t book, first, dims, word, shift;  // rows first .. first + dims; index at `shift` of word
  } vector[CCQ_ENCODE_VECTORS];
  int books;                 // books of one pair, one behind the other
  int entries[CCQ_ENCODE_BOOKS];  // powers of two
  int words, fraction, state_min, state_max, remainder_shift, scale_max;
};

struct ccq_encode_recipe {
  double nominal;
  double kappas[CCQ_ENCODE_KAPPAS];
  int kappa_count;
  int window_low, window_high;  // local scales around the nominal one ...
  double ratios[CCQ_ENCODE_BATCH];
  int ratio_count;              // ... or, where this is not 0, multiples of it
  int refits, keep_pairs;
};

struct ccq_encode_args {
  const float* weight;       // device [n, k], 64 | k, finite, 16-byte aligned
  int64_t n, k;
  struct ccq_encode_layout layout;
  struct ccq_encode_recipe recipe;
  // device int32 [pairs, sum of entries, 2]: four int8 states, the first lowest; -(|c|^2 << fraction - 1).
  const int32_t* entries;
  int pairs;
  uint16_t* words;           // device [n, k/64, words]
  uint16_t* scales;          // device [n, k/64]
  float* supers;             // device [n]
  int32_t* chosen;           // device [n]
  double* sums;              // device [n, 3]: sum w^2, sum w*w', sum w'^2
  void* workspace;           // ccq_encode_workspace(k, pairs) bytes, 256-byte aligned
};

// Depends on the device in use (its number of multiprocessors).
size_t ccq_encode_workspace(int64_t k, int pairs);

// One kernel on `stream`; never synchronizes or allocates.
// cudaErrorInvalidValue: a shape or count out of range.
cudaError_t ccq_encode(const struct ccq_encode_args* args, cudaStream_t stream);

// All pointers of `args` are host memory here (workspace unused): copies, encodes, copies back, one after the other.
cudaError_t ccq_encode_host(const struct ccq_encode_args* args, float* kernel_milliseconds);

// The same with copies and kernels overlapped, in bounded memory (about 70 MB on either side for any n). One call at a
// time; page-locked and device buffers stay for the next one. One device a process: the one in use at the first call.
cudaError_t ccq_encode_overlapped(const struct ccq_encode_args* args);

const char* ccq_error_text(cudaError_t error);

// Usable GPUs; 0 without a driver.
int ccq_device_count(void);

#ifdef __cplusplus
}
#endif
