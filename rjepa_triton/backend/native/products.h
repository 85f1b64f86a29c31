// The building blocks of the loops over time, float32: tanh, sigmoid, and the products of a layer's matrices with the
// states of a few batch rows.
//
// The sources are compiled without -ffast-math, which may make the whole process flush subnormals to zero and leaves
// NaN and infinities undefined. Without it compilers don't vectorize tanh and exp, so both are written here, for
// sixteen numbers at a time.

#pragma once

#include <cstddef>
#include <cstring>

#ifdef __AVX512F__ // masked loads and stores replace memcpy, since a call of memcpy saves and restores all registers
#include <immintrin.h>
#endif

namespace {

// A `wide` of WIDTH floats is one register of AVX-512; the compiler makes it two of AVX and four of SSE and NEON.
constexpr long WIDTH = 16;
constexpr long PANEL = 2 * WIDTH; // output units of one packed panel
constexpr long FEW = 8;           // rows that `pack` copies together
typedef float wide __attribute__((vector_size(64), aligned(sizeof(float)), may_alias));
typedef int bits __attribute__((vector_size(64), aligned(sizeof(int)), may_alias));

// `yes` where the mask is all ones, `no` where it is zero, lane by lane.
inline wide chosen(bits mask, wide yes, wide no) { return (wide)((mask & (bits)yes) | (~mask & (bits)no)); }

// exp(x) to within 2 ulp. x is clamped to [-87, 88] first.
inline wide exp_of(wide x) {
    x = chosen(x < -87.0f, wide{} - 87.0f, chosen(x > 88.0f, wide{} + 88.0f, x));
    bits n = __builtin_convertvector(x * 1.44269504088896341f + chosen(x < 0.0f, wide{} - 0.5f, wide{} + 0.5f), bits);
    wide whole = __builtin_convertvector(n, wide);
    // r = x - n log 2. log 2 is split in two parts, and the product of n and the first part is exact.
    wide r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    wide e = 1.979034151e-4f * r + 1.394465964e-3f;
    e = e * r + 8.333497075e-3f;
    e = e * r + 4.166629495e-2f;
    e = e * r + 1.666666587e-1f;
    e = e * r + 5.000000068e-1f;
    e = e * (r * r) + r + 1.0f;
    return e * (wide)((n + 127) << 23); // 2ⁿ
}

// tanh(x) to within 2 ulp. Below |x| = 0.625 it is an odd polynomial; above, it is 1 - 2 / (exp(2|x|) + 1), which is 1
// from 9.02 on. NaN stays NaN. The coefficients here and in `exp_of` minimize the largest relative error, which is
// 4.4e-9 for tanh's polynomial and 5.2e-11 for exp's between ±log(2)/2.
inline wide tanh_of(wide x) {
    bits sign = (bits)x & (int)0x80000000;
    wide size = (wide)((bits)x ^ sign), z = size * size;
    wide low = -5.704986926e-3f * z + 2.063908716e-2f;
    low = low * z - 5.373971505e-2f;
    low = low * z + 1.333144220e-1f;
    low = low * z - 3.333328194e-1f;
    low = low * z * size + size;
    wide high = 1.0f - 2.0f / (exp_of(chosen(size < 10.0f, 2.0f * size, wide{} + 20.0f)) + 1.0f);
    wide found = (wide)((bits)chosen(size < 0.625f, low, high) | sign);
    return chosen(x != x, x, found);
}

// 1 / (1 + exp(-x)). NaN stays NaN.
inline wide sigmoid_of(wide x) { return chosen(x != x, x, 1.0f / (1.0f + exp_of(-x))); }

// `load` reads min(count, WIDTH) numbers into the first lanes and sets the other lanes to zero; `store` writes the
// first min(count, WIDTH) lanes.
inline wide load(const float *from, long count) {
    if (count >= WIDTH) return *(const wide *)from;
#ifdef __AVX512F__
    return (wide)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
    wide found{};
    memcpy(&found, from, count * sizeof(float));
    return found;
#endif
}

inline void store(float *to, wide values, long count) {
    if (count >= WIDTH)
        *(wide *)to = values;
    else
#ifdef __AVX512F__
        _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)values);
#else
        memcpy(to, &values, count * sizeof(float));
#endif
}

// The `count` matrices (N, N) that read one state, N = units, regarded as one matrix of count · N rows. `packed` holds
// the same weights as `pack` lays them out; where it is null, products read `matrices`.
struct Readers {
    const float *const *matrices;
    long count, units;
    const float *packed;

    long rows() const { return count * units; }
    long panels() const { return (rows() + PANEL - 1) / PANEL; }
};

// How many numbers `pack` writes for `count` matrices: panels of PANEL rows, laid out as [panel][column][row], where
// the rows that the last panel lacks are zeros.
inline long packed_numbers(long count, long units) { return (count * units + PANEL - 1) / PANEL * PANEL * units; }

// Writes the packed form of readers.matrices to `out`.
void pack(const Readers &readers, float *__restrict out) {
    static const float zeros[WIDTH] = {};
    const long units = readers.units;
    for (long first = 0; first < readers.rows(); first += PANEL, out += units * PANEL)
        // WIDTH columns of FEW rows at a time: each cache line is then used whole before another row evicts it. Rows
        // that lie a power of two apart map to the same cache sets, and reading PANEL of them at a time would evict
        // lines early.
        for (long k = 0; k < units; k += WIDTH) {
            const long columns = units - k < WIDTH ? units - k : WIDTH;
            for (long some = 0; some < PANEL; some += FEW) {
                const float *from[FEW];
                for (long i = 0; i < FEW; i++) {
                    const long row = first + some + i;
                    from[i] = row < readers.rows() ? readers.matrices[row / units] + row % units * units + k : zeros;
                }
                float *__restrict to = out + k * PANEL + some;
                for (long j = 0; j < columns; j++)
                    for (long i = 0; i < FEW; i++) to[j * PANEL + i] = from[i][j];
            }
        }
}

// sums[r][h] = Σ_k w[k][h] c[r][k]: one packed panel w [N][2][WIDTH] times R rows c (R, N), N = units. For a single
// row, even and odd k have separate sums, because each addition to a sum has to wait for the one before.
template <int R>
inline void packed_rows(const float *__restrict w, const float *__restrict c, wide (&sums)[R][2], long units) {
    wide odd[2] = {};
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = wide{};
    long k = 0;
    if (R == 1)
        for (; k + 2 <= units; k += 2, w += 2 * PANEL) {
            const wide *at = (const wide *)w;
            sums[0][0] += c[k] * at[0];
            sums[0][1] += c[k] * at[1];
            odd[0] += c[k + 1] * at[2];
            odd[1] += c[k + 1] * at[3];
        }
    for (; k < units; k++, w += PANEL) {
        const wide left = ((const wide *)w)[0], right = ((const wide *)w)[1];
        for (int r = 0; r < R; r++) {
            sums[r][0] += c[r * units + k] * left;
            sums[r][1] += c[r * units + k] * right;
        }
    }
    if (R == 1) {
        sums[0][0] += odd[0];
        sums[0][1] += odd[1];
    }
}

// out[r · next] = Σ_k weight[k] c[r][k]: one row of an unpacked matrix times R rows c (R, N), N = units.
template <int R>
inline void plain_row(const float *__restrict weight, const float *__restrict c, float *__restrict out, long next,
                      long units) {
    wide sums[R] = {};
    float rest[R] = {};
    long k = 0;
    for (; k + WIDTH <= units; k += WIDTH) {
        const wide at = *(const wide *)(weight + k);
        for (int r = 0; r < R; r++) sums[r] += at * *(const wide *)(c + r * units + k);
    }
    for (; k < units; k++)
        for (int r = 0; r < R; r++) rest[r] += weight[k] * c[r * units + k];
    for (int r = 0; r < R; r++) {
        for (long i = 0; i < WIDTH; i++) rest[r] += sums[r][i];
        out[r * next] = rest[r];
    }
}

// `multiply_panel` for R batch rows, by the packed weights where there are any.
template <int R, bool with_tanh>
inline void panel_rows(const Readers &readers, long panel, const float *c, float *out) {
    const long units = readers.units, all = readers.rows(), first = panel * PANEL;
    const long count = all - first < PANEL ? all - first : PANEL;
    if (!readers.packed) {
        for (long row = first; row < first + count; row++)
            plain_row<R>(readers.matrices[row / units] + row % units * units, c, out + row, all, units);
        for (int r = 0; with_tanh && r < R; r++)
            for (long i = first; i < first + count; i += WIDTH) {
                float *at = out + r * all + i;
                store(at, tanh_of(load(at, first + count - i)), first + count - i);
            }
        return;
    }
    wide sums[R][2];
    packed_rows<R>(readers.packed + first * units, c, sums, units);
    for (int r = 0; r < R; r++)
        for (long half = 0; half < 2 && half * WIDTH < count; half++)
            store(out + r * all + first + half * WIDTH, with_tanh ? tanh_of(sums[r][half]) : sums[r][half],
                  count - half * WIDTH);
}

// out[b] = W c[b], or its tanh if `with_tanh`, for the PANEL rows of W that belong to this panel and all batch rows b.
// W is the matrices of `readers` stacked, c is (B, N), and out (B, count, N).
template <bool with_tanh>
void multiply_panel(const Readers &readers, long panel, const float *c, float *out, long batch) {
    long b = 0;
    for (; b + 4 <= batch; b += 4)
        panel_rows<4, with_tanh>(readers, panel, c + b * readers.units, out + b * readers.rows());
    for (; b < batch; b++)
        panel_rows<1, with_tanh>(readers, panel, c + b * readers.units, out + b * readers.rows());
}

// The sizes from which a second thread saves time: SHARED_FROM multiplications in a step's matrix products, and
// SPREAD_FROM = T·B·N numbers in elementwise work over all steps.
constexpr long SHARED_FROM = 1 << 18, SPREAD_FROM = 1 << 15;

// The state (B, N) that a step reads. If no row is reset it is `state` itself; otherwise it is `kept`, which is written
// with the state and zeros in the reset rows. resets: (B,) bytes, or null.
inline const float *read_state(const float *state, const unsigned char *resets, float *kept, long batch, long units) {
    bool any = false;
    for (long b = 0; resets && b < batch; b++) any |= resets[b];
    if (!any) return state;
    for (long b = 0; b < batch; b++)
        for (long i = b * units; i < (b + 1) * units; i++) kept[i] = resets[b] ? 0.0f : state[i];
    return kept;
}

} // namespace
