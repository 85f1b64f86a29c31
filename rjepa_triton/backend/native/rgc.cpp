// A reciprocal gated circuit (`rjepa_triton.cells.RGCCell`) on the CPU:
//
//     s(t) = x + tanh(W_ss s) s - tanh(W_ms m) x,        m(t) = x + tanh(W_mm m) m - tanh(W_sm s) x,
//
// with x = x(t), s = s(t-1) and m = m(t-1). Its loop has a form of its own, in which threads share the gates' tanh, and
// its gates are kept after their tanh, unlike those of other cells.

#include "products.h"

namespace {

// As loops.h takes it; c = {s, m}; p = {ss, ms, mm, sm}, after their tanh. found: ∂s/∂ss, ∂s/∂ms, ∂m/∂mm, ∂m/∂sm (with
// respect to the pre-activations), ∂s/∂x, ∂m/∂x. e: the credit of ss and sm, which read s; of ms and mm; and of x.
template <class real> struct Cell {
    typedef typename Lanes<real>::wide wide;
    static constexpr long S = 2, G = 4, J = 1, K = 4, FOUND = 6, ENTERING = 5;
    static constexpr long INPUTS = 1, FIXED = 0;
    static constexpr long reads[] = {0, 1, 1, 0}, into[] = {0, 1, 2, 3};

    static inline void prepare(const wide *, wide *) {}

    static inline void partials(const wide *c, const wide *p, const wide *x, const wide *h, const wide *w, wide *found,
                                wide *m) {
        found[0] = c[0] - p[0] * p[0] * c[0];
        found[1] = p[1] * p[1] * x[0] - x[0];
        found[2] = c[1] - p[2] * p[2] * c[1];
        found[3] = p[3] * p[3] * x[0] - x[0];
        found[4] = real(1) - p[1];
        found[5] = real(1) - p[3];
        m[0] = p[0] + found[0] * w[0];
        m[1] = found[1] * w[1];
        m[2] = found[3] * w[3];
        m[3] = p[2] + found[2] * w[2];
    }

    static inline void dual(const wide *c, const wide *p, const wide *x, const wide *h, const wide *w, const wide *credit,
                            wide *e, wide *back) {
        wide found[FOUND], m[4];
        partials(c, p, x, h, w, found, m);
        e[0] = credit[0] * found[0];
        e[1] = credit[1] * found[3];
        e[2] = credit[0] * found[1];
        e[3] = credit[1] * found[2];
        e[4] = credit[0] * found[4] + credit[1] * found[5];
        back[0] = m[0] * credit[0] + m[2] * credit[1];
        back[1] = m[1] * credit[0] + m[3] * credit[1];
    }
};

} // namespace

#define LOOP(name) rgc_##name
#define NO_SCAN
#include "loops.h"

// T steps from the initial states s0, m0 (B, N).
//
// x       (T, B, N);  ss, ms, mm, sm: the weights (N, N);  resets: (T, B) bytes, or null
// states  (2, T + 1, B, N), written: s and m, initial and after each step
// gates   (2, T, B, 2, N), written by the state read: [0] tanh(W_ss s), tanh(W_sm s); [1] tanh(W_mm m), tanh(W_ms m)
// kept    scratch memory of 2 · B · N numbers for the states that a step with reset rows reads; null if no resets
// packed  scratch memory of 2 · `packed_numbers(2, N)` numbers for repacked weights; null: the weights are read as they
//         are, which is faster for few rows and steps
template <class real>
static void rgc_scan(const real *x, const real *ss, const real *ms, const real *mm, const real *sm,
                         const real *s0, const real *m0, const unsigned char *resets, real *states, real *gates,
                         real *kept, real *packed, long steps, long batch, long units, long threads) {
    const real *from_source[2][2] = {{ss, sm}, {mm, ms}};
    const long numbers = batch * units, next_state = (steps + 1) * numbers, next_gate = 2 * steps * numbers;
    const bool shared = threads > 1 && 4 * units * numbers >= SHARED_FROM;
    Readers<real> readers[2];
    for (int j = 0; j < 2; j++) {
        real *room = packed ? packed + j * packed_numbers<real>(2, units) : nullptr;
        readers[j] = {from_source[j], 2, units, room};
        if (packed) pack(readers[j], room);
    }
    const long panels = readers[0].panels();
    memcpy(states, s0, numbers * sizeof(real));
    memcpy(states + next_state, m0, numbers * sizeof(real));
    for (long t = 0; t < steps; t++) {
        const real *before[2];
        for (int j = 0; j < 2; j++)
            before[j] = read_state(states + j * next_state + t * numbers, resets ? resets + t * batch : nullptr,
                                   kept ? kept + j * numbers : nullptr, batch, units);
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
        for (long each = 0; each < 2 * panels; each++) {
            const long j = each / panels;
            multiply_panel<true>(readers[j], each % panels, before[j], gates + j * next_gate + t * 2 * numbers, batch);
        }
        for (long b = 0; b < batch; b++) {
            const real *from_s = gates + (t * batch + b) * 2 * units, *from_m = from_s + next_gate;
            const real *given = x + t * numbers + b * units;
            const real *s = before[0] + b * units, *m = before[1] + b * units;
            real *__restrict new_s = states + (t + 1) * numbers + b * units, *__restrict new_m = new_s + next_state;
            for (long i = 0; i < units; i++) new_s[i] = given[i] + from_s[i] * s[i] - from_m[units + i] * given[i];
            for (long i = 0; i < units; i++) new_m[i] = given[i] + from_m[i] * m[i] - from_s[units + i] * given[i];
        }
    }
}

#define EXPORTED_SCAN(real)                                                                                            \
    extern "C" void rgc_scan_##real(const real *x, const real *ss, const real *ms, const real *mm, const real *sm,     \
                                    const real *s0, const real *m0, const unsigned char *resets, real *states,         \
                                    real *gates, real *kept, real *packed, long steps, long batch, long units,         \
                                    long threads) {                                                                    \
        rgc_scan<real>(x, ss, ms, mm, sm, s0, m0, resets, states, gates, kept, packed, steps, batch, units, threads);  \
    }
EXPORTED_SCAN(float)
EXPORTED_SCAN(double)
