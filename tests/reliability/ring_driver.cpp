// The ring without Python, for the sanitisers: producers, idle streams, slow and failing files, timeouts, closing at work.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "crc32c.h"
#include "gather.h"
#include "ring.h"

using namespace emocore;

namespace {

#define CHECK(what)                                                          \
    do {                                                                     \
        if (!(what)) {                                                       \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);  \
            std::exit(1);                                                    \
        }                                                                    \
    } while (0)

const Patience FOR_EVER{1e9, [] {}};
const Patience BRIEFLY{0.002, [] {}};

Source of(const Bytes& bytes) {
    return {bytes.rows * bytes.width, [bytes](int64_t from, int64_t count, char* to, uint32_t crc) {
                return gather(bytes, from, count, to, crc);
            }};
}

Source flat(const std::vector<char>& data) {
    const auto size = static_cast<int64_t>(data.size());
    return of({data.data(), 1, size, size});
}

std::vector<char> noise(std::mt19937& random, size_t count) {
    std::vector<char> found(count);
    for (char& one : found) one = static_cast<char>(random());
    return found;
}

int file(const std::string& path, int flags = 0) {
    const int handle = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | flags, 0600);
    CHECK(handle >= 0);
    return handle;
}

std::vector<char> content(const std::string& path) {
    std::vector<char> found;
    std::FILE* from = std::fopen(path.c_str(), "rb");
    char part[4096];
    for (size_t n; (n = std::fread(part, 1, sizeof part, from)) > 0;) found.insert(found.end(), part, part + n);
    std::fclose(from);
    return found;
}

// Each of `count` threads fills a file of its own, in appends of any length and stride, some given up; all is there.
void produce(const std::string& folder, int count, int rounds, double throttle) {
    Ring ring(5, 2 * PAGE, 3, throttle);
    std::vector<std::thread> threads;
    for (int n = 0; n < count; ++n)
        threads.emplace_back([&, n] {
            std::mt19937 random(n);
            const std::string path = folder + "/rows" + std::to_string(n);
            const Ring::Handle stream = ring.open(file(path), 0, false);
            std::vector<char> expected;
            for (int round = 0; round < rounds; ++round) {
                const int64_t rows = 1 + random() % 9, width = 1 + random() % 3000, stride = width + random() % 7;
                const std::vector<char> data = noise(random, rows * stride);
                const Bytes bytes{data.data(), rows, width, stride};
                const bool wait = random() % 4;
                const Outcome outcome = ring.append(stream, of(bytes), wait, random() % 5 ? FOR_EVER : BRIEFLY);
                CHECK(outcome == Outcome::done || outcome == Outcome::late || (!wait && outcome == Outcome::full));
                if (outcome == Outcome::done)
                    for (int64_t row = 0; row < rows; ++row)
                        expected.insert(expected.end(), &data[row * stride], &data[row * stride] + width);
                if (random() % 16 == 0) CHECK(ring.flush(stream, FOR_EVER) == Outcome::done);
                ring.room(stream);
                ring.live();
            }
            CHECK(ring.flush(stream, FOR_EVER) == Outcome::done);
            const Standing standing = ring.standing(stream);
            CHECK(standing.bytes == static_cast<int64_t>(expected.size()));
            CHECK(standing.crc == crc32c(0, expected.data(), expected.size()));
            CHECK(standing.crc == crc32c_portable(0, expected.data(), expected.size()));
            ring.abandon(stream);
            std::vector<char> found = content(path);
            found.resize(expected.size());  // what was given up may stand behind
            CHECK(found == expected);
        });
    for (std::thread& thread : threads) thread.join();
    int error = 0;
    CHECK(ring.close(FOR_EVER, error) == Outcome::done);
}

// Threads share one stream: no append is torn.
void share(const std::string& folder, int count, int rounds) {
    Ring ring(4, PAGE, 2, -1);
    const std::string path = folder + "/shared";
    const Ring::Handle stream = ring.open(file(path), 0, false);
    std::vector<std::thread> threads;
    for (int n = 0; n < count; ++n)
        threads.emplace_back([&, n] {
            const std::vector<char> row(100, static_cast<char>(n));
            for (int round = 0; round < rounds; ++round)
                CHECK(ring.append(stream, flat(row), true, FOR_EVER) == Outcome::done);
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(ring.flush(stream, FOR_EVER) == Outcome::done);
    const std::vector<char> found = content(path);
    CHECK(found.size() == static_cast<size_t>(count) * rounds * 100);
    for (size_t at = 0; at < found.size(); ++at) CHECK(found[at] == found[at / 100 * 100]);
}

// A file that cannot be written fails, to whoever appends or flushes, and harms no other.
void fail(const std::string& folder, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        Ring ring(3, PAGE, 2, -1);
        const Ring::Handle fine = ring.open(file(folder + "/fine"), 0, false);
        const Ring::Handle bad = ring.open(open("/dev/full", O_WRONLY), 0, false);
        std::atomic<int> failed{0};
        std::vector<std::thread> threads;
        for (int n = 0; n < 4; ++n)
            threads.emplace_back([&, n] {
                const std::vector<char> data(3000, 'x');
                for (int i = 0; i < 20; ++i) {
                    const Outcome outcome = ring.append(n % 2 ? fine : bad, flat(data), true, FOR_EVER);
                    CHECK(outcome == Outcome::done || (outcome == Outcome::failed && n % 2 == 0));
                    failed += outcome == Outcome::failed;
                }
            });
        for (std::thread& thread : threads) thread.join();
        CHECK(ring.flush(bad, FOR_EVER) == Outcome::failed);
        CHECK(ring.flush(fine, FOR_EVER) == Outcome::done);
        CHECK(ring.standing(fine).bytes == 2 * 20 * 3000);
        if (round % 2) ring.abandon(bad);
    }
}

// A source that gives up in the middle leaves no byte.
void give_up(const std::string& folder, int rounds) {
    Ring ring(2, PAGE, 2, -1);
    const Ring::Handle stream = ring.open(file(folder + "/given_up"), 0, false);
    const std::vector<char> data(700, 'k');
    const Source broken{3 * PAGE, [](int64_t from, int64_t count, char* to, uint32_t) -> uint32_t {
                            if (from > PAGE) throw std::runtime_error("broken");
                            std::memset(to, 'b', count);
                            return 0;
                        }};
    for (int round = 0; round < rounds; ++round) {
        CHECK(ring.append(stream, flat(data), true, FOR_EVER) == Outcome::done);
        try {
            ring.append(stream, broken, true, FOR_EVER);
            CHECK(false);
        } catch (const std::runtime_error&) {
        }
    }
    CHECK(ring.flush(stream, FOR_EVER) == Outcome::done);
    std::vector<char> found = content(folder + "/given_up");
    for (int at = 0; at < 700 * rounds; ++at) CHECK(found[at] == 'k');
}

// The ring is closed while threads append: what was taken is written, the rest is refused.
void close_at_work(const std::string& folder, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        Ring ring(4, PAGE, 2, round % 2 ? 4e6 : -1);
        std::vector<std::thread> threads;
        std::vector<Ring::Handle> streams;
        std::vector<int64_t> taken(4);
        for (int n = 0; n < 4; ++n)
            streams.push_back(ring.open(file(folder + "/closed" + std::to_string(n), n % 2 ? O_DIRECT : 0), 0, n % 2));
        for (int n = 0; n < 4; ++n)
            threads.emplace_back([&, n] {
                const std::vector<char> data(1500, static_cast<char>('a' + n));
                while (ring.append(streams[n], flat(data), true, FOR_EVER) == Outcome::done) taken[n] += 1500;
            });
        usleep(1000 * (round % 7));
        int error = 0;
        CHECK(ring.close(FOR_EVER, error) == Outcome::done);
        for (std::thread& thread : threads) thread.join();
        for (int n = 0; n < 4; ++n) {
            std::vector<char> found = content(folder + "/closed" + std::to_string(n));
            CHECK(static_cast<int64_t>(found.size()) >= taken[n]);
            for (int64_t at = 0; at < taken[n]; ++at) CHECK(found[at] == 'a' + n);
        }
    }
}

}  // namespace

int main(int, char** arguments) {
    const std::string folder = arguments[1];
    const int scale = std::atoi(arguments[2]);
    produce(folder, 6, 40 * scale, -1);
    produce(folder, 3, 10 * scale, 20e6);
    share(folder, 8, 200 * scale);
    fail(folder, 5 * scale);
    give_up(folder, 20 * scale);
    close_at_work(folder, 10 * scale);
    std::puts("done");
}
