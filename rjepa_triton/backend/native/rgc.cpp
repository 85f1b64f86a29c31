// A reciprocal gated circuit (`cells.RGCCell`) on the CPU, float32: its loop over time, and its partials. All arrays are
// contiguous, but where strides are given.

#include "cells.h"

// T steps: states (2, T + 1, B, N) written, from s0 and m0 (B, N) on; gates (2, T, B, 2, N) written; x (T, B, N); resets
// (T, B) bytes or null; weights ss, ms, mm, sm (N, N) each. kept: 2 · B · N numbers for what a step reads where rows are
// reset, or null. packed: room for packed weights, twice `packed_numbers(2, N)`, or null: they are read as they are, which
// is faster for a few rows and steps.
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

// Partials and RFP's M along T steps: gates (2, T, B, 2, N); before
// (2, T, B, N), its states `next_before` apart; x (T, B, N); resets (T, B) bytes or null; diagonals of ss, ms, mm and sm,
// N numbers each `strides` apart. Writes out (10, T, B, N): the gates' partials ss, ms, mm, sm, x's of s and m, and M by
// rows, zero where reset.
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
