// Threads of our own, for where no OpenMP runtime is loaded. They never take the GIL.
#pragma once
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace emocore {

class Pool {
  public:
    Pool() = default;
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // work(context) on up to `threads` members, the caller among them; returns when all are done.
    // One loop at a time: a second caller works alone.
    void parallel(void (*work)(void*), void* context, int threads);

  private:
    void serve();

    std::mutex turn_, mutex_;
    std::condition_variable wake_, idle_;
    std::vector<std::thread> helpers_;
    void (*work_)(void*) = nullptr;
    void* context_ = nullptr;
    int seats_ = 0, working_ = 0;
    bool closing_ = false;
};

}  // namespace emocore
