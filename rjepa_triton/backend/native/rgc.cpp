// The loop over time and the partials of a reciprocal gated circuit (`rjepa_triton.cells.RGCCell`) on the CPU, float32:
//
//     s(t) = x + tanh(W_ss s) s - tanh(W_ms m) x,        m(t) = x + tanh(W_mm m) m - tanh(W_sm s) x,
//
// with x = x(t), s = s(t-1) and m = m(t-1). Arrays are contiguous except where strides are given.

#include "cells.h"

// T steps from the initial states s0, m0 (B, N).
//
// x       (T, B, N);  ss, ms, mm, sm: the weights (N, N);  resets: (T, B) bytes, or null
// states  (2, T + 1, B, N), written: s and m, initial and after each step
// gates   (2, T, B, 2, N), written by the state read: [0] tanh(W_ss s), tanh(W_sm s); [1] tanh(W_mm m), tanh(W_ms m)
// kept    scratch memory of 2 · B · N numbers for the states that a step with reset rows reads; null if no resets
// packed  scratch memory of 2 · `packed_numbers(2, N)` numbers for repacked weights; null: the weights are read as they
//         are, which is faster for few rows and steps
extern "C" void rgc_scan(const float *x, const float *ss, const float *ms, const float *mm, const float *sm,
                         const float *s0, const float *m0, const unsigned char *resets, float *states, float *gates,
                         float *kept, float *packed, long steps, long batch, long units, long threads) {
    const float *from_source[2][2] = {{ss, sm}, {mm, ms}};
    const long numbers = batch * units, next_state = (steps + 1) * numbers, next_gate = 2 * steps * numbers;
    const bool shared = threads > 1 && 4 * units * numbers >= SHARED_FROM;
    Readers readers[2];
    for (int j = 0; j < 2; j++) {
        float *room = packed ? packed + j * packed_numbers(2, units) : nullptr;
        readers[j] = Readers{from_source[j], 2, units, room};
        if (packed) pack(readers[j], room);
    }
    const long panels = readers[0].panels();
    memcpy(states, s0, numbers * sizeof(float));
    memcpy(states + next_state, m0, numbers * sizeof(float));
    for (long t = 0; t < steps; t++) {
        const float *before[2];
        for (int j = 0; j < 2; j++)
            before[j] = read_state(states + j * next_state + t * numbers, resets ? resets + t * batch : nullptr,
                                   kept + j * numbers, batch, units);
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
        for (long each = 0; each < 2 * panels; each++) {
            const long j = each / panels;
            multiply_panel<true>(readers[j], each % panels, before[j], gates + j * next_gate + t * 2 * numbers, batch);
        }
        for (long b = 0; b < batch; b++) {
            const float *from_s = gates + (t * batch + b) * 2 * units, *from_m = from_s + next_gate;
            const float *given = x + t * numbers + b * units;
            const float *s = before[0] + b * units, *m = before[1] + b * units;
            float *__restrict new_s = states + (t + 1) * numbers + b * units, *__restrict new_m = new_s + next_state;
            for (long i = 0; i < units; i++) new_s[i] = given[i] + from_s[i] * s[i] - from_m[units + i] * given[i];
            for (long i = 0; i < units; i++) new_m[i] = given[i] + from_m[i] * m[i] - from_s[units + i] * given[i];
        }
    }
}

// The partials and RFP's M of T steps. gates (2, T, B, 2, N) are as `rgc_scan` writes them; before (2, T, B, N) are the
// states that the steps read, s and m `next_before` numbers apart; x (T, B, N); resets (T, B) bytes, or null; diagonals
// those of ss, ms, mm and sm, N numbers each, strides[k] apart. Writes out (10, T, B, N): the six numbers that
// `Rgc::partials` finds, then M^{ss}, M^{sm}, M^{ms}, M^{mm}, which are zero at reset steps.
extern "C" void rgc_linearize(const float *gates, const float *before, const float *x, const unsigned char *resets,
                              const float *const *diagonals, const long *strides, float *out, long next_before,
                              long steps, long batch, long units, long threads) {
    const long rows = steps * batch, plane = rows * units;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && plane >= SPREAD_FROM)
    for (long row = 0; row < rows; row++) {
        const float *from_s = gates + row * 2 * units, *from_m = from_s + 2 * plane;
        const float *s = before + row * units, *m = s + next_before, *u = x + row * units;
        const bool reset = resets && resets[row];
        for (long i = 0; i < units; i += WIDTH) {
            const long here = units - i < WIDTH ? units - i : WIDTH;
            const wide c[] = {load(s + i, here), load(m + i, here)}, given = load(u + i, here);
            const wide p[] = {load(from_s + i, here), load(from_m + units + i, here), load(from_m + i, here),
                              load(from_s + units + i, here)};
            wide w[4] = {}, found[Rgc::DISTINCT], whole[4];
            for (int k = 0; k < 4; k++)
                for (long lane = 0; lane < here; lane++) w[k][lane] = diagonals[k][(i + lane) * strides[k]];
            Rgc::partials(c, p, &given, 1, w, found, whole);
            float *to = out + row * units + i;
            for (int k = 0; k < Rgc::DISTINCT; k++, to += plane) store(to, found[k], here);
            for (int k = 0; k < 4; k++, to += plane) store(to, reset ? wide{} : whole[k], here);
        }
    }
}
