#include "crc32c.h"

#include <array>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace emocore {
namespace {

// Polynomials over GF(2) of degree below 32; bit 31 is the coefficient of x^0.
constexpr uint32_t POLYNOMIAL = 0x82F63B78;
constexpr uint32_t ONE = 0x80000000, X8 = 0x00800000;

constexpr uint32_t times_x(uint32_t a) { return a >> 1 ^ (a & 1 ? POLYNOMIAL : 0); }

constexpr uint32_t multiplied(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (; a; a <<= 1, b = times_x(b))
        if (a & ONE) product ^= b;
    return product;
}

// What so many zero bytes at the end multiply a remainder by: x^(8 bytes).
constexpr uint32_t zeros(size_t bytes) {
    uint32_t power = ONE;
    for (uint32_t square = X8; bytes; bytes >>= 1, square = multiplied(square, square))
        if (bytes & 1) power = multiplied(power, square);
    return power;
}

// Multiplication by a fixed polynomial, a byte at a time.
struct Times {
    std::array<std::array<uint32_t, 256>, 4> table{};

    explicit Times(uint32_t factor) {
        for (unsigned byte = 0; byte < 4; ++byte)
            for (uint32_t value = 0; value < 256; ++value)
                table[byte][value] = multiplied(value << 8 * byte, factor);
    }
    uint32_t operator()(uint32_t a) const {
        return table[0][a & 255] ^ table[1][a >> 8 & 255] ^ table[2][a >> 16 & 255] ^ table[3][a >> 24];
    }
};

// Eight bytes at a time: table k says what a byte becomes that k more follow.
struct Slices {
    std::array<std::array<uint32_t, 256>, 8> table{};

    Slices() {
        for (unsigned k = 0; k < 8; ++k)
            for (uint32_t value = 0; value < 256; ++value)
                table[k][value] = multiplied(value, zeros(k + 1));
    }
};

uint32_t by_tables(uint32_t crc, const unsigned char* data, size_t bytes) {
    static const Slices slices;
    const auto& table = slices.table;
    for (; bytes >= 8; data += 8, bytes -= 8) {
        unsigned char mixed[8];
        std::memcpy(mixed, data, 8);
        for (unsigned i = 0; i < 4; ++i) mixed[i] ^= crc >> 8 * i;
        crc = 0;
        for (unsigned i = 0; i < 8; ++i) crc ^= table[7 - i][mixed[i]];
    }
    for (; bytes; ++data, --bytes) crc = crc >> 8 ^ table[0][(crc ^ *data) & 255];
    return crc;
}

#ifdef __x86_64__
#define SSE42 __attribute__((target("sse4.2")))

SSE42 uint64_t step(uint64_t crc, const unsigned char* data) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    return _mm_crc32_u64(crc, word);
}

// Three lanes side by side, as the instruction takes three cycles and one may start in each.
template <size_t LANE>
SSE42 uint32_t by_lanes(uint32_t crc, const unsigned char*& data, size_t& bytes) {
    static const Times past_one(zeros(LANE)), past_two(zeros(2 * LANE));
    for (; bytes >= 3 * LANE; data += 3 * LANE, bytes -= 3 * LANE) {
        uint64_t a = crc, b = 0, c = 0;
        for (size_t i = 0; i < LANE; i += 8) {
            a = step(a, data + i);
            b = step(b, data + LANE + i);
            c = step(c, data + 2 * LANE + i);
        }
        crc = past_two(static_cast<uint32_t>(a)) ^ past_one(static_cast<uint32_t>(b)) ^
              static_cast<uint32_t>(c);
    }
    return crc;
}

SSE42 uint32_t by_instruction(uint32_t crc, const unsigned char* data, size_t bytes) {
    crc = by_lanes<4096>(crc, data, bytes);
    crc = by_lanes<256>(crc, data, bytes);
    uint64_t wide = crc;
    for (; bytes >= 8; data += 8, bytes -= 8) wide = step(wide, data);
    crc = static_cast<uint32_t>(wide);
    for (; bytes; ++data, --bytes) crc = _mm_crc32_u8(crc, *data);
    return crc;
}

bool has_instruction() {
    static const bool has = __builtin_cpu_supports("sse4.2");
    return has;
}
#else
uint32_t by_instruction(uint32_t crc, const unsigned char* data, size_t bytes) {
    return by_tables(crc, data, bytes);
}

bool has_instruction() { return false; }
#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const void* data, size_t bytes) {
    const auto* first = static_cast<const unsigned char*>(data);
    return ~(has_instruction() ? by_instruction(~crc, first, bytes) : by_tables(~crc, first, bytes));
}

uint32_t crc32c_portable(uint32_t crc, const void* data, size_t bytes) {
    return ~by_tables(~crc, static_cast<const unsigned char*>(data), bytes);
}

}  // namespace emocore
