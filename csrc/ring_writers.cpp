#include <algorithm>
#include <cerrno>
#include <utility>

#include "ring.h"
#include "writing.h"

namespace emocore {

void Ring::serve() {
    Lock lock(mutex_);
    for (;;) {
        queued_.wait(lock, [this] { return ending_ || !queue_.empty(); });
        if (queue_.empty()) return;
        Ticket ticket = std::move(queue_.front());
        queue_.pop_front();
        pace(lock, ticket.bytes);
        finish(ticket, ticket.stream->error ? 0 : write(lock, ticket));
    }
}

// A slot that is not the ticket's any more holds other bytes: they are not written, or not believed.
int Ring::write(Lock& lock, const Ticket& ticket) {
    if (!slots_.holds(ticket.slot)) return ESTALE;
    if (writing_++ == 0) began_ = Clock::now();
    const char* const data = slots_.at(ticket.slot);
    lock.unlock();
    const int error = write_all(ticket.stream->handle, data, ticket.bytes, ticket.offset);
    lock.lock();
    if (--writing_ == 0) wrote_ += Clock::now() - began_;
    return error || slots_.holds(ticket.slot) ? error : ESTALE;
}

void Ring::finish(Ticket& ticket, int error) {
    Stream& stream = *ticket.stream;
    if (error && !stream.error) stream.error = error;
    if (!stream.error) bytes_written_ += ticket.bytes;
    if (stream.error && stream.slot && !stream.busy) slots_.give(std::exchange(stream.slot, {}));
    if (slots_.holds(ticket.slot)) slots_.give(ticket.slot);
    --stream.pending;
    --in_flight_;
    if (stream.abandoned) forget();
    changed_.notify_all();
}

// As slow as a slow disk, for tests.
void Ring::pace(Lock& lock, int64_t bytes) {
    const auto released = [this] { return closing_; };
    if (throttle_ == 0) queued_.wait(lock, released);
    if (throttle_ <= 0) return;
    const std::chrono::duration<double> span(static_cast<double>(bytes) / throttle_);
    paced_ = std::max(paced_, Clock::now()) + std::chrono::duration_cast<Clock::duration>(span);
    queued_.wait_until(lock, paced_, released);
}

// Streams that nobody holds and that are written are let go of, and with them their handles.
void Ring::forget() {
    const auto finished = [this](const Handle& stream) {
        const bool held = stream->busy || stream->pending || (stream->unwritten && !stream->error);
        const bool is = stream->abandoned && !held;
        if (is && stream->error && !stream->told) lost_error_ = stream->error;
        return is;
    };
    streams_.erase(std::remove_if(streams_.begin(), streams_.end(), finished), streams_.end());
}

// The error that the callers have not seen, which they have then.
int Ring::untold_error() {
    int error = std::exchange(lost_error_, 0);
    for (const Handle& stream : streams_)
        if (stream->error && !std::exchange(stream->told, true) && !error) error = stream->error;
    return error;
}

}  // namespace emocore
