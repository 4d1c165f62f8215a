// Uninitialised working memory, aligned to a cache line.
#pragma once
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <new>

namespace emocore {

// Fresh memory costs a fault a page: fewer of them, where the system has large pages.    data: at a page.
inline void want_large_pages(void* data, size_t size) {
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);
#endif
}

class Scratch {
  public:
    explicit Scratch(int64_t bytes) {
        const size_t align = bytes >= 2 * LARGE_PAGE ? LARGE_PAGE : 64;
        const size_t size = (static_cast<size_t>(bytes) + align) / align * align;
        data_ = std::aligned_alloc(align, size);
        if (!data_) throw std::bad_alloc();
        if (align == LARGE_PAGE) want_large_pages(data_, size);
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* data() const { return data_; }

  private:
    static constexpr int64_t LARGE_PAGE = 2 << 20;

    void* data_;
};

}  // namespace emocore
