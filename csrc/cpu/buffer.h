// Memory for one computation.
#pragma once

#include <cstdint>
#include <memory>

namespace m2d::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Uninitialised memory: every stage writes before it reads.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(size > 0 ? new T[size] : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

}  // namespace m2d::cpu
