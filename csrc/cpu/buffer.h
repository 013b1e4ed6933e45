// Scratch memory. Fresh pages cost a page fault each, a tenth of a small CRF's time: what one call gives back the next
// takes, up to kKeptBytes in all, or a 32nd of the machine's memory where that is less.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace ribfast::cpu {

constexpr int64_t kKeptBytes = int64_t{512} << 20;

// Memory on a cache line's boundary; throws std::bad_alloc. `size` is set to what was given, `bytes` at least.
void* take_memory(int64_t bytes, int64_t& size);
void give_memory(void* memory, int64_t size);

// An array whose contents are not set.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (memory_ != nullptr) give_memory(memory_, size_);
  }

  // Room for `count`; what was there is lost where that is more than before.
  T* get(int64_t count) {
    const auto bytes = static_cast<int64_t>(count * sizeof(T));
    if (bytes > size_ || memory_ == nullptr) {
      Buffer().swap(*this);
      memory_ = static_cast<T*>(take_memory(bytes, size_));
    }
    return memory_;
  }
  T* data() const { return memory_; }

 private:
  void swap(Buffer& other) noexcept { std::swap(memory_, other.memory_), std::swap(size_, other.size_); }

  T* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace ribfast::cpu
