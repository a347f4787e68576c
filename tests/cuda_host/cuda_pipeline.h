// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies that happen only when they are waited for, so that a read too early sees what was there before.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros) {
  if (reinterpret_cast<uintptr_t>(to) % size || (zeros < size && reinterpret_cast<uintptr_t>(from) % size))
    emulated::fail("an asynchronous copy is not aligned");
  emulated::machine.current->open.push_back({to, from, size, zeros});
}
inline void __pipeline_commit() {
  emulated::Fiber* me = emulated::machine.current;
  me->groups.push_back(std::move(me->open));
  me->open.clear();
}
inline void __pipeline_wait_prior(size_t left) {
  emulated::Fiber* me = emulated::machine.current;
  for (; me->groups.size() > left; me->groups.pop_front())
    for (const emulated::Copy& c : me->groups.front()) {
      memcpy(c.to, c.from, c.size - c.zeros);
      memset(static_cast<char*>(c.to) + c.size - c.zeros, 0, c.zeros);
    }
}
