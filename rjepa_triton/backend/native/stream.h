// Online learning of one layer with a readout, T steps in one call, on the CPU: forward pass, Γ, readout, loss,
// gradient and optimizer. Include it after a `template <class real> struct Cell` (loops.h says what Cell has).
//
// For each step t, with W as the step before left it:
//
//     p = Σ_k W^k c(t-1), x = W_in u(t) + b, c(t) = F(c(t-1), p, x), o = readout(c^out(t)), L = loss(o, target)
//     Γ^{ν,k} ← Σ_ν' M^{νν'} Γ^{ν',k} + φ^{ν,k} y^kᵀ,    ∂L/∂W^k = Σ_b δ_b Γ^{out,k}_b,  δ = ∂L/∂c^out
//
// or, where the layer predicts itself, o = readout(c^out(t-1)), L = loss(o, c^out(t)), with Γ(t-1) in place of Γ(t), and
// then the optimizer's step of all weights, or at every C-th step, with the gradients' sum. A pass over the rows of
// Γ and W does the last line and the optimizer's step at once, and where there is one batch row, the product with the
// next step's signal too.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#ifdef _OPENMP // a compiler without it builds code for one thread
#include <omp.h>
#endif

#include "readout.h"
#include "strips.h"

namespace {

enum { MSE, CROSS_ENTROPY, HUBER, COSINE, GIVEN }; // losses
enum { FORWARD = 1, LEARN = 2 };                   // phases of a step
constexpr long INPUT = -1, ONE = -2;               // what a matrix may read other than a state

// One of the layer's matrices. reads: a state, INPUT or ONE; of_gate: whether it enters gate `into` or input `into`;
// dims, fan_in: (N,) with fan-in 1, (N, M), or heads of fan_in units; gamma[ν]: Γ^ν, whose batch rows are `next` apart;
// with RTRL gamma[0]: γ (B, H, S·head, …) of these weights, whose rows are `next` apart.
template <class real, long S> struct Matrix {
    Learned<real> learned;
    real *gamma[S];
    long reads, of_gate, into, dims, fan_in, next, phi[S], strips; // strips: its place among the `Strips`, or -1
};

// One network, and what a call gives it.
template <class real> struct Network {
    typedef Cell<real> C;
    typedef typename Lanes<real>::wide wide;
    static constexpr long S = C::S, G = C::G, J = C::J, K = C::K, FOUND = C::FOUND, W = Lanes<real>::width;

    const real *x, *target;
    const long *classes;
    real *outputs, *hidden; // hidden (T, B, N), the layer's outputs, or null
    double *losses;
    const unsigned char *resets, *mask;
    const double *rates;
    real *state, *scratch, *room; // room: for panels, or null
    Readout<real> readout;
    std::vector<Matrix<real, S>> matrices;
    std::vector<Strips<real, S>> strips; // of the matrices that have `strips` ≥ 0
    std::vector<real> jacobians, columns; // of RTRL: J of each batch row and head, and columns of γ of each thread
    long phase, steps, batch, units, features, classes_or_outputs, loss, optimizer, every, position, rule, out, done;
    long head; // with RTRL: the units of a head or block, within which all weights act on all states
    long of_all; // whether a loss is the mean over all batch rows, not over those that count
    long lagged; // whether the layer predicts itself; a step at which no batch row counts is then not learned from
    const double *options; // beta1, beta2, eps, weight decay, Huber's δ, largest norm of the gradient or 0, parts' settings

    real *before, *sums, *drives, *m, *found, *delta, *given, *products; // in `scratch`; products: of `Strips`

    Network(Table &table, const double *options) : options(options) {
        x = table.next<const real>();
        real *const kept = table.next<real>(); // room for x of a step whose halves are two calls, or null
        const void *aims = table.next<const void>();
        target = (const real *)aims, classes = (const long *)aims;
        outputs = table.next<real>(), hidden = table.next<real>();
        losses = table.next<double>();
        resets = table.next<const unsigned char>(), mask = table.next<const unsigned char>();
        rates = table.next<const double>();
        state = table.next<real>(), scratch = table.next<real>(), room = table.next<real>();
        phase = table.next(), steps = table.next(), batch = table.next(), units = table.next();
        features = table.next(), classes_or_outputs = table.next(), loss = table.next(), optimizer = table.next();
        every = table.next(), position = table.next(), rule = table.next(), out = table.next(), done = table.next();
        lagged = table.next(), head = table.next(), of_all = table.next();
        if (kept && (phase & FORWARD)) std::copy_n(x, batch * features, kept);
        if (kept) x = kept;
        readout = Readout<real>(table, batch, units, steps, rates, options + 6);
        matrices.resize(table.next());
        for (auto &k : matrices) {
            k.learned = Learned<real>::next(table, steps, rates);
            for (long nu = 0; nu < S; nu++) k.gamma[nu] = table.next<real>();
            k.reads = table.next(), k.of_gate = table.next(), k.into = table.next(), k.dims = table.next();
            k.fan_in = table.next(), k.next = table.next();
            for (long nu = 0; nu < S; nu++) k.phi[nu] = table.next();
            k.strips = -1;
        }
        const long plane = batch * units;
        before = scratch, sums = before + S * plane, drives = sums + G * plane, m = drives + J * plane;
        found = m + S * S * plane, delta = found + FOUND * plane, given = delta + plane;
        products = given + batch * classes_or_outputs;
        readout.settle(products + (batch == 1 ? matrices.size() * blocks() * W : 0));
    }

    const real *signal(const Matrix<real, S> &k, long t, long b) const {
        return k.reads == INPUT ? x + (t * batch + b) * features : k.reads == ONE ? nullptr
                                                                    : before + (k.reads * batch + b) * units;
    }

    // What matrix k reads at step t, or at the step after it if `after`, of the only batch row.
    const real *read_at(const Matrix<real, S> &k, long t, bool after) const {
        return k.reads == INPUT ? x + (t + after) * features : (after ? state : before) + k.reads * units;
    }

    // How many vectors the units are.
    long blocks() const { return (units + W - 1) / W; }

    // The products of a strip's rows with a signal.
    void multiply_strip(const Matrix<real, S> &k, const real *y, long strip) {
        auto &p = strips[k.strips];
        const long i = strip * W, count = std::min(W, units - i);
        const real *const w = p.learned.weight + i * k.fan_in;
        if (p.by_panels) {
            wide sum{}, more{};
            long j = 0;
            for (; j + 2 <= k.fan_in; j += 2) {
                sum += y[j] * *(const wide *)(w + j * W);
                more += y[j + 1] * *(const wide *)(w + (j + 1) * W);
            }
            if (j < k.fan_in) sum += y[j] * *(const wide *)(w + j * W);
            *(wide *)(p.product + i) = sum + more;
        } else if (k.dims == 3)
            for (long row = 0; row < count; row++)
                p.product[i + row] = dot(w + row * k.fan_in, y + (i + row) / k.fan_in * k.fan_in, k.fan_in);
        else {
            std::fill_n(p.product + i, W, real(0));
            for (long row = 0; row < count; row += 4)
                add_rows(w + row * k.fan_in, std::min(4L, count - row), k.fan_in, 1, [&](long) { return y; },
                         [&](long) { return p.product + i + row; });
        }
    }

    // Advances the Γ of a strip of matrix k, and takes its gradient; then the product with the next step's signal, if
    // the weights have taken their step.
    template <int kind>
    void learn_strip(const Matrix<real, S> &k, long t, long strip, const Optimizer<real, kind> &optimizer, bool sums_up,
                     bool first) {
        const auto &p = strips[k.strips];
        if (sums_up) // whatever the optimizer is
            p.by_panels ? learn_strip_of<SGD, true, false, true>(k, t, strip, {}, first)
                        : learn_strip_of<SGD, true, false, false>(k, t, strip, {}, first);
        else if (p.learned.now() && !lagged && optimizer.plain(p.learned))
            p.by_panels ? learn_strip_of<kind, false, true, true>(k, t, strip, optimizer, first)
                        : learn_strip_of<kind, false, true, false>(k, t, strip, optimizer, first);
        else
            p.by_panels ? learn_strip_of<kind, false, false, true>(k, t, strip, optimizer, first)
                        : learn_strip_of<kind, false, false, false>(k, t, strip, optimizer, first);
    }

    // usual: the weights learn, by an optimizer that is `plain`, and the layer doesn't predict itself. A lane of a
    // vector is a unit of a panel, all units at once, or a column of a row, one unit after the other.
    template <int kind, bool sums_up, bool usual, bool by_panels>
    __attribute__((noinline)) void learn_strip_of(const Matrix<real, S> &k, long t, long strip,
                                                  const Optimizer<real, kind> optimizer, bool first) {
        const auto &p = strips[k.strips];
        const long fan_in = k.fan_in, shown = out, end = by_panels ? strip * W + 1 : std::min(units, (strip + 1) * W);
        const bool forgets = rule == SNAP0 || (resets && resets[t]); // then Γ counts as zero even where it isn't finite
        const bool last = sums_up || t + 1 == steps, lags = !usual && lagged, learns = usual || p.learned.now();
        for (long i = strip * W; i < end; i++) {
            // What the loop reads is copied here: a store may alias what lies in memory, which would be loaded again.
            const auto of_unit = [&](const real *from) { return by_panels ? load(from + i, units - i) : wide{} + from[i]; };
            wide by[S * S], phi[S];
            for (long nu = 0; nu < S; nu++) phi[nu] = k.phi[nu] < 0 ? wide{} : of_unit(found + k.phi[nu] * units);
            for (long each = 0; each < S * S; each++) by[each] = of_unit(m + each * units);
            const wide d = of_unit(delta), descent = optimizer.lr * d;
            const long skip = k.dims == 3 ? i / fan_in * fan_in : 0;
            const real *const y = read_at(k, t, false) + skip, *const next = last ? y : read_at(k, t, true) + skip;
            const auto from = [&](real *all) { return all ? all + i * fan_in : nullptr; };
            real *const weight = from(p.learned.weight), *const total = from(p.learned.total);
            real *const moment = from(p.learned.first), *const square = from(p.learned.second);
            real *gamma[S];
            for (long nu = 0; nu < S; nu++) gamma[nu] = from(p.gamma[nu]);
            if (forgets && !lags)
                for (long nu = 0; nu < S; nu++) std::fill_n(gamma[nu], by_panels ? W * fan_in : fan_in, real(0));
            // `here` weights from `at` on, which read y now and `next` at the next step; returns their part of the product.
            const auto learn_at = [=](long at, auto y, auto next, long here) __attribute__((always_inline)) {
                wide was[S], now[S], earlier{};
                if (lags) earlier = load(gamma[shown] + at, here);
                for (long nu = 0; nu < S; nu++) was[nu] = lags && forgets ? wide{} : load(gamma[nu] + at, here);
                for (long nu = 0; nu < S; nu++) {
                    now[nu] = phi[nu] * y;
                    for (long source = 0; source < S; source++) now[nu] += by[nu * S + source] * was[source];
                    store(gamma[nu] + at, now[nu], here);
                }
                wide of_out = now[0];
                for (long nu = 1; nu < S; nu++) of_out = shown == nu ? now[nu] : of_out;
                if (usual && kind == SGD) { // by a product less than `Optimizer::step`
                    const wide w = load(weight + at, here) - descent * of_out;
                    store(weight + at, w, here);
                    return w * next;
                }
                const wide gradient = d * (lags ? earlier : of_out);
                if (sums_up) {
                    if (learns) store(total + at, first ? gradient : load(total + at, here) + gradient, here);
                    return wide{};
                }
                if (!learns) return load(weight + at, here) * next;
                constexpr bool has_both = usual && (kind == ADAM || kind == ADAMW);
                real *const own = has_both || moment ? moment + at : nullptr;
                real *const squared = has_both || square ? square + at : nullptr;
                return optimizer.template step<usual>(weight + at, own, squared, gradient, here) * next;
            };
            wide product{}, more{}; // of vectors that take turns: each addition waits for the one before
            long j = 0;
            if (by_panels) {
                for (; j + 2 <= fan_in; j += 2) {
                    product += learn_at(j * W, y[j], next[j], W);
                    more += learn_at((j + 1) * W, y[j + 1], next[j + 1], W);
                }
                if (j < fan_in) product += learn_at(j * W, y[j], next[j], W);
                if (!last) *(wide *)(p.product + i) = product + more;
            } else {
                for (; j + 2 * W <= fan_in; j += 2 * W) {
                    product += learn_at(j, *(const wide *)(y + j), *(const wide *)(next + j), W);
                    more += learn_at(j + W, *(const wide *)(y + j + W), *(const wide *)(next + j + W), W);
                }
                for (; j < fan_in; j += W)
                    product += learn_at(j, load(y + j, fan_in - j), load(next + j, fan_in - j), std::min(W, fan_in - j));
                if (!last) p.product[i] = sum_of(product + more, real(0));
            }
        }
    }

    // Adds the product of row i of matrix k to the pre-activation or input that it enters, for all batch rows.
    void multiply_row(const Matrix<real, S> &k, long t, long i) {
        real *to = (k.of_gate ? sums : drives) + k.into * batch * units + i;
        for (long b = 0; b < batch; b++) {
            const real *y = signal(k, t, b);
            to[b * units] += k.dims == 1 ? k.learned.weight[i] * (y ? y[i] : real(1))
                                         : dot(k.learned.weight + i * k.fan_in,
                                               y + (k.dims == 3 ? i / k.fan_in * k.fan_in : 0), k.fan_in);
        }
    }

    // The new states, M and the partials of the units from i on in batch row b.
    void move(long t, long b, long i) {
        const long here = units - i < W ? units - i : W, plane = batch * units, at = b * units + i;
        wide c[S], p[at_least_one(G)], input[at_least_one(J)], w[at_least_one(K)] = {}, now[S], kept[at_least_one(C::KEPT)];
        wide partial[at_least_one(FOUND)], whole[S * S];
        for (long nu = 0; nu < S; nu++) c[nu] = load(before + nu * plane + at, here);
        for (long g = 0; g < G; g++) p[g] = load(sums + g * plane + at, here);
        for (long j = 0; j < J; j++) input[j] = load(drives + j * plane + at, here);
        for (long k = 0; k < K && rule == RFP; k++) {
            const auto &one = matrices[k];
            if (one.dims == 1) {
                w[k] = load(one.learned.weight + i, here);
                continue;
            }
            for (long lane = 0; lane < here; lane++) {
                const long unit = i + lane, column = one.dims == 3 ? unit % one.fan_in : unit;
                w[k][lane] = one.strips < 0 || !strips[one.strips].by_panels
                                 ? one.learned.weight[unit * one.fan_in + column]
                                 : strips[one.strips].learned.weight[i * one.fan_in + unit * W + lane];
            }
        }
        wide h[at_least_one(C::FIXED)];
        C::prepare(input, h);
        C::update(c, p, input, h, now, kept);
        C::partials(c, kept, input, h, w, partial, whole);
        for (long nu = 0; nu < S; nu++) {
            store(state + nu * plane + at, now[nu], here);
            if (hidden && nu == out) store(hidden + t * plane + at, now[nu], here);
        }
        for (long k = 0; k < FOUND; k++) store(found + k * plane + at, partial[k], here);
        const bool forgets = resets && resets[t * batch + b];
        for (long k = 0; k < S * S; k++) {
            const bool kept = !forgets && keeps(rule, k / S, k % S);
            store(m + k * plane + at, kept ? whole[k] : wide{}, here);
        }
    }

    // The loss of a step, and its gradient with respect to the outputs in `given` (B, O).
    double judge(long t) {
        const long O = classes_or_outputs;
        const real *o = outputs + t * batch * O;
        const unsigned char *counts = mask ? mask + t * batch : nullptr;
        long rows = 0;
        for (long b = 0; b < batch; b++) rows += of_all || !counts || counts[b];
        double sum = 0;
        for (long b = 0; b < batch; b++) {
            const real *out = o + b * O, *aim = loss == CROSS_ENTROPY ? nullptr
                                                : lagged && !target ? state + (this->out * batch + b) * units
                                                         : target + (t * batch + b) * O;
            real *to = given + b * O;
            if (counts && !counts[b]) {
                for (long i = 0; i < O; i++) to[i] = 0;
                continue;
            }
            if (loss == MSE || loss == HUBER) {
                const real edge = options[4];
                for (long i = 0; i < O; i++) {
                    const real off = out[i] - aim[i], size = std::abs(off);
                    const bool square = loss == MSE || size <= edge;
                    sum += loss == MSE ? off * off : square ? real(0.5) * off * off : edge * (size - real(0.5) * edge);
                    to[i] = (loss == MSE ? 2 * off : square ? off : off > 0 ? edge : -edge) / (rows * O);
                }
            } else if (loss == CROSS_ENTROPY) {
                const long wanted = classes[t * batch + b];
                real most = out[0], all = 0;
                for (long i = 1; i < O; i++) most = out[i] > most || out[i] != out[i] ? out[i] : most;
                for (long i = 0; i < O; i++) all += to[i] = std::exp(out[i] - most);
                sum += std::log(all) + most - out[wanted];
                for (long i = 0; i < O; i++) to[i] = (to[i] / all - (i == wanted)) / rows;
            } else if (loss == COSINE) {
                real along = 0, ours = 0, theirs = 0;
                for (long i = 0; i < O; i++)
                    along += out[i] * aim[i], ours += out[i] * out[i], theirs += aim[i] * aim[i];
                const real floor = 1e-8, by = std::max(std::sqrt(ours), floor), of = std::max(std::sqrt(theirs), floor);
                const real cosine = along / (by * of);
                sum += 1 - cosine;
                for (long i = 0; i < O; i++)
                    to[i] = -(aim[i] / (by * of) - (by > floor ? cosine * out[i] / (by * by) : real(0))) / rows;
            } else
                for (long i = 0; i < O; i++) sum += aim[i] * out[i], to[i] = aim[i];
        }
        if (loss == GIVEN) return sum;
        return rows ? sum / (rows * (loss == MSE || loss == HUBER ? O : 1)) : 0;
    }

    // The coefficients of unit i's rows of Γ in batch row b. kept[ν'] is false where all M^{νν'} are zero, as after a
    // reset: Γ^ν' then counts as zero, even where it isn't finite.
    struct Coefficients {
        real m[S][S], phi[S], delta;
        bool kept[S], all, lagged;

        Coefficients(const Network &n, const Matrix<real, S> &k, long at) {
            const long plane = n.batch * n.units;
            all = true, lagged = n.lagged, delta = n.delta[at];
            for (long nu = 0; nu < S; nu++) phi[nu] = k.phi[nu] < 0 ? real(0) : n.found[k.phi[nu] * plane + at];
            for (long source = 0; source < S; source++) {
                kept[source] = false;
                for (long nu = 0; nu < S; nu++) {
                    m[nu][source] = n.m[(nu * S + source) * plane + at];
                    kept[source] |= m[nu][source] != 0;
                }
                all &= kept[source];
            }
        }

        // Advances `here` numbers of Γ^ν at gamma[ν] + at, which read y, and returns δ Γ^out, of before if `lagged`.
        template <bool some_forgotten>
        __attribute__((always_inline)) inline wide advance(real *const *gamma, long at, wide y, long out, long here) const {
            wide was[S], now[S], earlier{};
            if (lagged && delta != 0) earlier = load(gamma[out] + at, here); // δ is 0 in a row that was reset
            for (long nu = 0; nu < S; nu++)
                was[nu] = some_forgotten && !kept[nu] ? wide{} : load(gamma[nu] + at, here);
            for (long nu = 0; nu < S; nu++) {
                now[nu] = phi[nu] * y;
                for (long source = 0; source < S; source++) now[nu] += m[nu][source] * was[source];
                store(gamma[nu] + at, now[nu], here);
            }
            wide found = now[0]; // a constant index keeps `now` in registers
            for (long nu = 1; nu < S; nu++) found = out == nu ? now[nu] : found;
            return delta * (lagged ? earlier : found);
        }
    };

    // How many rows of a matrix `learn_rows` takes at once: their gradient fits in TOGETHER numbers, and their Γ takes more
    // than a page, at whose end a processor stops to fetch ahead.
    static constexpr long TOGETHER = 8192;
    static long rows_together(long fan_in) { return std::max(1L, std::min(32L, TOGETHER / fan_in)); }

    // Advances the Γ of a few rows of matrix k in several batch rows, and takes their gradient: one batch row after the
    // other, since their Γ lies far apart.
    template <int kind>
    __attribute__((noinline)) void learn_rows(const Matrix<real, S> &k, long t, long i, long rows,
                                              const Optimizer<real, kind> &optimizer, bool sums_up, bool first) {
        for (long from = 0; from < k.fan_in; from += TOGETHER) {
            const long count = std::min(TOGETHER, k.fan_in - from);
            real gradient[TOGETHER];
            std::fill(gradient, gradient + rows * count, real(0));
            for (long b = 0; b < batch; b++)
                for (long row = 0; row < rows; row++) {
                    const Coefficients c(*this, k, b * units + i + row);
                    const real *y = signal(k, t, b) + (k.dims == 3 ? (i + row) / k.fan_in * k.fan_in : 0) + from;
                    real *gamma[S], *sum = gradient + row * count;
                    for (long nu = 0; nu < S; nu++) gamma[nu] = k.gamma[nu] + b * k.next + (i + row) * k.fan_in + from;
                    const auto all = [&](auto some_forgotten) {
                        constexpr bool some = decltype(some_forgotten)::value;
                        long j = 0;
                        for (; j + W <= count; j += W)
                            *(wide *)(sum + j) += c.template advance<some>(gamma, j, *(const wide *)(y + j), out, W);
                        if (const long here = count - j) {
                            const wide more = c.template advance<some>(gamma, j, load(y + j, here), out, here);
                            store(sum + j, load(sum + j, here) + more, here);
                        }
                    };
                    c.all ? all(std::false_type()) : all(std::true_type());
                }
            for (long row = 0; row < rows; row++)
                for (long j = 0; j < count; j += W)
                    take(optimizer, k.learned, (i + row) * k.fan_in + from + j, load(gradient + row * count + j, count - j),
                         count - j, sums_up, first);
        }
    }

    // As `learn_rows`, of a matrix with fan-in 1 for the units from i on.
    template <int kind>
    void learn_units(const Matrix<real, S> &k, long t, long i, const Optimizer<real, kind> &optimizer, bool sums_up,
                     bool first) {
        const long plane = batch * units, here = units - i < W ? units - i : W;
        wide gradient{};
        for (long b = 0; b < batch; b++) {
            const long at = b * units + i;
            const real *read = signal(k, t, b);
            const wide y = k.reads == ONE ? wide{} + real(1) : k.reads == INPUT ? wide{} + *read : load(read + i, here);
            wide was[S], now[S];
            for (long nu = 0; nu < S; nu++) was[nu] = load(k.gamma[nu] + b * k.next + i, here);
            for (long nu = 0; nu < S; nu++) {
                now[nu] = k.phi[nu] < 0 ? wide{} : load(found + k.phi[nu] * plane + at, here) * y;
                for (long source = 0; source < S; source++) {
                    const wide by = load(m + (nu * S + source) * plane + at, here);
                    now[nu] += chosen(by == 0, wide{}, by * was[source]);
                }
                store(k.gamma[nu] + b * k.next + i, now[nu], here);
            }
            const wide d = load(delta + at, here);
            gradient += lagged ? chosen(d == 0, wide{}, d * was[out]) : d * now[out];
        }
        take(optimizer, k.learned, i, gradient, here, sums_up, first);
    }

    // J of RTRL for each batch row and head, (S·head, S·head), by the weights that the step ran with. What joins blocks
    // that are less than what a matrix connects is left out.
    void find_jacobians(const Team &team) {
        const long rows = S * head, heads = units / head, plane = batch * units;
        spread(team, batch * heads, [&](long each) {
            const long b = each / heads, begin = each % heads * head;
            real *const J = jacobians.data() + each * rows * rows;
            std::fill_n(J, rows * rows, real(0));
            for (long nu = 0; nu < S; nu++)
                for (long l = 0; l < head; l++) {
                    const long unit = begin + l, at = b * units + unit;
                    real *const row = J + (nu * head + l) * rows;
                    for (long source = 0; source < S; source++)
                        row[source * head + l] = m[(nu * S + source) * plane + at];
                    for (auto &k : matrices) {
                        if (k.reads < 0 || k.phi[nu] < 0) continue;
                        const long from = k.dims == 1 ? unit : k.dims == 3 ? unit / k.fan_in * k.fan_in : 0;
                        const real phi = found[k.phi[nu] * plane + at], *const w = k.learned.weight + unit * k.fan_in;
                        const long first = std::max(from, begin), end = std::min(from + k.fan_in, begin + head);
                        for (long j = first; j < end; j++) row[k.reads * head + j - begin] += phi * w[j - from];
                    }
                }
        });
    }

    // Of exact RTRL: two vectors of weights of matrix k in one head, from `task` on: γ ← J γ + R in all batch rows, and
    // their gradient Σ_b δ γ. kept: room for 2 W · S · head numbers.
    template <int kind>
    __attribute__((noinline)) void learn_exact(const Matrix<real, S> &k, long t, long task, real *const kept,
                                               const Optimizer<real, kind> &optimizer, bool sums_up, bool first) {
        const long columns = head * k.fan_in, tasks = (columns + 2 * W - 1) / (2 * W), heads = units / head;
        const long which = task / tasks, start = task % tasks * 2 * W, here = std::min(2 * W, columns - start);
        const long rows = S * head, begin = which * head, plane = batch * units;
        const auto get = [&](const real *from, long half) {
            return here > half * W ? load(from + half * W, here - half * W) : wide{};
        };
        const auto put = [&](real *to, long half, wide value) {
            if (here > half * W) store(to + half * W, value, here - half * W);
        };
        wide gradient[2] = {};
        for (long b = 0; b < batch; b++) {
            real *const gamma = k.gamma[0] + (b * heads + which) * rows * k.next + start;
            const real *const J = jacobians.data() + (b * heads + which) * rows * rows;
            const bool forgets = resets && resets[t * batch + b]; // then γ counts as zero even where it isn't finite
            for (long r = 0; r < rows; r++)
                for (long half = 0; half < 2; half++)
                    *(wide *)(kept + (2 * r + half) * W) = forgets ? wide{} : get(gamma + r * k.next, half);
            long r = 0;
            const auto some = [&](auto count) {
                constexpr long R = decltype(count)::value;
                for (; r + R <= rows; r += R) {
                    wide sums[R][2] = {};
                    for (long from = 0; from < rows; from++) {
                        const wide low = *(const wide *)(kept + 2 * from * W), high = *(const wide *)(kept + (2 * from + 1) * W);
                        for (long each = 0; each < R; each++) {
                            const real by = J[(r + each) * rows + from];
                            sums[each][0] += by * low, sums[each][1] += by * high;
                        }
                    }
                    for (long each = 0; each < R; each++)
                        for (long half = 0; half < 2; half++) put(gamma + (r + each) * k.next, half, sums[each][half]);
                }
            };
            if (BYTES == 64) some(std::integral_constant<long, 8>{}); // whose 32 registers hold as many sums
            some(std::integral_constant<long, 4>{});
            some(std::integral_constant<long, 1>{});
            const real *const y = signal(k, t, b);
            long i = start / k.fan_in, j = start % k.fan_in;
            for (long lane = 0; lane < here; lane++, j++) {
                if (j == k.fan_in) i++, j = 0;
                const long unit = begin + i;
                const real read = !y ? real(1) : y[k.dims == 1 ? unit : k.dims == 3 ? unit / k.fan_in * k.fan_in + j : j];
                for (long nu = 0; nu < S; nu++)
                    if (k.phi[nu] >= 0)
                        gamma[(nu * head + i) * k.next + lane] += found[k.phi[nu] * plane + b * units + unit] * read;
            }
            const real *const d = delta + b * units + begin;
            if (std::all_of(d, d + head, [](real one) { return one == 0; })) continue; // even where γ is NaN
            for (long l = 0; l < head; l++)
                for (long half = 0; half < 2; half++)
                    gradient[half] += d[l] * get(gamma + (out * head + l) * k.next, half);
        }
        for (long half = 0; half < 2 && here > half * W; half++)
            take(optimizer, k.learned, begin * k.fan_in + start + half * W, gradient[half], std::min(W, here - half * W),
                 sums_up, first);
    }

    // Of the units from `first` to `end`: the state before step t, and pre-activations and inputs without their products.
    void begin_step(long t, long first, long end) {
        const long count = end - first;
        const bool passes = features_are_inputs();
        for (long b = 0; b < batch; b++) {
            const long at = b * units + first, plane = batch * units;
            const bool forgets = resets && resets[t * batch + b];
            for (long nu = 0; nu < S; nu++)
                if (forgets)
                    std::fill_n(before + nu * plane + at, count, real(0));
                else
                    std::copy_n(state + nu * plane + at, count, before + nu * plane + at);
            for (long g = 0; g < G; g++) std::fill_n(sums + g * plane + at, count, real(0));
            for (long j = 0; j < J; j++) std::fill_n(drives + j * plane + at, count, real(0));
            if (passes) std::copy_n(x + t * plane + at, count, drives + at);
        }
    }

    // Whether the layer's input is the cell's own: no matrix reads it.
    bool features_are_inputs() const {
        for (auto &k : matrices)
            if (k.reads == INPUT) return false;
        return features == units;
    }

    // What the readout reads (B, N).
    const real *shown() const { return (lagged ? before : state) + out * batch * units; }

    // Numbers of Γ.
    long numbers() const {
        long sum = 0;
        for (auto &k : matrices) sum += S * batch * units * k.fan_in * (rule == RTRL ? head : 1);
        return sum;
    }

    // Whether a batch row counts for the loss of step t.
    bool counts(long t) const {
        return !mask || std::any_of(mask + t * batch, mask + (t + 1) * batch, [](unsigned char one) { return one; });
    }

    // Whether weights learn at the steps to come, if they learn at all.
    void let_learn(bool learn) {
        for (auto &k : matrices) k.learned.rests = !learn;
        for (auto &p : strips) p.learned.rests = !learn;
    }

    // Calls work(team) with the team if the readout is large, else by one of its threads alone.
    template <class Work> void on_readout(const Team &team, const Work &work) {
        if (readout.products < SHARED_STREAM)
            once(team, [&] { work(Team()); });
        else
            work(team);
    }

    template <int kind> Optimizer<real, kind> optimizer_after(long updates) const {
        Optimizer<real, kind> o{};
        o.beta1 = options[0], o.beta2 = options[1], o.eps = options[2], o.decay = options[3];
        o.rest1 = 1 - options[0], o.rest2 = 1 - options[1];
        if (kind == ADAM || kind == ADAMW) {
            o.scale1 = 1 - std::pow(options[0], double(updates + 1));
            o.scale2 = 1 / std::sqrt(1 - std::pow(options[1], double(updates + 1)));
        }
        o.begins = updates == 0;
        return o;
    }

    // The step of all weights by the gradients that were summed, which are scaled if their norm is too large.
    template <int kind> void update(const Optimizer<real, kind> &optimizer, long t) {
        std::vector<std::pair<Learned<real> *, long>> all;
        for (auto &part : readout.parts)
            if (part.kind == LINEAR) {
                all.push_back({&part.weight, part.out * part.in});
                if (part.bias.weight) all.push_back({&part.bias, part.out});
            }
        for (auto &k : matrices)
            if (k.strips >= 0 && strips[k.strips].by_panels)
                all.push_back({&strips[k.strips].learned, blocks() * W * k.fan_in});
            else
                all.push_back({&k.learned, units * k.fan_in});
        double square = 0;
        for (auto &[one, count] : all)
            for (long i = 0; one->learns && i < count; i++) square += double(one->total[i]) * one->total[i];
        const double most = options[5], by = most > 0 ? std::min(1.0, most / (std::sqrt(square) + 1e-6)) : 1;
        for (auto &[one, count] : all) {
            const auto own = optimizer.at(*one, t);
            for (long i = 0; one->learns && i < count; i += W) {
                const long here = count - i < W ? count - i : W;
                take(own, *one, i, load(one->total + i, here) * real(by), here, false, true);
            }
        }
    }

    template <int kind> void run(long threads) {
        const long blocks = this->blocks();
        const bool sums_up = every > 1 || options[5] > 0;
        if (rule == RTRL && (phase & LEARN)) {
            jacobians.resize(batch * units * S * S * head);
            columns.resize(threads * 2 * W * S * head);
        }
        if (batch == 1 && rule != RTRL) {
            real *at = room;
            strips.reserve(matrices.size());
            for (auto &k : matrices)
                if (k.fan_in > 1) {
                    real *const product = products + strips.size() * blocks * W;
                    k.strips = strips.size();
                    strips.emplace_back(k.learned, k.gamma, units, k.fan_in, product, room && k.dims == 2 ? &at : nullptr);
                }
        }
        // Whether a thread needs, up to the new states, only what it wrote itself: then no thread waits for another.
        bool alone = batch == 1 && !sums_up;
        for (auto &k : matrices) alone &= k.strips >= 0 || k.dims == 1;
        const auto multiply = [&](const Team &team, const auto &k, long t, bool waits) {
            real *to = (k.of_gate ? sums : drives) + k.into * batch * units;
            if (k.strips >= 0) {
                const real *y = read_at(k, t, false);
                const bool multiplies = sums_up || t == 0, adds = k.reads == INPUT || !(resets && resets[t]);
                spread(
                    team, blocks,
                    [&](long block) {
                        if (multiplies) multiply_strip(k, y, block);
                        const long i = block * W;
                        const wide product = *(const wide *)(strips[k.strips].product + i);
                        if (adds) store(to + i, load(to + i, units - i) + product, units - i);
                    },
                    waits);
            } else if (k.dims != 2)
                spread(
                    team, blocks,
                    [&](long block) {
                        for (long i = block * W; i < std::min(units, (block + 1) * W); i++) multiply_row(k, t, i);
                    },
                    waits);
            else
                spread(team, (units + 3) / 4, [&](long four) {
                    const long i = 4 * four;
                    add_rows(k.learned.weight + i * k.fan_in, std::min(4L, units - i), k.fan_in, batch,
                             [&](long b) { return signal(k, t, b); }, [&](long b) { return to + b * units + i; });
                });
        };
        const auto advance = [&](const Team &team, long t) {
            const bool waits = !alone || t == 0;
            spread(team, blocks, [&](long block) { begin_step(t, block * W, std::min(units, (block + 1) * W)); }, waits);
            for (auto &k : matrices) multiply(team, k, t, waits);
            spread(team, batch * blocks, [&](long each) { move(t, each / blocks, each % blocks * W); });
        };
        // The readout's part of a step. at: how many of the steps between two updates have run.
        const auto read_out = [&](const Team &team, long t, long at, bool idle, const Optimizer<real, kind> &optimizer) {
            on_readout(team, [&](const Team &many) {
                if (phase & FORWARD) readout.forward(shown(), outputs + t * batch * classes_or_outputs, many);
                if (!(phase & LEARN)) return;
                once(many, [&] {
                    losses[t] = idle ? 0 : judge(t);
                    if (idle) std::fill(delta, delta + batch * units, real(0));
                    if (idle) let_learn(false);
                });
                if (!idle) readout.learn(shown(), given, delta, optimizer, t, sums_up, at == 0, many);
            });
        };
        const auto learn = [&](const Team &team, long t, long at, const Optimizer<real, kind> &optimizer) {
            if (rule == RTRL) find_jacobians(team);
            for (auto &k : matrices) {
                const auto own = optimizer.at(k.learned, t);
                if (rule == RTRL) {
                    real *const kept = columns.data() + team.me * 2 * W * S * head;
                    spread(
                        team, units / head * ((head * k.fan_in + 2 * W - 1) / (2 * W)),
                        [&](long task) { learn_exact(k, t, task, kept, own, sums_up, at == 0); }, false);
                    continue;
                }
                const long together = rows_together(k.fan_in);
                const bool by_rows = k.strips < 0 && k.fan_in > 1;
                spread(
                    team, by_rows ? (units + together - 1) / together : blocks,
                    [&](long task) {
                        if (k.strips >= 0)
                            learn_strip(k, t, task, own, sums_up, at == 0);
                        else if (k.fan_in == 1)
                            learn_units(k, t, task * W, own, sums_up, at == 0);
                        else
                            learn_rows(k, t, task * together, std::min(together, units - task * together), own, sums_up,
                                       at == 0);
                    },
                    false);
            }
            team.wait();
        };
        const auto all_steps = [&](const Team &team) {
            long at = position, updates = done; // each thread counts for itself
            for (long t = 0; t < steps; t++) {
                const bool idle = (phase & LEARN) && lagged && !counts(t);
                const auto optimizer = optimizer_after<kind>(updates);
                if (phase & FORWARD) advance(team, t);
                read_out(team, t, at, idle, optimizer);
                if (!(phase & LEARN)) continue;
                learn(team, t, at, optimizer);
                if (idle) {
                    once(team, [&] { let_learn(true); });
                    continue;
                }
                if (at == every - 1) {
                    if (sums_up) once(team, [&] { update(optimizer, t); });
                    updates++;
                }
                at = (at + 1) % every;
            }
        };
#ifdef _OPENMP
        if (threads > 1 && numbers() >= SHARED_STREAM) {
            Barrier barrier;
#pragma omp parallel num_threads(threads)
            all_steps({omp_get_num_threads(), omp_get_thread_num(), &barrier});
        } else
#endif
            all_steps({});
        for (auto &p : strips) p.turn_all(true);
        strips.clear();
    }

    void run_any(long threads) {
        if (optimizer == SGD)
            run<SGD>(threads);
        else if (optimizer == ADAM)
            run<ADAM>(threads);
        else if (optimizer == ADAMW)
            run<ADAMW>(threads);
        else
            run<RMSPROP>(threads);
    }
};

// P networks, which threads share; a single one has all threads.
template <class real> void stream(void *const *arrays, const long *numbers, const double *options) {
    Table table{arrays, numbers};
    const long count = table.next(), threads = table.next(), each = table.next();
    std::vector<Network<real>> networks;
    for (long p = 0; p < count; p++) networks.emplace_back(table, options + p * each);
    if (count == 1) return networks[0].run_any(threads); // OpenMP's own part takes a tenth of a small step
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long p = 0; p < count; p++) networks[p].run_any(1);
}

} // namespace

extern "C" void stream_float(void *const *arrays, const long *numbers, const double *options) {
    stream<float>(arrays, numbers, options);
}
extern "C" void stream_double(void *const *arrays, const long *numbers, const double *options) {
    stream<double>(arrays, numbers, options);
}
