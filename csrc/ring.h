// A bounded ring from whoever produces bytes to files: producers fill slots, writer threads empty them.
#pragma once
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "slots.h"

namespace emocore {

constexpr int64_t PAGE = 4096;  // what slots and direct writes are aligned to

enum class Outcome { done, full, late, failed, closed, forked };

// Seconds for which a call waits without getting on. `check` is called now and then, with no lock held; what
// it throws ends the call like running out of time does.
struct Patience {
    double seconds;
    std::function<void()> check;
};

// The bytes of one file, in order. Its ring guards it; what the slot holds is of the call that is `busy`.
struct Stream {
    Stream(int own_handle, int64_t offset, bool direct)
        : handle(own_handle), start(offset), base(offset), align(direct ? PAGE : 1) {}
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    const int handle;
    const int64_t start;         // in the file
    int64_t base, fill = 0;      // where in the file the slot begins, and how much of it there is
    const int64_t align;         // of what may be written
    Lease slot;                  // without one, what is there of `fill`, less than `align`, stands in `tail`
    std::array<char, PAGE> tail;
    uint32_t crc = 0;
    int pending = 0;         // slots that the writers have of it
    int error = 0;           // the first errno, which stays
    bool told = false;       // a caller has seen it
    bool busy = false;       // a call is at work on it
    bool unwritten = false;  // slot or tail hold what no writer has been given
    bool overlaps = false;   // what the writers have reaches past the next byte: they must be done first
    bool abandoned = false;  // nobody holds it any more
};

// Bytes to append. `copy` copies [from, from + count) of them, and returns the checksum `crc` continued by
// these; it is called without a lock, once at a time for a stream, and what it throws ends the append.
struct Source {
    int64_t bytes;
    std::function<uint32_t(int64_t from, int64_t count, char* to, uint32_t crc)> copy;
};

struct Standing {
    int64_t bytes;  // appended
    uint32_t crc;   // of them
    int error;
};

struct RingState {
    int slots, free, in_flight;
    int64_t bytes_written;
    double writing, waited;  // seconds in which there was a write, and for which appends waited, in all
};

class Ring {
  public:
    using Handle = std::shared_ptr<Stream>;

    // A `throttle` that is not negative limits the bytes a second until the ring is closed: for tests.
    Ring(int slots, int64_t slot_bytes, int threads, double throttle);
    ~Ring();  // as `close`
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    Handle open(int own_handle, int64_t offset, bool direct);

    // The slots may be copied to by a GPU from now on; throws DeviceError.
    void pin();

    // All of the bytes or none; `full` at once where they do not fit and it shall not wait.
    Outcome append(const Handle& stream, const Source& source, bool wait, const Patience& patience);

    // Waits until all that was appended is written, the last page of a direct stream padded with zeros.
    Outcome flush(const Handle& stream, const Patience& patience);

    // What it holds is written, and then it is forgotten.
    void abandon(const Handle& stream);

    // Waits until all that was appended is written, and ends the writers. `failed`, and the errno, where a
    // stream has failed and no caller has seen it.
    Outcome close(const Patience& patience, int& error);

    Standing standing(const Handle& stream);
    int64_t room(const Handle& stream);  // bytes that can be appended without waiting
    RingState live();
    bool forked() const;  // this process is a child of the ring's, and has none of its threads

  private:
    using Lock = std::unique_lock<std::mutex>;
    using Clock = std::chrono::steady_clock;
    struct Ticket {
        Handle stream;
        Lease slot;
        int64_t offset, bytes;
    };
    class Turn;

    template <class Ready>
    bool wait(Lock& lock, const Patience& patience, const Ready& ready);
    static Outcome judged(Stream& stream, Outcome otherwise);
    Outcome claim(Lock& lock, Stream& stream, const Patience& patience);
    Outcome take(Lock& lock, Stream& stream, int& reserved, const Patience& patience);
    Outcome settle(Lock& lock, const Handle& stream, const Patience& patience);
    bool available(int64_t slots);
    void advance(const Handle& stream, int64_t bytes, uint32_t crc);
    void hand_over(const Handle& stream, bool padded);
    void queue(const Handle& stream, int64_t bytes);
    void join(Lock& lock);
    int untold_error();

    void serve();
    int write(Lock& lock, const Ticket& ticket);
    void pace(Lock& lock, int64_t bytes);
    void finish(Ticket& ticket, int error);
    void forget();

    const int64_t slot_bytes_;
    const double throttle_;
    const unsigned born_;  // after so many forks
    std::mutex mutex_;
    std::condition_variable changed_, queued_;
    Slots slots_;
    std::vector<Handle> streams_;
    std::deque<Ticket> queue_;
    std::vector<std::thread> writers_;
    int reserved_ = 0;  // free slots that are promised
    int in_flight_ = 0, writing_ = 0, lost_error_ = 0;
    bool closing_ = false, ending_ = false;
    int64_t bytes_written_ = 0;
    Clock::time_point began_, paced_;
    Clock::duration wrote_{0}, waited_{0};
};

}  // namespace emocore
