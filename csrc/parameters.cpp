#include "parameters.h"

#include <cstring>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace emocore {
namespace {

const struct {
    const char* name;
    unsigned bytes;
} ELEMENTS[] = {{"", 0},    {"i1", 1},   {"i8", 1},   {"u8", 1},   {"i16", 2}, {"i32", 4},
                {"i64", 8}, {"fp16", 2}, {"bf16", 2}, {"fp32", 4}, {"fp64", 8}};

Parameter plain(Kind kind, unsigned size, Element element = Element::unknown) {
    return {kind, element, false, 0, 0, 0, size};
}

Parameter scalar(Element element) {
    Parameter p = plain(Kind::real, element_bytes(element), element);
    if (element == Element::fp32 || element == Element::fp64) return p;
    if (element == Element::fp16 || element == Element::bf16) return plain(Kind::none, 0);
    const bool is_signed = element != Element::i1 && element != Element::u8;
    const unsigned bits = element == Element::i1 ? 1 : 8 * p.size - is_signed;
    p.kind = Kind::integer;
    p.most = static_cast<int64_t>((uint64_t{1} << bits) - 1);
    p.least = is_signed ? -p.most - 1 : 0;
    return p;
}

// The parameter that a word of `Parameters` says; false where it says none.
bool read(const std::string& word, Parameter& p) {
    if (word == "none" || word == "null" || word == "map") {
        p = word == "none"   ? plain(Kind::none, 0)
            : word == "null" ? plain(Kind::null, 8)
                             : plain(Kind::map, MAP_BYTES);
        return true;
    }
    if (word[0] == '=') {
        std::istringstream number(word.substr(1));
        p = plain(Kind::literal, 0, Element::i64);
        number >> p.least;
        p.most = p.least;
        return !number.fail() && number.peek() == EOF;
    }
    const size_t colon = word.find(':'), star = word[0] == '*';
    const Element element =
        element_named(word.substr(star, colon == std::string::npos ? colon : colon - star));
    if (element == Element::unknown) return false;
    p = star ? plain(Kind::tensor, 8, element) : scalar(element);
    p.divisible = colon != std::string::npos;
    return p.size && (!p.divisible || (p.kind != Kind::real && word.substr(colon) == ":16"));
}

}  // namespace

Element element_named(const std::string& name) {
    for (size_t i = 1; i < std::size(ELEMENTS); ++i)
        if (name == ELEMENTS[i].name) return static_cast<Element>(i);
    return name == "u1" ? Element::i1 : Element::unknown;  // Triton has both
}

unsigned element_bytes(Element element) { return ELEMENTS[static_cast<size_t>(element)].bytes; }

Parameters::Parameters(const std::string& words) {
    std::istringstream stream(words);
    unsigned end = 0;
    for (std::string word; stream >> word;) {
        Parameter p{};
        if (!read(word, p)) throw std::invalid_argument("parameters: unknown type '" + word + "'");
        arguments += p.kind != Kind::null;
        if (p.size) {
            p.offset = (end + p.size - 1) / p.size * p.size;
            end = p.offset + p.size;
            sizes.push_back(p.size);
        }
        all.push_back(p);
    }
    if (all.size() > MOST_ARGUMENTS || end > PARAMETER_BYTES)
        throw std::invalid_argument("parameters: " + std::to_string(all.size()) + " of " +
                                    std::to_string(end) + " bytes are too many");
}

bool Parameter::fits(const Value& value) const {
    switch (kind) {
        case Kind::tensor:
            return value.kind == kind && value.element == element && !(divisible && value.address % 16);
        case Kind::integer:
        case Kind::literal:
            return value.kind == Kind::integer &&
                   (value.element == Element::i1) == (element == Element::i1) && least <= value.integer &&
                   value.integer <= most && !(divisible && value.integer % 16);
        case Kind::map:
            return value.kind == kind && value.length == MAP_BYTES;
        default:
            return value.kind == kind;
    }
}

bool Packed::fill(const Parameters& parameters, const Value* values, size_t count) {
    if (count != parameters.arguments) return false;
    size_t given = 0;
    for (const Parameter& p : parameters.all) {
        unsigned char* to = bytes + p.offset;
        if (p.size) pointers[given++] = to;
        if (p.kind == Kind::null) {
            std::memset(to, 0, p.size);
            continue;
        }
        const Value& value = *values++;
        if (!p.fits(value)) return false;
        if (p.kind == Kind::real && p.size == sizeof(float)) {
            const float single = static_cast<float>(value.real);
            std::memcpy(to, &single, p.size);
        } else {  // of an integer, the low bytes
            std::memcpy(to, p.kind == Kind::map ? value.bytes : &value.integer, p.size);
        }
    }
    return true;
}

}  // namespace emocore
