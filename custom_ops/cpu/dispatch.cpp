// SPDX-License-Identifier: Apache-2.0
// Picks the fastest build of the score loop that this processor can run.
#include <cstring>

#include "search.h"

namespace ccq {
namespace {

#if defined(__x86_64__) || defined(__i386__)
bool runs_avx2() { return __builtin_cpu_supports("avx2"); }
bool runs_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
bool runs_vnni() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
bool runs_vnni() { return false; }
#endif

}  // namespace

const Kernels* pick_kernels(const char* name) {
  const Kernels* usable[] = {runs_vnni() ? kernels_avx512vnni() : nullptr,
                             runs_avx512() ? kernels_avx512() : nullptr,
                             runs_avx2() ? kernels_avx2() : nullptr, kernels_plain()};
  for (const Kernels* k : usable)
    if (k && (!std::strcmp(name, "auto") || !std::strcmp(name, k->name))) return k;
  return nullptr;
}

}  // namespace ccq
