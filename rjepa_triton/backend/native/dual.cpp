// The dual form on the CPU, float32: from a trajectory and δ to what enters each gate and each input, in one pass backward
// in time. Partials, M and λ are made on the way, sixteen units at once, and written nowhere.

#include <vector>

#include "cells.h"

namespace {

// Arrays (T, B, N) whose units lie next to one another, or nulls. apart: for each, how far its steps lie apart, and its
// rows.
template <class Number> struct Arrays {
    Number *const *arrays;
    const long *apart;

    Number *at(int k, long t, long b) const {
        return arrays[k] ? arrays[k] + t * apart[2 * k] + b * apart[2 * k + 1] : nullptr;
    }
};

constexpr long TASK = 256; // registers of units that one thread takes through all steps

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

// Of a cell, 0: Elman with tanh, 1: with relu, 2: LSTM, 3: GRU, 4: RGC, whose gates are given as their tanh. arrays, and
// twice as many numbers of how far their steps and rows lie apart: x's J, the gates' G, the states before each step S, δ
// of each S, or nulls for zeros; and what `Cell::entering` gives, written, or nulls. diagonals of the G matrices, N
// numbers each `strides` apart; carry (S, B, N) or null: what later steps pass to the last; resets (T, B) bytes or null.
// Writes passed (S, B, N), M(1)ᵀ λ(1).
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
