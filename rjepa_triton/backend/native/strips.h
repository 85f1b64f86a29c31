// A stream's matrix (stream.h) where there is one batch row: strips of as many rows as a vector has numbers. What is
// learned of a strip is read once a step.

#pragma once

#include "learned.h"

namespace {

constexpr long APART = 9 * 64; // between arrays of panels, which else share a cache's sets
// Fan-in from which the caller's rows serve as well as panels: the sum across a row's last vector, and coefficients that
// are of one row, then take little of a row's time, and copying to panels takes as long as a dozen steps.
constexpr long PANELS_BELOW = 256;

// The weights (N, M) with what the optimizer has of them, and their Γ^ν. In panels they are [strip][M][unit], so that a
// step's coefficients are vectors of units, and the product with a signal needs no sum across a vector. Units that the
// last panel lacks are zeros.
template <class real, long S> struct Strips {
    typedef typename Lanes<real>::wide wide;
    static constexpr long W = Lanes<real>::width;
    Learned<real> rows, learned; // as the caller has them, and as they are learned
    real *gamma_rows[S], *gamma[S], *product; // product: of each row with what it reads, of whole vectors
    long units, fan_in;
    bool by_panels;

    // Copies rows to panels, or, if `back`, panels to rows.
    void turn(real *row, real *panel, bool back) const {
        if (!row) return;
        for (long left = units; left > 0; left -= W, row += W * fan_in) {
            const long here = std::min(W, left);
            for (long j = 0; j < fan_in; j++, panel += W) {
                wide column{};
                if (back) column = *(const wide *)panel;
                for (long lane = 0; lane < here; lane++) {
                    if (back)
                        row[lane * fan_in + j] = column[lane];
                    else
                        column[lane] = row[lane * fan_in + j];
                }
                if (!back) *(wide *)panel = column;
            }
        }
    }

    void turn_all(bool back) {
        if (!by_panels) return;
        turn(rows.weight, learned.weight, back), turn(rows.first, learned.first, back);
        turn(rows.second, learned.second, back), turn(rows.total, learned.total, back);
        for (long nu = 0; nu < S; nu++) turn(gamma_rows[nu], gamma[nu], back);
    }

    // room: where panels of weights that gain by them may lie, aligned to a vector, moved behind them; or null.
    Strips(const Learned<real> &rows, real *const *gammas, long units, long fan_in, real *product, real **room)
        : rows(rows), learned(rows), product(product), units(units), fan_in(fan_in),
          by_panels(room && fan_in < PANELS_BELOW) {
        const auto take = [&](real *given) {
            if (!given || !by_panels) return given;
            *room += (units + W - 1) / W * W * fan_in + APART;
            return *room - ((units + W - 1) / W * W * fan_in + APART);
        };
        learned.weight = take(rows.weight), learned.first = take(rows.first);
        learned.second = take(rows.second), learned.total = take(rows.total);
        for (long nu = 0; nu < S; nu++) gamma_rows[nu] = gammas[nu], gamma[nu] = take(gammas[nu]);
        turn_all(false);
    }
};

} // namespace
