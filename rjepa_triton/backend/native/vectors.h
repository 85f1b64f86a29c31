// Vectors of numbers, float or double, and their elementary functions.
//
// The sources are compiled without -ffast-math, which may make the whole process flush subnormals to zero and leaves
// NaN and infinities undefined. Without it compilers don't vectorize tanh and exp, so these are written here for a
// whole vector at a time; the rarer functions are the C library's, number by number.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX__ // for masked loads and stores: a call of memcpy saves and restores all registers
#include <immintrin.h>
#endif

namespace {

// A `wide` is one register: a compiler keeps a longer vector in memory, and moves it there and back at every operation.
#if defined(__AVX512F__)
constexpr long BYTES = 64;
#elif defined(__AVX__)
constexpr long BYTES = 32;
#else
constexpr long BYTES = 16; // SSE and NEON
#endif

template <class real> struct Lanes;

template <> struct Lanes<float> {
    static constexpr long width = BYTES / sizeof(float);
    typedef float wide __attribute__((vector_size(BYTES), aligned(sizeof(float)), may_alias));
    typedef int32_t bits __attribute__((vector_size(BYTES), aligned(sizeof(int32_t)), may_alias));
};

template <> struct Lanes<double> {
    static constexpr long width = BYTES / sizeof(double);
    typedef double wide __attribute__((vector_size(BYTES), aligned(sizeof(double)), may_alias));
    typedef int64_t bits __attribute__((vector_size(BYTES), aligned(sizeof(int64_t)), may_alias));
};

typedef Lanes<float>::wide wide_f;
typedef Lanes<double>::wide wide_d;
typedef Lanes<float>::bits bits_f;
typedef Lanes<double>::bits bits_d;

// `yes` where the mask is all ones, `no` where it is zero, lane by lane.
inline wide_f chosen(bits_f mask, wide_f yes, wide_f no) {
    return (wide_f)((mask & (bits_f)yes) | (~mask & (bits_f)no));
}
inline wide_d chosen(bits_d mask, wide_d yes, wide_d no) {
    return (wide_d)((mask & (bits_d)yes) | (~mask & (bits_d)no));
}

// exp(x) to within 2 ulp. x is clamped to [-87, 88] first; NaN stays NaN only in functions that say so.
inline wide_f exp_in_range(wide_f x) {
    x = chosen(x < -87.0f, wide_f{} - 87.0f, chosen(x > 88.0f, wide_f{} + 88.0f, x));
    bits_f n = __builtin_convertvector(
        x * 1.44269504088896341f + chosen(x < 0.0f, wide_f{} - 0.5f, wide_f{} + 0.5f), bits_f);
    wide_f whole = __builtin_convertvector(n, wide_f);
    // r = x - n log 2. log 2 is split in two parts, and the product of n and the first part is exact.
    wide_f r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    wide_f e = 1.979034151e-4f * r + 1.394465964e-3f;
    e = e * r + 8.333497075e-3f;
    e = e * r + 4.166629495e-2f;
    e = e * r + 1.666666587e-1f;
    e = e * r + 5.000000068e-1f;
    e = e * (r * r) + r + 1.0f;
    return e * (wide_f)((n + 127) << 23); // 2ⁿ
}

// exp(r) - 1 for |r| ≤ log(2)/2, by Taylor's series to r¹³, whose next term is 4e-18 r.
inline wide_d expm1_reduced(wide_d r) {
    wide_d e = wide_d{} + 1.0 / 6227020800.0;
    const double factors[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                              1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0, 0.5};
    for (double factor : factors) e = e * r + factor;
    return e * (r * r) + r;
}

// n and r = x - n log 2, |r| ≤ log(2)/2.
inline wide_d reduced(wide_d x, bits_d *n) {
    *n = __builtin_convertvector(
        x * 1.4426950408889634 + chosen(x < 0.0, wide_d{} - 0.5, wide_d{} + 0.5), bits_d);
    const wide_d whole = __builtin_convertvector(*n, wide_d);
    return x - whole * 6.93147180369123816490e-01 - whole * 1.90821492927058770002e-10;
}

inline wide_d power_of_two(bits_d n) { return (wide_d)((n + 1023) << 52); }

// As for float; x is clamped to [-708, 709].
inline wide_d exp_in_range(wide_d x) {
    x = chosen(x < -708.0, wide_d{} - 708.0, chosen(x > 709.0, wide_d{} + 709.0, x));
    bits_d n;
    const wide_d r = reduced(x, &n);
    return (expm1_reduced(r) + 1.0) * power_of_two(n);
}

// exp(x) to within 2 ulp of normal numbers: 0 below, infinity above; NaN stays NaN.
inline wide_f exp_of(wide_f x) {
    const wide_f found = chosen(x > 88.72f, wide_f{} + INFINITY, chosen(x < -87.33f, wide_f{}, exp_in_range(x)));
    return chosen(x != x, x, found);
}
inline wide_d exp_of(wide_d x) {
    const wide_d found =
        chosen(x > 709.78, wide_d{} + (double)INFINITY, chosen(x < -708.39, wide_d{}, exp_in_range(x)));
    return chosen(x != x, x, found);
}

// tanh(x) to within 2 ulp. Below |x| = 0.625 it is an odd polynomial; above, it is 1 - 2 / (exp(2|x|) + 1), which is 1
// from 9.02 on. NaN stays NaN. The coefficients here and in `exp_in_range` minimize the largest relative error, which
// is 4.4e-9 for tanh's polynomial and 5.2e-11 for exp's between ±log(2)/2.
inline wide_f tanh_of(wide_f x) {
    bits_f sign = (bits_f)x & (int32_t)0x80000000;
    wide_f size = (wide_f)((bits_f)x ^ sign), z = size * size;
    wide_f low = -5.704986926e-3f * z + 2.063908716e-2f;
    low = low * z - 5.373971505e-2f;
    low = low * z + 1.333144220e-1f;
    low = low * z - 3.333328194e-1f;
    low = low * z * size + size;
    wide_f high = 1.0f - 2.0f / (exp_in_range(chosen(size < 10.0f, 2.0f * size, wide_f{} + 20.0f)) + 1.0f);
    wide_f found = (wide_f)((bits_f)chosen(size < 0.625f, low, high) | sign);
    return chosen(x != x, x, found);
}

// tanh(x) = e / (e + 2) with e = exp(2|x|) - 1, to within 3 ulp; it is 1 from |x| = 20 on.
inline wide_d tanh_of(wide_d x) {
    bits_d sign = (bits_d)x & INT64_MIN;
    wide_d size = (wide_d)((bits_d)x ^ sign);
    wide_d twice = chosen(size < 20.0, 2.0 * size, wide_d{} + 40.0);
    bits_d n;
    const wide_d r = reduced(twice, &n), scale = power_of_two(n);
    const wide_d e = expm1_reduced(r) * scale + (scale - 1.0);
    wide_d found = (wide_d)((bits_d)(e / (e + 2.0)) | sign);
    return chosen(x != x, x, found);
}

// 1 / (1 + exp(-x)). NaN stays NaN.
inline wide_f sigmoid_of(wide_f x) { return chosen(x != x, x, 1.0f / (1.0f + exp_in_range(-x))); }
inline wide_d sigmoid_of(wide_d x) { return chosen(x != x, x, 1.0 / (1.0 + exp_in_range(-x))); }

// The C library's functions, number by number.
#define BY_NUMBER(name, function)                                                                                      \
    template <class wide> inline wide name(wide x) {                                                                   \
        for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); i++) x[i] = function(x[i]);                                 \
        return x;                                                                                                      \
    }
BY_NUMBER(expm1_of, std::expm1)
BY_NUMBER(log_of, std::log)
BY_NUMBER(log1p_of, std::log1p)
BY_NUMBER(sqrt_of, std::sqrt)
BY_NUMBER(sin_of, std::sin)
BY_NUMBER(cos_of, std::cos)
BY_NUMBER(erf_of, std::erf)
BY_NUMBER(floor_of, std::floor)
BY_NUMBER(abs_of, std::abs)
#undef BY_NUMBER

template <class wide, class real> inline wide pow_of(wide x, real exponent) {
    for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); i++) x[i] = std::pow(x[i], exponent);
    return x;
}

// -1, 0 or 1; 0 for NaN, as torch.sign.
template <class wide> inline wide sign_of(wide x) {
    for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); i++) x[i] = (x[i] > 0) - (x[i] < 0);
    return x;
}

// The larger and the smaller of two numbers; NaN if either is NaN.
template <class wide> inline wide larger(wide a, wide b) { return chosen(a != a, a, chosen(a < b, b, chosen(b != b, b, a))); }
template <class wide> inline wide smaller(wide a, wide b) { return chosen(a != a, a, chosen(a > b, b, chosen(b != b, b, a))); }

#ifdef __SANITIZE_ADDRESS__ // which doesn't see what masked loads and stores reach
#define MASKS 0
#else
#define MASKS 1
#endif
#if MASKS && defined(__AVX512F__)
inline wide_f load_first(const float *from, long count) { return (wide_f)_mm512_maskz_loadu_ps((1u << count) - 1, from); }
inline wide_d load_first(const double *from, long count) { return (wide_d)_mm512_maskz_loadu_pd((1u << count) - 1, from); }
inline void store_first(float *to, wide_f values, long count) { _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)values); }
inline void store_first(double *to, wide_d values, long count) { _mm512_mask_storeu_pd(to, (1u << count) - 1, (__m512d)values); }
#elif MASKS && defined(__AVX2__)
// All bits of the first `bytes` of a register.
inline __m256i bits_before(long bytes) {
    static const int32_t bits[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(bits + 8 - bytes / 4));
}
inline wide_f load_first(const float *from, long count) {
    return (wide_f)_mm256_maskload_ps(from, bits_before(4 * count));
}
inline wide_d load_first(const double *from, long count) {
    return (wide_d)_mm256_maskload_pd(from, bits_before(8 * count));
}
inline void store_first(float *to, wide_f values, long count) {
    _mm256_maskstore_ps(to, bits_before(4 * count), (__m256)values);
}
inline void store_first(double *to, wide_d values, long count) {
    _mm256_maskstore_pd(to, bits_before(8 * count), (__m256d)values);
}
#else
template <class real> inline typename Lanes<real>::wide load_first(const real *from, long count) {
    typename Lanes<real>::wide found{};
    memcpy(&found, from, count * sizeof(real));
    return found;
}
template <class real> inline void store_first(real *to, typename Lanes<real>::wide values, long count) {
    memcpy(to, &values, count * sizeof(real));
}
#endif

// `load` reads min(count, width) ≥ 1 numbers into the first lanes and sets the other lanes to zero; `store` writes the
// first min(count, width) lanes.
template <class real> inline typename Lanes<real>::wide load(const real *from, long count) {
    return count >= Lanes<real>::width ? *(const typename Lanes<real>::wide *)from : load_first(from, count);
}
template <class real> inline void store(real *to, typename Lanes<real>::wide values, long count) {
    if (count >= Lanes<real>::width)
        *(typename Lanes<real>::wide *)to = values;
    else
        store_first(to, values, count);
}

} // namespace
