#include "slots.h"

#include <sys/mman.h>

#include <new>
#include <stdexcept>

#include "driver.h"

namespace emocore {

Slots::Slots(int count, int64_t bytes) : bytes_(bytes), generations_(count) {
    const size_t size = static_cast<size_t>(count) * bytes;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef __linux__
    madvise(memory, size, MADV_HUGEPAGE);
    madvise(memory, size, MADV_DONTFORK);  // a child has no business here, and need not copy it
#endif
    memory_ = static_cast<char*>(memory);
    for (int slot = count; slot--;) free_.push_back(slot);
}

Slots::~Slots() {
    if (pinned_by_) pinned_by_->cuMemHostUnregister(memory_);
    munmap(memory_, generations_.size() * static_cast<size_t>(bytes_));
}

void Slots::pin() {
    if (pinned_by_) return;
    const Driver& driver = need_driver();
    const size_t size = generations_.size() * static_cast<size_t>(bytes_);
    driver.check(driver.cuMemHostRegister_v2(memory_, size, abi::PORTABLE),
                 "cuMemHostRegister of a ring's slots", "",
                 "Make the ring smaller, or append the rows' .cpu().");
    pinned_by_ = &driver;
}

Lease Slots::take() {
    const int slot = free_.back();
    free_.pop_back();
    return {slot, ++generations_[slot]};
}

void Slots::give(Lease lease) {
    if (!lease || !holds(lease)) throw std::logic_error("a slot of the ring was given back twice");
    ++generations_[lease.slot];
    free_.push_back(lease.slot);
}

}  // namespace emocore
