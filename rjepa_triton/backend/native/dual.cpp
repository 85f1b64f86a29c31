// The dual form on the CPU, float32, in one pass backward in time over a trajectory:
//
//     λ(t) = δ(t) + M(t+1)ᵀ λ(t+1),        E^g(t) = Σ_ν λ^ν(t) ∂F_ν/∂p^g(t),        E^j(t) = Σ_ν λ^ν(t) ∂F_ν/∂x^j(t)
//
// for each gate g and each input j. The pass computes the partials, M and λ for sixteen units at a time, in registers,
// and never writes them to memory; only E and what the first step passes back are written.

#include <vector>

#include "cells.h"

namespace {

// Several arrays (T, B, N), each with its units contiguous, or null. `apart` holds two distances for each array, in
// numbers: from one step to the next and from one batch row to the next.
template <class Number> struct Arrays {
    Number *const *arrays;
    const long *apart;

    Number *at(int k, long t, long b) const {
        return arrays[k] ? arrays[k] + t * apart[2 * k] + b * apart[2 * k + 1] : nullptr;
    }
};

constexpr long TASK = 256; // a thread takes at most this many registers (WIDTH units each) through all steps at once

// `dual_pass` for one cell. Units are independent of each other here, because M couples only the states of one unit. So
// the B · ⌈N / WIDTH⌉ registers of units are split into tasks, which threads share, and each task runs over all steps.
template <class Cell>
void dual(const float *const *arrays, const long *apart, const Arrays<float> &out, const float *const *diagonals,
          const long *strides, const float *carry, const unsigned char *resets, float *passed, long inputs, long steps,
          long batch, long units, long threads) {
    constexpr int S = Cell::S, G = Cell::G, DISTINCT = Cell::DISTINCT, ENTERING = Cell::ENTERING;
    const auto some = [&](long from) { return Arrays<const float>{arrays + from, apart + 2 * from}; };
    const auto x = some(0), gates = some(inputs), states = some(inputs + G), delta = some(inputs + G + S);
    const long numbers = batch * units, of_row = (units + WIDTH - 1) / WIDTH, all = batch * of_row;
    std::vector<float> own(G * of_row * WIDTH, 0.0f);
    for (int g = 0; g < G; g++)
        for (long i = 0; i < units; i++) own[g * of_row * WIDTH + i] = diagonals[g][i * strides[g]];
    if (carry)
        memcpy(passed, carry, S * numbers * sizeof(float));
    else
        memset(passed, 0, S * numbers * sizeof(float));
    const bool shared = threads > 1 && steps * numbers >= SPREAD_FROM;
    const long each = shared ? (all + threads - 1) / threads : all, task = each < TASK ? each : TASK;
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
    for (long first = 0; first < all; first += task) {
        const long last = first + task < all ? first + task : all;
        const float *const w_at = own.data();
        for (long t = steps - 1; t >= 0; t--)
            for (long at = first, b = first / of_row; at < last; b++) {
                const long begin = b * of_row, end = begin + of_row < last ? begin + of_row : last;
                const bool reset = resets && resets[t * batch + b];
                const float *x_at[MOST_INPUTS], *p_at[G], *c_at[S], *given_at[S];
                float *e_at[ENTERING], *passed_at[S];
                for (int j = 0; j < inputs; j++) x_at[j] = x.at(j, t, b);
                for (int g = 0; g < G; g++) p_at[g] = gates.at(g, t, b);
                for (int k = 0; k < ENTERING; k++) e_at[k] = out.at(k, t, b);
                for (int nu = 0; nu < S; nu++) {
                    c_at[nu] = states.at(nu, t, b);
                    given_at[nu] = delta.at(nu, t, b);
                    passed_at[nu] = passed + nu * numbers + b * units;
                }
                for (; at < end; at++) {
                    const long i = (at - begin) * WIDTH, here = units - i < WIDTH ? units - i : WIDTH;
                    wide given[MOST_INPUTS] = {}, p[G], c[S], w[G], credit[S], found[DISTINCT], m[S * S], e[ENTERING];
                    for (int j = 0; j < inputs; j++) given[j] = load(x_at[j] + i, here);
                    for (int g = 0; g < G; g++) {
                        p[g] = load(p_at[g] + i, here);
                        w[g] = *(const wide *)(w_at + g * of_row * WIDTH + i);
                    }
                    for (int nu = 0; nu < S; nu++) {
                        c[nu] = reset ? wide{} : load(c_at[nu] + i, here);
                        credit[nu] = load(passed_at[nu] + i, here);
                        if (given_at[nu]) credit[nu] += load(given_at[nu] + i, here);
                    }
                    Cell::partials(c, p, given, (int)inputs, w, found, m);
                    Cell::entering(found, credit, e);
                    for (int k = 0; k < ENTERING; k++)
                        if (e_at[k]) store(e_at[k] + i, e[k], here);
                    for (int source = 0; source < S; source++) {
                        wide back{};
                        for (int nu = 0; nu < S; nu++) back += m[nu * S + source] * credit[nu];
                        store(passed_at[source] + i, reset ? wide{} : back, here);
                    }
                }
            }
    }
}

} // namespace

// The dual form (see the top of this file) of the cell with this number: 0 Elman with tanh, 1 Elman with relu, 2 LSTM,
// 3 GRU, 4 RGC. J = inputs, G and S are the cell's numbers of gates and states.
//
// arrays     J + G + 2S arrays (T, B, N), in this order: the inputs x^j; the pre-activations p^g without x (for an RGC
//            their tanh); the states before each step; δ of each state, where null stands for zeros
// apart      their distances, two for each array, as in `Arrays`
// out        the arrays (T, B, N) that are written with what `Cell::entering` gives, in its order; a null is skipped
// out_apart  their distances
// diagonals  the diagonals of the G matrices, N numbers each; those of matrix g lie strides[g] apart
// carry      (S, B, N), the credit that later steps pass to the last step, or null for zeros
// resets     (T, B) bytes, or null; a reset step reads zeros as its state and passes nothing back
// passed     (S, B, N), written: M(1)ᵀ λ(1), the credit that the first step passes to the state before it
extern "C" void dual_pass(const float *const *arrays, const long *apart, float *const *out, const long *out_apart,
                          const float *const *diagonals, const long *strides, const float *carry,
                          const unsigned char *resets, float *passed, long cell, long inputs, long steps, long batch,
                          long units, long threads) {
    const auto run = cell == 0   ? dual<Elman<false>>
                     : cell == 1 ? dual<Elman<true>>
                     : cell == 2 ? dual<Lstm>
                     : cell == 3 ? dual<Gru>
                                 : dual<Rgc>;
    run(arrays, apart, {out, out_apart}, diagonals, strides, carry, resets, passed, inputs, steps, batch, units, threads);
}
