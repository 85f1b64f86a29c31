// What the loops over time are made of: tanh, sigmoid, and a layer's matrices times the states of a few rows. float32.
//
// No -ffast-math, which may have the whole process flush subnormals to zero and lets NaN and infinities be anything. So
// tanh and exp are written here, sixteen numbers at once.

#pragma once

#include <cstddef>
#include <cstring>

#ifdef __AVX512F__ // a call of memcpy would have every register saved
#include <immintrin.h>
#endif

namespace {

// One register of AVX-512, two of AVX, four of SSE and NEON, by the compiler.
constexpr long WIDTH = 16;
constexpr long PANEL = 2 * WIDTH;
constexpr long FEW = 8;
typedef float wide __attribute__((vector_size(64), aligned(sizeof(float)), may_alias));
typedef int bits __attribute__((vector_size(64), aligned(sizeof(int)), may_alias));

inline wide chosen(bits mask, wide yes, wide no) { return (wide)((mask & (bits)yes) | (~mask & (bits)no)); }

// exp of what is between -87 and 88; of what is beyond, of these. To 2 ulp.
inline wide exp_of(wide x) {
    x = chosen(x < -87.0f, wide{} - 87.0f, chosen(x > 88.0f, wide{} + 88.0f, x));
    bits n = __builtin_convertvector(x * 1.44269504088896341f + chosen(x < 0.0f, wide{} - 0.5f, wide{} + 0.5f), bits);
    wide whole = __builtin_convertvector(n, wide);
    wide r = x - whole * 0.693359375f + whole * 2.12194440e-4f; // less n log 2, in two parts: the first is exact
    wide e = 1.979034151e-4f * r + 1.394465964e-3f;
    e = e * r + 8.333497075e-3f;
    e = e * r + 4.166629495e-2f;
    e = e * r + 1.666666587e-1f;
    e = e * r + 5.000000068e-1f;
    e = e * (r * r) + r + 1.0f;
    return e * (wide)((n + 127) << 23); // 2ⁿ
}

// tanh to 2 ulp. Below 0.625 an odd polynomial; above, 1 - 2 / (exp(2|x|) + 1), which is 1 from 9.02 on. Coefficients, and
// those of exp, are those of the least largest relative error: 4.4e-9 of tanh's, 5.2e-11 of exp's between ±log(2)/2.
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

inline wide sigmoid_of(wide x) { return chosen(x != x, x, 1.0f / (1.0f + exp_of(-x))); }

// `count` numbers, at most WIDTH, in the first places of a register, and back.
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

// Matrices (N, N) that read one state, their rows one after the other: as they are, or packed as well.
struct Readers {
    const float *const *matrices;
    long count, units;
    const float *packed; // or null

    long rows() const { return count * units; }
    long panels() const { return (rows() + PANEL - 1) / PANEL; }
};

// What `packed` takes of so many matrices: panels of PANEL rows, [panel][column][row], the last filled up with zeros.
inline long packed_numbers(long count, long units) { return (count * units + PANEL - 1) / PANEL * PANEL * units; }

void pack(const Readers &readers, float *__restrict out) {
    static const float zeros[WIDTH] = {};
    const long units = readers.units;
    for (long first = 0; first < readers.rows(); first += PANEL, out += units * PANEL)
        // a line of a few rows at once is read whole, where rows that lie apart by a power of two drive one another out
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

// A panel times R rows of c (R, N), even and odd columns apart where there is one, since a sum waits for the one before.
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

// A row of a matrix as it is, times R rows of c (R, N): one sum each, `next` apart.
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

// A panel of all matrices times c (B, N): PANEL of the numbers of out (B, count, N), their tanh if asked for.
template <bool with_tanh>
void multiply_panel(const Readers &readers, long panel, const float *c, float *out, long batch) {
    long b = 0;
    for (; b + 4 <= batch; b += 4)
        panel_rows<4, with_tanh>(readers, panel, c + b * readers.units, out + b * readers.rows());
    for (; b < batch; b++)
        panel_rows<1, with_tanh>(readers, panel, c + b * readers.units, out + b * readers.rows());
}

// Products of a step, and numbers of T·B·N of what is done to each alone, from which a second thread is worth calling.
constexpr long SHARED_FROM = 1 << 18, SPREAD_FROM = 1 << 15;

// What a step reads of a state (B, N): as it is, or copied to `kept` with zeros for the rows that are reset.
inline const float *read_state(const float *state, const unsigned char *resets, float *kept, long batch, long units) {
    bool any = false;
    for (long b = 0; resets && b < batch; b++) any |= resets[b];
    if (!any) return state;
    for (long b = 0; b < batch; b++)
        for (long i = b * units; i < (b + 1) * units; i++) kept[i] = resets[b] ? 0.0f : state[i];
    return kept;
}

} // namespace
