// Uninitialised working memory, aligned to a cache line.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace emocore {

class Scratch {
  public:
    explicit Scratch(int64_t bytes)
        : data_(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64 + 64)) {
        if (!data_) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* data() const { return data_; }

  private:
    void* data_;
};

}  // namespace emocore
