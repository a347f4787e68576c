// SPDX-License-Identifier: Apache-2.0
// Cuts one workspace into arrays; the same calls without a workspace count its bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <algorithm>

namespace ccq {

// Every array begins on a border of kAlignment bytes, if the workspace does.
class Arena {
 public:
  static constexpr size_t kAlignment = 256;

  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  // Room for `count` values; NULL where only bytes are counted.
  template <typename T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    most_ = std::max(most_, used_);
    return p;
  }

  // Bytes so far; back_to() gives free what was taken since.
  size_t used() const { return used_; }
  void back_to(size_t used) { used_ = used; }

  // Bytes that the workspace must have.
  size_t most() const { return most_; }

 private:
  char* base_;
  size_t used_ = 0, most_ = 0;
};

}  // namespace ccq
