// The loop over time and the partials of the cells whose matrices all read state 0 (Elman, LSTM, GRU), on the CPU,
// float32. Arrays are contiguous except where strides are given.

#include "cells.h"

namespace {

// `gated_scan` for one cell.
template <class Cell>
void run(const Inputs &x, const float *const *weights, const float *const *start, const unsigned char *resets,
         float *states, float *sums, float *kept, float *packed, long steps, long batch, long units, long threads) {
    constexpr int S = Cell::S, G = Cell::G;
    const long numbers = batch * units, next_state = (steps + 1) * numbers;
    const bool shared = threads > 1 && G * units * numbers >= SHARED_FROM;
    const Readers readers{weights, G, units, packed};
    if (packed) pack(readers, packed);
    for (int nu = 0; nu < S; nu++) memcpy(states + nu * next_state, start[nu], numbers * sizeof(float));
    for (long t = 0; t < steps; t++) {
        const float *before[S];
        for (int nu = 0; nu < S; nu++)
            before[nu] = read_state(states + nu * next_state + t * numbers, resets ? resets + t * batch : nullptr,
                                    kept + nu * numbers, batch, units);
        float *drive = sums + t * G * numbers;
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
        for (long panel = 0; panel < readers.panels(); panel++)
            multiply_panel<false>(readers, panel, before[0], drive, batch);
        for (long b = 0; b < batch; b++)
            for (long i = 0; i < units; i += WIDTH) {
                const long here = units - i < WIDTH ? units - i : WIDTH;
                wide c[S], p[G], given[MOST_INPUTS] = {}, now[S];
                for (int nu = 0; nu < S; nu++) c[nu] = load(before[nu] + b * units + i, here);
                for (int g = 0; g < G; g++) p[g] = load(drive + (b * G + g) * units + i, here);
                x.load_at(t, b, i, here, given);
                Cell::update(c, p, given, x.count, now);
                for (int nu = 0; nu < S; nu++)
                    store(states + nu * next_state + (t + 1) * numbers + b * units + i, now[nu], here);
            }
    }
}

// `gated_linearize` for one cell. The T·B rows are independent, so threads share them.
template <class Cell>
void linearize(const Inputs &x, const float *sums, const float *before, const unsigned char *resets,
               const float *const *diagonals, const long *strides, float *out, long next_before, long steps, long batch,
               long units, long threads) {
    constexpr int S = Cell::S, G = Cell::G, DISTINCT = Cell::DISTINCT;
    const long rows = steps * batch, plane = rows * units;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && plane >= SPREAD_FROM)
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < units; i += WIDTH) {
            const long here = units - i < WIDTH ? units - i : WIDTH;
            wide c[S], p[G], given[MOST_INPUTS] = {}, w[G], found[DISTINCT], m[S * S];
            for (int nu = 0; nu < S; nu++) c[nu] = load(before + nu * next_before + row * units + i, here);
            for (int g = 0; g < G; g++) {
                p[g] = load(sums + (row * G + g) * units + i, here);
                w[g] = wide{};
                for (long lane = 0; lane < here; lane++) w[g][lane] = diagonals[g][(i + lane) * strides[g]];
            }
            x.load_at(row / batch, row % batch, i, here, given);
            Cell::partials(c, p, given, x.count, w, found, m);
            float *to = out + row * units + i;
            for (int k = 0; k < DISTINCT; k++, to += plane) store(to, found[k], here);
            for (int k = 0; k < S * S; k++, to += plane) store(to, resets && resets[row] ? wide{} : m[k], here);
        }
}

} // namespace

// T steps c(t) = F(c(t-1), p(t), x(t)), p^g(t) = W^g c^0(t-1), of the cell with this number: 0 Elman with tanh, 1 Elman
// with relu, 2 LSTM, 3 GRU.
//
// x        (J, T, B, N), its strides over J, T and B in `strides`
// weights  G matrices (N, N);  start: S initial states (B, N);  resets: (T, B) bytes, or null
// states   (S, T + 1, B, N), written: `start`, then the state after each step
// sums     (T, B, G, N), written: the pre-activations p
// kept     scratch memory of S · B · N numbers for the state that a step with reset rows reads; null if no resets
// packed   scratch memory of `packed_numbers(G, N)` numbers for repacked weights; null: weights are read as they are
extern "C" void gated_scan(const float *x, const long *strides, const float *const *weights, const float *const *start,
                           const unsigned char *resets, float *states, float *sums, float *kept, float *packed,
                           long cell, long inputs, long steps, long batch, long units, long threads) {
    const Inputs given{x, strides[0], strides[1], strides[2], (int)inputs};
    const auto scan = cell == 0 ? run<Elman<false>> : cell == 1 ? run<Elman<true>> : cell == 2 ? run<Lstm> : run<Gru>;
    scan(given, weights, start, resets, states, sums, kept, packed, steps, batch, units, threads);
}

// The partials and RFP's M of T steps. sums (T, B, G, N) are the pre-activations; before (S, T, B, N) the states that
// the steps read, states `next_before` numbers apart; diagonals the G matrices' diagonals, N numbers each, those of
// matrix g diagonal_strides[g] apart; x, strides, resets and cell are as in `gated_scan`. Writes out
// (DISTINCT + S·S, T, B, N): what the cell's `partials` finds, then M^{νν'} at DISTINCT + ν · S + ν', zero at
// reset steps.
extern "C" void gated_linearize(const float *x, const long *strides, const float *sums, const float *before,
                                const unsigned char *resets, const float *const *diagonals,
                                const long *diagonal_strides, float *out, long cell, long inputs, long next_before,
                                long steps, long batch, long units, long threads) {
    const Inputs given{x, strides[0], strides[1], strides[2], (int)inputs};
    const auto find = cell == 0   ? linearize<Elman<false>>
                      : cell == 1 ? linearize<Elman<true>>
                      : cell == 2 ? linearize<Lstm>
                                  : linearize<Gru>;
    find(given, sums, before, resets, diagonals, diagonal_strides, out, next_before, steps, batch, units, threads);
}

// Replaces `count` contiguous numbers by their tanh, or by their sigmoid if `sigmoid`. Tests measure the accuracy of
// both functions through it.
extern "C" void activate(float *values, long count, long sigmoid) {
    for (long i = 0; i < count; i += WIDTH) {
        const long here = count - i < WIDTH ? count - i : WIDTH;
        const wide value = load(values + i, here);
        store(values + i, sigmoid ? sigmoid_of(value) : tanh_of(value), here);
    }
}
