// Whether numbers are finite, on the CPU. They are asked as bits, of which an exponent of ones is an infinity or a NaN.

#include <cstdint>
#include <cstring>

template <typename bits>
static long any_special(const void *numbers, long count, bits exponent) {
    bits found = 0;
    for (long i = 0; i < count; i++) {
        bits one;
        std::memcpy(&one, (const char *)numbers + i * sizeof(bits), sizeof(bits));
        found |= (one & exponent) == exponent;
    }
    return found != 0;
}

// 1 if one of the `count` numbers, double if `item` is 8 and float otherwise, is infinite or NaN, else 0.
static long special(const void *numbers, long count, long item) {
    return item == sizeof(double) ? any_special<std::uint64_t>(numbers, count, 0x7ff0000000000000u)
                                  : any_special<std::uint32_t>(numbers, count, 0x7f800000u);
}

// The same of two arrays; a null pointer stands for zeros, which are finite.
extern "C" long not_finite(const void *a, const void *b, long count_a, long count_b, long item) {
    return (a && special(a, count_a, item)) || (b && special(b, count_b, item));
}
