#include "pool.h"

namespace emocore {

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
}

void Pool::parallel(void (*work)(void*), void* context, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return work(context);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        while (static_cast<int>(helpers_.size()) < threads - 1) helpers_.emplace_back([this] { serve(); });
        work_ = work;
        context_ = context;
        seats_ = threads - 1;
    }
    wake_.notify_all();
    work(context);
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // no latecomers: the context lives on the caller's stack
    idle_.wait(lock, [this] { return working_ == 0; });
}

void Pool::serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return closing_ || seats_ > 0; });
        if (closing_) return;
        --seats_;
        ++working_;
        lock.unlock();
        work_(context_);
        lock.lock();
        if (--working_ == 0) idle_.notify_one();
    }
}

}  // namespace emocore
