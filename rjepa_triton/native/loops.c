// Loops over time for the CPU, float32, arrays contiguous: what `_native` compiles and calls.
//
// No -ffast-math, which may have the whole process flush subnormals to zero and lets NaN and infinities be anything. So
// tanh is written here, sixteen numbers at once.

#include <stddef.h>
#include <string.h>

// One register of AVX-512, two of AVX, four of SSE and NEON, by the compiler.
#define WIDTH 16
#define PANEL (2 * WIDTH)
#define FEW 8
typedef float wide __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int bits __attribute__((vector_size(WIDTH * sizeof(int)), aligned(sizeof(int)), may_alias));

static inline wide chosen(bits mask, wide yes, wide no) { return (wide)((mask & (bits)yes) | (~mask & (bits)no)); }

// tanh to 2 ulp. Below 0.625 an odd polynomial; above, 1 - 2 / (exp(2|x|) + 1), which is 1 from 9.02 on. Coefficients are
// those of the least largest relative error: 4.4e-9 of tanh's, 5.2e-11 of exp's between ±log(2)/2.
static inline wide tanh_of(wide x) {
    bits sign = (bits)x & (int)0x80000000;
    wide size = (wide)((bits)x ^ sign), z = size * size;
    wide low = -5.704986926e-3f * z + 2.063908716e-2f;
    low = low * z - 5.373971505e-2f;
    low = low * z + 1.333144220e-1f;
    low = low * z - 3.333328194e-1f;
    low = low * z * size + size;

    wide twenty = (wide){0} + 20.0f;
    wide doubled = chosen(size < 10.0f, 2.0f * size, twenty); // a NaN's is put back at the end
    bits n = __builtin_convertvector(doubled * 1.44269504088896341f + 0.5f, bits);
    wide whole = __builtin_convertvector(n, wide);
    wide r = doubled - whole * 0.693359375f + whole * 2.12194440e-4f; // less n log 2, in two parts: the first is exact
    wide e = 1.979034151e-4f * r + 1.394465964e-3f;
    e = e * r + 8.333497075e-3f;
    e = e * r + 4.166629495e-2f;
    e = e * r + 1.666666587e-1f;
    e = e * r + 5.000000068e-1f;
    e = e * (r * r) + r + 1.0f;
    wide power = (wide)((n + 127) << 23); // 2ⁿ
    wide high = 1.0f - 2.0f / (e * power + 1.0f);

    wide found = (wide)((bits)chosen(size < 0.625f, low, high) | sign);
    return chosen(x != x, x, found);
}

// tanh in place.
void tanh_all(float *values, long count) {
    for (; count > 0; values += WIDTH, count -= WIDTH) {
        float some[WIDTH] = {0};
        long here = count < WIDTH ? count : WIDTH;
        for (long i = 0; i < here; i++) some[i] = values[i];
        *(wide *)some = tanh_of(*(const wide *)some);
        for (long i = 0; i < here; i++) values[i] = some[i];
    }
}

static inline long panels_of(long units) { return (2 * units + PANEL - 1) / PANEL; }

// Both matrices that read one source, (N, N) each, as panels of PANEL of their 2N rows, [panel][column][row]; the last
// one is filled up with zeros.
static void pack(const float *own, const float *cross, float *restrict out, long units) {
    static const float zeros[WIDTH];
    for (long first = 0; first < 2 * units; first += PANEL) {
        // a line of a few rows at once is read whole, where rows that lie apart by a power of two drive one another out
        for (long k = 0; k < units; k += WIDTH) {
            long columns = units - k < WIDTH ? units - k : WIDTH;
            for (long some = 0; some < PANEL; some += FEW) {
                const float *from[FEW];
                for (long i = 0; i < FEW; i++) {
                    long row = first + some + i;
                    from[i] = row < units ? own + row * units : row < 2 * units ? cross + (row - units) * units : zeros;
                    if (row < 2 * units) from[i] += k;
                }
                float *restrict to = out + k * PANEL + some;
                for (long j = 0; j < columns; j++)
                    for (long i = 0; i < FEW; i++) to[j * PANEL + i] = from[i][j];
            }
        }
        out += units * PANEL;
    }
}

// The tanh of a row's sums as its gates, the first `count` of them.
static inline void put(float *restrict out, wide left, wide right, long count) {
    wide both[2] = {tanh_of(left), tanh_of(right)};
    if (count >= PANEL) {
        ((wide *)out)[0] = both[0];
        ((wide *)out)[1] = both[1];
    } else {
        for (long i = 0; i < count; i++) out[i] = ((const float *)both)[i];
    }
}

// One panel's gates of a row; even and odd columns apart, since a sum waits for the one before.
static inline void one_row(const float *restrict w, const float *restrict c, float *restrict out, long units,
                           long count) {
    wide even[2] = {{0}}, odd[2] = {{0}};
    long k = 0;
    for (; k + 2 <= units; k += 2, w += 2 * PANEL) {
        const wide *at = (const wide *)w;
        even[0] += c[k] * at[0];
        even[1] += c[k] * at[1];
        odd[0] += c[k + 1] * at[2];
        odd[1] += c[k + 1] * at[3];
    }
    if (k < units) {
        const wide *at = (const wide *)w;
        even[0] += c[k] * at[0];
        even[1] += c[k] * at[1];
    }
    put(out, even[0] + odd[0], even[1] + odd[1], count);
}

// The same of four rows, which read the panel once.
static inline void four_rows(const float *restrict w, const float *restrict c, float *restrict out, long units,
                             long count) {
    wide a[2] = {{0}}, b[2] = {{0}}, d[2] = {{0}}, e[2] = {{0}};
    for (long k = 0; k < units; k++, w += PANEL) {
        const wide *at = (const wide *)w;
        wide left = at[0], right = at[1];
        float ca = c[k], cb = c[units + k], cd = c[2 * units + k], ce = c[3 * units + k];
        a[0] += ca * left, a[1] += ca * right;
        b[0] += cb * left, b[1] += cb * right;
        d[0] += cd * left, d[1] += cd * right;
        e[0] += ce * left, e[1] += ce * right;
    }
    put(out, a[0], a[1], count);
    put(out + 2 * units, b[0], b[1], count);
    put(out + 4 * units, d[0], d[1], count);
    put(out + 6 * units, e[0], e[1], count);
}

// A row of a matrix as it is, times `rows` rows of c (B, N): one sum each.
static inline void plain_row(const float *restrict weight, const float *restrict c, float *restrict out, long units,
                             const long rows) {
    wide sums[4] = {{0}};
    float rest[4] = {0};
    long k = 0;
    for (; k + WIDTH <= units; k += WIDTH) {
        wide at = *(const wide *)(weight + k);
        for (long b = 0; b < rows; b++) sums[b] += at * *(const wide *)(c + b * units + k);
    }
    for (; k < units; k++)
        for (long b = 0; b < rows; b++) rest[b] += weight[k] * c[b * units + k];
    for (long b = 0; b < rows; b++) {
        for (long i = 0; i < WIDTH; i++) rest[b] += sums[b][i];
        out[2 * b * units] = rest[b];
    }
}

// Gates (B, 2, N) of one source c (B, N), PANEL of them from `first` on, by its matrices as they are.
static void plain_panel(const float *own, const float *cross, const float *c, float *gates, long first, long batch,
                        long units) {
    const long last = first + PANEL < 2 * units ? first + PANEL : 2 * units;
    for (long row = first; row < last; row++) {
        const float *weight = row < units ? own + row * units : cross + (row - units) * units;
        long b = 0;
        for (; b + 4 <= batch; b += 4) plain_row(weight, c + b * units, gates + 2 * b * units + row, units, 4);
        for (; b < batch; b++) plain_row(weight, c + b * units, gates + 2 * b * units + row, units, 1);
    }
    for (long b = 0; b < batch; b++) tanh_all(gates + 2 * b * units + first, last - first);
}

// The same by its matrices packed.
static void packed_panel(const float *packed, const float *c, float *gates, long first, long batch, long units) {
    const float *w = packed + first * units;
    long b = 0;
    for (; b + 4 <= batch; b += 4)
        four_rows(w, c + b * units, gates + 2 * b * units + first, units, 2 * units - first);
    for (; b < batch; b++) one_row(w, c + b * units, gates + 2 * b * units + first, units, 2 * units - first);
}

// Products of a step from which a second thread is worth calling.
#define SHARED_FROM (1L << 18)

// A reciprocal gated circuit over T steps (`cells.RGCCell`): states (2, T + 1, B, N) written, from s0 and m0 (B, N) on;
// gates (2, T, B, 2, N) written; x (T, B, N); resets (T, B) bytes or NULL; weights ss, ms, mm, sm (N, N) each. kept:
// 2 · B · N numbers for what a step reads where rows are reset, or NULL. packed: room for packed weights,
// 2 · panels · PANEL · N numbers, or NULL: they are read as they are, which is faster for a few rows and steps.
void rgc_scan(const float *x, const float *ss, const float *ms, const float *mm, const float *sm, const float *s0,
              const float *m0, const unsigned char *resets, float *states, float *gates, float *kept, float *packed,
              long steps, long batch, long units, long threads) {
    const float *own[2] = {ss, mm}, *cross[2] = {sm, ms};
    const long numbers = batch * units, panels = panels_of(units), next_packed = panels * PANEL * units;
    const long next_state = (steps + 1) * numbers, next_gate = 2 * steps * numbers;
    const int shared = threads > 1 && 4 * units * numbers >= SHARED_FROM;
    memcpy(states, s0, numbers * sizeof(float));
    memcpy(states + next_state, m0, numbers * sizeof(float));
    for (int j = 0; packed && j < 2; j++) pack(own[j], cross[j], packed + j * next_packed, units);
    for (long t = 0; t < steps; t++) {
        const float *before[2] = {states + t * numbers, states + next_state + t * numbers};
        int any = 0;
        for (long b = 0; resets && b < batch; b++) any |= resets[t * batch + b];
        if (any) {
            for (int j = 0; j < 2; j++) {
                for (long b = 0; b < batch; b++)
                    for (long i = b * units; i < (b + 1) * units; i++)
                        kept[j * numbers + i] = resets[t * batch + b] ? 0.0f : before[j][i];
                before[j] = kept + j * numbers;
            }
        }
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
        for (long each = 0; each < 2 * panels; each++) {
            const long j = each / panels, first = each % panels * PANEL;
            float *out = gates + j * next_gate + t * 2 * numbers;
            if (packed)
                packed_panel(packed + j * next_packed, before[j], out, first, batch, units);
            else
                plain_panel(own[j], cross[j], before[j], out, first, batch, units);
        }
        for (long b = 0; b < batch; b++) {
            const float *from_s = gates + (t * batch + b) * 2 * units, *from_m = from_s + next_gate;
            const float *given = x + t * numbers + b * units;
            const float *s = before[0] + b * units, *m = before[1] + b * units;
            float *restrict new_s = states + (t + 1) * numbers + b * units, *restrict new_m = new_s + next_state;
            for (long i = 0; i < units; i++) new_s[i] = given[i] + from_s[i] * s[i] - from_m[units + i] * given[i];
            for (long i = 0; i < units; i++) new_m[i] = given[i] + from_m[i] * m[i] - from_s[units + i] * given[i];
        }
    }
}

// Numbers of T·B·N from which a second thread is worth calling for what is done to each of them alone.
#define SPREAD_FROM (1L << 15)

// The partials of a reciprocal gated circuit (`cells.RGCCell`) and RFP's M along T steps: gates (2, T, B, 2, N); before
// (2, T, B, N), its states `next_before` apart; x (T, B, N); resets (T, B) bytes or NULL; diagonals of ss, ms, mm and sm,
// N numbers each `strides` apart. Writes out (10, T, B, N): the gates' partials ss, ms, mm, sm, x's of s and m, and M by
// rows, zero where reset.
void rgc_linearize(const float *gates, const float *before, const float *x, const unsigned char *resets,
                   const float *const *diagonals, float *out, const long *strides, long next_before, long steps,
                   long batch, long units, long threads) {
    const long rows = steps * batch, plane = rows * units;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && plane >= SPREAD_FROM)
    for (long row = 0; row < rows; row++) {
        const float *from_s = gates + row * 2 * units, *from_m = from_s + 2 * plane;
        const float *s = before + row * units, *m = s + next_before, *u = x + row * units;
        const float *w_ss = diagonals[0], *w_ms = diagonals[1], *w_mm = diagonals[2], *w_sm = diagonals[3];
        const long d_ss = strides[0], d_ms = strides[1], d_mm = strides[2], d_sm = strides[3];
        const float kept = resets && resets[row] ? 0.0f : 1.0f;
        float *to = out + row * units;
#pragma omp simd
        for (long i = 0; i < units; i++) {
            const float ss = from_s[i], sm = from_s[units + i], mm = from_m[i], ms = from_m[units + i];
            const float by_ss = s[i] - ss * ss * s[i], by_ms = ms * ms * u[i] - u[i];
            const float by_mm = m[i] - mm * mm * m[i], by_sm = sm * sm * u[i] - u[i];
            to[i] = by_ss;
            to[plane + i] = by_ms;
            to[2 * plane + i] = by_mm;
            to[3 * plane + i] = by_sm;
            to[4 * plane + i] = 1.0f - ms;
            to[5 * plane + i] = 1.0f - sm;
            to[6 * plane + i] = kept * (ss + by_ss * w_ss[i * d_ss]);
            to[7 * plane + i] = kept * (by_ms * w_ms[i * d_ms]);
            to[8 * plane + i] = kept * (by_sm * w_sm[i * d_sm]);
            to[9 * plane + i] = kept * (mm + by_mm * w_mm[i * d_mm]);
        }
    }
}

// Mᵀ λ of one step, for `count` units of S states, added to `out`. m: of the step, its planes `plane` apart; credit and
// out: their states as far apart as given.
static inline void pass_back(const float *m, long plane, const float *credit, long credit_state, float *out,
                             long out_state, long states, long count) {
    for (long source = 0; source < states; source++) {
        float *restrict to = out + source * out_state;
        for (long nu = 0; nu < states; nu++) {
            const float *restrict by = m + (nu * states + source) * plane, *restrict from = credit + nu * credit_state;
            for (long i = 0; i < count; i++) to[i] += by[i] * from[i];
        }
    }
}

// λ(t) = δ(t) + M(t+1)ᵀ λ(t+1) and M(1)ᵀ λ(1): m (S, S, T, R), delta and credit (S, T, R), carry (S, R) or NULL, first
// (S, R); R = B·N. Writes credit and first.
void reverse_scan(const float *m, const float *restrict delta, const float *restrict carry, float *credit,
                  float *first, long states, long steps, long count) {
    long plane = steps * count;
    for (long t = steps - 1; t >= 0; t--) {
        for (long nu = 0; nu < states; nu++) {
            float *restrict to = credit + nu * plane + t * count;
            const float *restrict own = delta + nu * plane + t * count;
            if (carry && t == steps - 1)
                for (long i = 0; i < count; i++) to[i] = own[i] + carry[nu * count + i];
            else
                for (long i = 0; i < count; i++) to[i] = own[i];
        }
        if (t < steps - 1)
            pass_back(m + (t + 1) * count, plane, credit + (t + 1) * count, plane, credit + t * count, plane, states,
                      count);
    }
    for (long i = 0; i < states * count; i++) first[i] = 0.0f;
    pass_back(m, plane, credit, plane, first, count, states, count);
}
