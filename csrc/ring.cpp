#include "ring.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <limits>
#include <utility>

namespace emocore {
namespace {

constexpr auto SLICE = std::chrono::milliseconds(50);  // of a wait, until the caller is asked to go on

std::atomic<unsigned> forks{0};
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { ++forks; });

}  // namespace

Stream::~Stream() { ::close(handle); }

// A call at work on a stream: if it does not `keep` what it did, the stream is as it was.
class Ring::Turn {
  public:
    Turn(Ring& ring, Lock& lock, Stream& stream)
        : ring_(ring),
          lock_(lock),
          stream_(stream),
          base_(stream.base),
          fill_(stream.fill),
          crc_(stream.crc) {
        stream.busy = true;
        const int64_t loose = fill_ % stream.align;
        if (!stream.slot || !loose) return;
        std::memcpy(stream.tail.data(), ring.slots_.at(stream.slot) + fill_ - loose, loose);
    }
    ~Turn() {
        if (!lock_.owns_lock()) lock_.lock();
        if (!kept_) rewind();
        if (stream_.error && stream_.slot) ring_.slots_.give(std::exchange(stream_.slot, {}));
        ring_.reserved_ -= reserved_;
        stream_.busy = false;
        ring_.changed_.notify_all();
    }
    void keep() { kept_ = true; }

    // Slots for so many more bytes are set aside; false where there are too few.
    bool reserve(int64_t bytes) {
        const int64_t slots = (stream_.fill + bytes + ring_.slot_bytes_ - 1) / ring_.slot_bytes_;
        const int64_t needed = bytes ? slots - (stream_.slot ? 1 : 0) : 0;
        if (!ring_.available(needed)) return false;
        reserved_ = static_cast<int>(needed);
        ring_.reserved_ += reserved_;
        return true;
    }
    int& reserved() { return reserved_; }

  private:
    void rewind() {
        if (stream_.base == base_) {  // no slot was handed over
            stream_.fill = fill_;
        } else {
            if (stream_.slot) ring_.slots_.give(std::exchange(stream_.slot, {}));
            stream_.fill = fill_ % stream_.align;
            stream_.base = base_ + fill_ - stream_.fill;
            stream_.unwritten = stream_.fill > 0;
            stream_.overlaps = true;
        }
        stream_.crc = crc_;
    }

    Ring& ring_;
    Lock& lock_;
    Stream& stream_;
    const int64_t base_, fill_;
    const uint32_t crc_;
    int reserved_ = 0;
    bool kept_ = false;
};

Ring::Ring(int slots, int64_t slot_bytes, int threads, double throttle)
    : slot_bytes_(slot_bytes), throttle_(throttle), born_(forks), slots_(slots, slot_bytes) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads that know what they mean
    try {
        while (threads--) writers_.emplace_back([this] { serve(); });
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        Lock lock(mutex_);
        join(lock);
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Ring::~Ring() {
    int error = 0;
    close({std::numeric_limits<double>::infinity(), [] {}}, error);
}

bool Ring::forked() const { return born_ != forks; }

Ring::Handle Ring::open(int own_handle, int64_t offset, bool direct) {
    auto stream = std::make_shared<Stream>(own_handle, offset, direct);
    const Lock lock(mutex_);
    streams_.push_back(stream);
    return stream;
}

// --- what a producer does

void Ring::pin() {
    if (forked()) return;
    const Lock lock(mutex_);
    slots_.pin();
}

Outcome Ring::append(const Handle& stream, const Source& source, bool wait, const Patience& patience) {
    if (forked()) return Outcome::forked;
    Lock lock(mutex_);
    if (const Outcome claimed = claim(lock, *stream, patience); claimed != Outcome::done) return claimed;
    Turn turn(*this, lock, *stream);
    if (!wait && !turn.reserve(source.bytes)) return judged(*stream, Outcome::full);
    for (int64_t done = 0; done < source.bytes;) {
        if (!stream->slot) {
            const Outcome taken = take(lock, *stream, turn.reserved(), patience);
            if (taken != Outcome::done) return taken;
        }
        const int64_t count = std::min(source.bytes - done, slot_bytes_ - stream->fill);
        char* const to = slots_.at(stream->slot) + stream->fill;
        lock.unlock();
        const uint32_t crc = source.copy(done, count, to, stream->crc);
        lock.lock();
        advance(stream, count, crc);
        done += count;
    }
    turn.keep();
    return judged(*stream, Outcome::done);
}

Outcome Ring::flush(const Handle& stream, const Patience& patience) {
    if (forked()) return Outcome::forked;
    Lock lock(mutex_);
    Outcome found = claim(lock, *stream, patience);
    if (found == Outcome::closed && !stream->unwritten && !stream->pending) return Outcome::done;
    if (found != Outcome::done) return found;
    {
        Turn turn(*this, lock, *stream);
        found = settle(lock, stream, patience);
        turn.keep();
    }
    for (int before = stream->pending; found == Outcome::done && stream->pending; before = stream->pending)
        if (!wait(lock, patience, [&] { return stream->pending < before; })) found = Outcome::late;
    return judged(*stream, found);
}

void Ring::abandon(const Handle& stream) {
    if (forked()) return;
    const Lock lock(mutex_);
    stream->abandoned = true;
    if (stream->slot) hand_over(stream, true);
    forget();
}

Outcome Ring::close(const Patience& patience, int& error) {
    if (forked()) return Outcome::forked;
    Lock lock(mutex_);
    closing_ = true;
    changed_.notify_all();
    queued_.notify_all();
    const auto idle = [&](const Handle& stream) { return !stream->busy; };
    if (!wait(lock, patience, [&] { return std::all_of(streams_.begin(), streams_.end(), idle); }))
        return Outcome::late;
    const std::vector<Handle> streams = streams_;
    for (const Handle& stream : streams)
        if (settle(lock, stream, patience) == Outcome::late) return Outcome::late;
    if (!wait(lock, patience, [&] { return in_flight_ == 0; })) return Outcome::late;
    join(lock);
    error = untold_error();
    return error ? Outcome::failed : Outcome::done;
}

Standing Ring::standing(const Handle& stream) {
    if (forked()) return {};
    const Lock lock(mutex_);
    return {stream->base + stream->fill - stream->start, stream->crc, stream->error};
}

int64_t Ring::room(const Handle& stream) {
    if (forked()) return 0;
    const Lock lock(mutex_);
    available(1);
    return std::max(slots_.free() - reserved_ + (stream->slot ? 1 : 0), 0) * slot_bytes_ - stream->fill;
}

RingState Ring::live() {
    if (forked()) return {};
    const Lock lock(mutex_);
    const auto seconds = [](Clock::duration span) { return std::chrono::duration<double>(span).count(); };
    const Clock::duration now = writing_ ? Clock::now() - began_ : Clock::duration(0);
    return {slots_.count(),         slots_.free(),  in_flight_, bytes_written_,
            seconds(wrote_ + now), seconds(waited_)};
}

// What the caller is told: before anything else, that the stream has failed.
Outcome Ring::judged(Stream& stream, Outcome otherwise) {
    if (!stream.error) return otherwise;
    stream.told = true;
    return Outcome::failed;
}

// --- waiting

// Until ready; false when that took too long. The lock is held before and after, but not by what it throws.
template <class Ready>
bool Ring::wait(Lock& lock, const Patience& patience, const Ready& ready) {
    using Seconds = std::chrono::duration<double>;
    const Clock::time_point began = Clock::now();
    for (Clock::time_point asked = began; !ready();) {
        const Clock::time_point now = Clock::now();
        const Seconds left = Seconds(patience.seconds) - (now - began);
        if (left <= Seconds(0)) return false;
        if (now - asked >= SLICE) {
            lock.unlock();
            patience.check();
            lock.lock();
            asked = Clock::now();
        } else {
            changed_.wait_for(lock, std::min<Seconds>(SLICE, left));
        }
    }
    return true;
}

// Until no other call is at work on the stream, and the file is where the next byte belongs.
Outcome Ring::claim(Lock& lock, Stream& stream, const Patience& patience) {
    const auto ready = [&] {
        return stream.error || closing_ || (!stream.busy && !(stream.overlaps && stream.pending));
    };
    if (!wait(lock, patience, ready)) return Outcome::late;
    if (stream.error || closing_) return judged(stream, Outcome::closed);
    stream.overlaps = false;
    return Outcome::done;
}

// A slot for the stream, which has none: one of those reserved for it, else as soon as there is one.
Outcome Ring::take(Lock& lock, Stream& stream, int& reserved, const Patience& patience) {
    const auto ready = [&] { return reserved > 0 || stream.error || available(1); };
    if (!ready()) {
        const Clock::time_point began = Clock::now();
        const bool found = wait(lock, patience, ready);
        waited_ += Clock::now() - began;
        if (!found) return Outcome::late;
    }
    if (stream.error) return judged(stream, Outcome::failed);
    if (reserved > 0) --reserved, --reserved_;
    stream.slot = slots_.take();
    std::memcpy(slots_.at(stream.slot), stream.tail.data(), stream.fill);
    return Outcome::done;
}

// --- slots

// Whether so many can be taken. If all are held by streams that may never fill them, one is written as it is.
bool Ring::available(int64_t slots) {
    const auto idle = [](const Handle& stream) { return stream->slot && !stream->busy; };
    if (slots_.free() - reserved_ < slots && !in_flight_) {
        const auto found = std::find_if(streams_.begin(), streams_.end(), idle);
        if (found != streams_.end()) hand_over(*found, false);
    }
    return slots_.free() - reserved_ >= slots;
}

// So many bytes were copied: a slot that is full goes to the writers.
void Ring::advance(const Handle& stream, int64_t bytes, uint32_t crc) {
    stream->crc = crc;
    stream->fill += bytes;
    stream->unwritten = true;
    if (stream->fill == slot_bytes_) hand_over(stream, false);
}

// The slot that is filled in part goes to the writers; what a direct write cannot take stays in the tail, and
// is written nevertheless where it is `padded`: the next bytes write that page again.
void Ring::hand_over(const Handle& stream, bool padded) {
    const int64_t loose = stream->fill % stream->align, whole = stream->fill - loose;
    char* const end = slots_.at(stream->slot) + whole;
    std::memcpy(stream->tail.data(), end, loose);
    if (padded && loose) std::memset(end + loose, 0, stream->align - loose);
    queue(stream, padded && loose ? whole + stream->align : whole);
    stream->base += whole;
    stream->fill = loose;
    stream->unwritten = loose && !padded;
    stream->overlaps = loose && padded;
}

// The stream's slot goes to the writers.
void Ring::queue(const Handle& stream, int64_t bytes) {
    const Lease slot = std::exchange(stream->slot, {});
    if (bytes == 0 || stream->error) return slots_.give(slot);
    queue_.push_back({stream, slot, stream->base, bytes});
    ++in_flight_;
    ++stream->pending;
    queued_.notify_one();
}

// All that was appended is with the writers.
Outcome Ring::settle(Lock& lock, const Handle& stream, const Patience& patience) {
    if (!stream->unwritten || stream->error) return Outcome::done;
    if (!wait(lock, patience, [&] { return !stream->overlaps || !stream->pending; })) return Outcome::late;
    int reserved = 0;
    const Outcome taken = stream->slot ? Outcome::done : take(lock, *stream, reserved, patience);
    if (taken == Outcome::done) hand_over(stream, true);
    return taken;
}

void Ring::join(Lock& lock) {
    ending_ = true;
    queued_.notify_all();
    std::vector<std::thread> writers = std::move(writers_);
    writers_.clear();
    lock.unlock();
    for (std::thread& writer : writers) writer.join();
    lock.lock();
}

}  // namespace emocore
