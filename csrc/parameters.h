// From the arguments of a call to the parameters of a kernel.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emocore {

// Types of scalars and of a tensor's elements, by Triton's names.
enum class Element : uint8_t { unknown, i1, i8, u8, i16, i32, i64, fp16, bf16, fp32, fp64 };
Element element_named(const std::string& name);
unsigned element_bytes(Element element);

constexpr unsigned MAP_BYTES = 128;         // of a tensor map
constexpr unsigned PARAMETER_BYTES = 4096;  // that every driver lets a kernel take
constexpr unsigned MOST_ARGUMENTS = 64;

enum class Kind : uint8_t { other, none, integer, real, tensor, map, literal, null };

// An argument of a call.
struct Value {
    Kind kind;
    Element element;  // of a tensor; i1 tells a bool from an int
    int device;       // of a tensor; -1 is the host
    union {
        int64_t integer;
        double real;
        uint64_t address;
        const void* bytes;  // of a map
    };
    size_t length;  // of a map
};

struct Parameter {
    Kind kind;
    Element element;
    bool divisible;         // by 16, tensors by their address
    int64_t least, most;    // of an integer; a literal is both
    unsigned offset, size;  // in what the kernel is given; no size: it is not given

    bool fits(const Value& value) const;
};

// What a kernel takes, from a word for every argument of a call, in order:
//   *bf16      a tensor of that type; *bf16:16 where its address is divisible by 16
//   i32        an integer in the type's range, i32:16 where it is divisible by 16; i1 is a bool
//   fp32       a float, passed in that type
//   map        a tensor map, as bytes
//   none, =1   None, or this integer: compiled in, not passed
//   null       no argument of the call, 8 bytes of zeros to the kernel
struct Parameters {
    explicit Parameters(const std::string& words);  // throws std::invalid_argument

    std::vector<Parameter> all;
    size_t arguments = 0;         // of a call
    std::vector<unsigned> sizes;  // of what is given to the kernel, in order
};

// What a kernel is given: its parameters' bytes, and where each begins.
struct Packed {
    // False, and of no use, unless every value fits.
    bool fill(const Parameters& parameters, const Value* values, size_t count);

    void* pointers[MOST_ARGUMENTS];
    alignas(MAP_BYTES) unsigned char bytes[PARAMETER_BYTES];
};

}  // namespace emocore
