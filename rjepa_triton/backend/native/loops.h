// The loops over time of any two-point cell on the CPU: the forward pass, the linearization and the dual form. Include
// it after a `template <class real> struct Cell`, which `rjepa_triton.backend.native.cells` writes from the cell's
// `update`. For a vector of units, Cell has
//
//     S, G, J, K   how many states c, pre-activations p, per-unit inputs x and recurrent matrices W there are
//     reads[k]     the state that matrix k reads;  into[k]: the pre-activation that its product is added to
//     KEPT         how many numbers a forward pass keeps of p for the partials (`Traced.saved`)
//     INPUTS       how many of the inputs x come first that aren't the cell's own `parameters`
//     prepare      the FIXED numbers h that depend on the cell's parameters alone
//     update       the new states now[ν] = F_ν(c, p, x), and the numbers that are kept
//     partials     from the kept numbers in place of p: the FOUND distinct partials of F, the first NEW of which aren't
//                  among the kept numbers, and RFP's M^{νν'} = ∂F_ν/∂c^ν' + Σ_k ∂F_ν/∂p^into[k] w^k over the
//                  matrices that read ν', at m[ν · S + ν']; w^k is the unit's entry on the diagonal of W^k
//     dual         from these and λ: the ENTERING distinct numbers Σ_ν λ^ν ∂F_ν/∂p^g and Σ_ν λ^ν ∂F_ν/∂x^j, and what goes back
//                  to each state, Σ_ν M^{νν'} λ^ν
//
// Each function takes a table of arrays and a table of numbers, in the order in which they are listed. An array (T, B,
// N) has its units contiguous; in the table of numbers two distances stand for it, in numbers: from one step to the
// next, and from one batch row to the next.

#pragma once

#include <vector>

#include "products.h"

namespace {

// Reads a table from its beginning.
struct Table {
    void *const *array;
    const long *number;

    template <class real> real *next() { return (real *)*array++; }
    long next() { return *number++; }
};

// Some arrays (T, B, N), as described above. An array may be null.
template <class real> struct Arrays {
    real *const *arrays;
    const long *apart;

    real *at(long k, long t, long b) const {
        return arrays[k] ? arrays[k] + t * apart[2 * k] + b * apart[2 * k + 1] : nullptr;
    }
};

template <class real> Arrays<real> some(Table &table, long count) {
    const Arrays<real> found{(real *const *)table.array, table.number};
    table.array += count, table.number += 2 * count;
    return found;
}

constexpr long at_least_one(long count) { return count ? count : 1; }

// A weight of one matrix: (N,), one number a unit; (N, N); or (H, b, b), H heads of b units. dims = 0: not the weight but
// its product with the state, (B, N), whose rows are `head` apart.
template <class real> struct Weight {
    const real *numbers;
    long dims, head;
};

// The numbers h of a cell. Where its parameters are the same at all steps and rows, they are computed once.
template <class real> struct Prepared {
    typedef Cell<real> C;
    typedef typename Lanes<real>::wide wide;
    static constexpr long W = Lanes<real>::width, HELD = at_least_one(C::FIXED);
    std::vector<real> held;
    long blocks = 0;

    Prepared(const Arrays<real> &x, long steps, long batch, long units) {
        if (!C::FIXED || steps * batch < 2) return;
        for (long j = C::INPUTS; j < C::J; j++)
            for (long row = 1; row < steps * batch; row++) // a comparison takes a hundredth of what it may save
                if (memcmp(x.at(j, row / batch, row % batch), x.at(j, 0, 0), units * sizeof(real))) return;
        blocks = (units + W - 1) / W;
        held.resize(HELD * blocks * W);
        for (long i = 0; i < units; i += W) {
            wide given[at_least_one(C::J)] = {}, h[HELD];
            for (long j = C::INPUTS; j < C::J; j++) given[j] = load(x.at(j, 0, 0) + i, units - i);
            C::prepare(given, h);
            for (long k = 0; k < C::FIXED; k++) memcpy(&held[k * blocks * W + i], &h[k], sizeof(wide));
        }
    }

    // h of the units from i on, whose inputs are given.
    inline void at(long i, const wide *given, wide *h) const {
        if (C::FIXED && blocks)
            for (long k = 0; k < C::FIXED; k++) h[k] = *(const wide *)&held[k * blocks * W + i];
        else if (C::FIXED)
            C::prepare(given, h);
    }
};

// out[b] = W c[b] of a matrix by heads, for all rows; c and out are (B, N), the rows of `out` `next` numbers apart.
template <class real>
void multiply_heads(const Weight<real> &weight, const real *c, real *out, long next, long batch, long units) {
    for (long b = 0; b < batch; b++)
        for (long i = 0; i < units; i++) {
            const real *row = weight.numbers + i * weight.head;
            plain_rows<1, 1>(&row, c + b * units + i / weight.head * weight.head, out + b * next + i, 1, weight.head);
        }
}

// T steps c(t) = F(c(t-1), p(t), x(t)), p^g(t) = Σ_{k into g} W^k c^{reads k}(t-1).
//
// arrays   J inputs x, KEPT arrays that are kept (each written, or null), K weights, S initial states (B, N), S states
//          (T + 1, B, N) that are written: the initial one, then the one after each step; resets (T, B) bytes or null;
//          scratch memory: S · B · N numbers if there are resets; K · B · N numbers; and for packed weights
//          `packed_numbers(K, N)` and PANEL · N more for each state, or null: weights are read as they are
// numbers  2 (J + KEPT) distances; of each weight the number of its dimensions, and b; T, B, N, threads
//
// With T = 1, a weight may be its product (`Weight`).
template <class real> void scan(Table table) {
    typedef Cell<real> C;
    typedef typename Lanes<real>::wide wide;
    constexpr long S = C::S, J = C::J, K = C::K, KEPT = C::KEPT, W = Lanes<real>::width;
    const auto x = some<real>(table, J), saved = some<real>(table, KEPT);
    Weight<real> weights[at_least_one(K)];
    for (long k = 0; k < K; k++) {
        weights[k].numbers = table.next<const real>();
        weights[k].dims = table.next(), weights[k].head = table.next();
    }
    const real *start[S];
    real *states[S];
    for (long nu = 0; nu < S; nu++) start[nu] = table.next<const real>();
    for (long nu = 0; nu < S; nu++) states[nu] = table.next<real>();
    const auto resets = table.next<const unsigned char>();
    real *const kept = table.next<real>(), *const sums = table.next<real>(), *packed = table.next<real>();
    const long steps = table.next(), batch = table.next(), units = table.next(), threads = table.next();
    const long numbers = batch * units, blocks = (units + W - 1) / W;

    // the dense matrices, by the state that they read; where each product of a step lies, and how far its rows are apart
    const real *dense[at_least_one(K)];
    Readers<real> readers[S];
    real *product[at_least_one(K)];
    long next_row[at_least_one(K)], done = 0, panels = 0, first_panel[S + 1] = {};
    for (long nu = 0; nu < S; nu++) {
        const long begin = done;
        for (long k = 0; k < K; k++)
            if (C::reads[k] == nu && weights[k].dims == 2) dense[done++] = weights[k].numbers;
        const long count = done - begin;
        long place = 0;
        for (long k = 0; k < K; k++)
            if (C::reads[k] == nu && weights[k].dims == 2) {
                product[k] = sums + begin * numbers + place++ * units;
                next_row[k] = count * units;
            }
        readers[nu] = {dense + begin, count, units, packed};
        if (packed && count) {
            pack(readers[nu], packed);
            packed += packed_numbers<real>(count, units);
        }
        panels += readers[nu].panels();
        first_panel[nu + 1] = panels;
    }
    const Prepared<real> prepared(x, steps, batch, units);
    long by_heads = done;
    for (long k = 0; k < K; k++)
        if (weights[k].dims == 3) product[k] = sums + by_heads++ * numbers, next_row[k] = units;
    for (long k = 0; k < K; k++)
        if (weights[k].dims == 0) product[k] = (real *)weights[k].numbers, next_row[k] = weights[k].head;

    const bool shared = threads > 1 && done * units * numbers >= SHARED_FROM;
    for (long nu = 0; nu < S; nu++)
        if (states[nu] != start[nu]) memcpy(states[nu], start[nu], numbers * sizeof(real));
    for (long t = 0; t < steps; t++) {
        const real *before[S];
        for (long nu = 0; nu < S; nu++)
            before[nu] = read_state(states[nu] + t * numbers, resets ? resets + t * batch : nullptr,
                                    kept ? kept + nu * numbers : nullptr, batch, units);
        for (long k = 0; k < K; k++)
            if (weights[k].dims == 3)
                multiply_heads(weights[k], before[C::reads[k]], product[k], next_row[k], batch, units);
        const auto multiply = [&](long each) {
            long nu = 0;
            while (each >= first_panel[nu + 1]) nu++;
            multiply_panel(readers[nu], each - first_panel[nu], before[nu],
                           sums + (readers[nu].matrices - dense) * numbers, batch);
        };
        const auto move = [&](long each) {
            const long b = each / blocks, i = each % blocks * W, here = units - i < W ? units - i : W;
            wide c[S], p[at_least_one(C::G)] = {}, given[at_least_one(J)], now[S], saving[at_least_one(C::KEPT)];
            for (long nu = 0; nu < S; nu++) c[nu] = load(before[nu] + b * units + i, here);
            for (long k = 0; k < K; k++)
                p[C::into[k]] += weights[k].dims == 1 ? load(weights[k].numbers + i, here) * c[C::reads[k]]
                                                      : load(product[k] + b * next_row[k] + i, here);
            for (long j = 0; j < J; j++) given[j] = load(x.at(j, t, b) + i, here);
            wide h[at_least_one(C::FIXED)];
            prepared.at(i, given, h);
            C::update(c, p, given, h, now, saving);
            for (long k = 0; k < KEPT; k++)
                if (real *to = saved.at(k, t, b)) store(to + i, saving[k], here);
            for (long nu = 0; nu < S; nu++) store(states[nu] + (t + 1) * numbers + b * units + i, now[nu], here);
        };
        if (!shared) {
            for (long each = 0; each < panels; each++) multiply(each);
            for (long each = 0; each < batch * blocks; each++) move(each);
            continue;
        }
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (long each = 0; each < panels; each++) multiply(each);
#pragma omp for schedule(static)
            for (long each = 0; each < batch * blocks; each++) move(each);
        }
    }
}

// What a rule keeps of M^{νν'}: RFP all of it, e-prop the part through no matrix, RFLO of that what ν = ν' has, SnAp-0
// none. The part through a matrix is w^k times what enters by it, so that w^k = 0 leaves it out.
enum { RFP, EPROP, RFLO, SNAP0, RTRL };

inline bool keeps(long rule, long nu, long source) { return rule != SNAP0 && (rule != RFLO || nu == source); }

// The partials of T steps, and M as a rule has it.
//
// arrays   J inputs x; KEPT arrays that were kept; S states before each step; K diagonals of N numbers; resets (T, B) bytes or
//          null; out (NEW + S · S, T, B, N), written: what `partials` finds anew, then M^{νν'}, which is zero at reset
//          steps
// numbers  2 (J + KEPT + S) distances; the distance of each diagonal's numbers; T, B, N, threads; the rule
template <class real> void linearize(Table table) {
    typedef Cell<real> C;
    typedef typename Lanes<real>::wide wide;
    constexpr long S = C::S, J = C::J, K = C::K, KEPT = C::KEPT, NEW = C::NEW, W = Lanes<real>::width;
    const auto x = some<real>(table, J), saved = some<real>(table, KEPT), states = some<real>(table, S);
    const real *diagonals[at_least_one(K)];
    long strides[at_least_one(K)];
    for (long k = 0; k < K; k++) diagonals[k] = table.next<const real>(), strides[k] = table.next();
    const auto resets = table.next<const unsigned char>();
    real *const out = table.next<real>();
    const long steps = table.next(), batch = table.next(), units = table.next(), threads = table.next();
    const long rule = table.next(), rows = steps * batch, plane = rows * units;
    const Prepared<real> prepared(x, steps, batch, units);
    std::vector<real> together; // the diagonals whose numbers lie apart: every row reads them
    if (rule == RFP) together.resize(K * units);
    for (long k = 0; k < K && rule == RFP; k++) {
        if (strides[k] == 1) continue;
        for (long i = 0; i < units; i++) together[k * units + i] = diagonals[k][i * strides[k]];
        diagonals[k] = together.data() + k * units;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && plane >= SPREAD_FROM)
    for (long row = 0; row < rows; row++) {
        const long t = row / batch, b = row % batch;
        for (long i = 0; i < units; i += W) {
            const long here = units - i < W ? units - i : W;
            wide c[S], kept[at_least_one(KEPT)], given[at_least_one(J)], w[at_least_one(K)] = {};
            wide found[at_least_one(C::FOUND)], m[S * S];
            for (long nu = 0; nu < S; nu++) c[nu] = load(states.at(nu, t, b) + i, here);
            for (long k = 0; k < KEPT; k++) kept[k] = load(saved.at(k, t, b) + i, here);
            for (long j = 0; j < J; j++) given[j] = load(x.at(j, t, b) + i, here);
            for (long k = 0; k < K && rule == RFP; k++) w[k] = load(diagonals[k] + i, here);
            wide h[at_least_one(C::FIXED)];
            prepared.at(i, given, h);
            C::partials(c, kept, given, h, w, found, m);
            real *to = out + row * units + i;
            for (long k = 0; k < NEW; k++, to += plane) store(to, found[k], here);
            for (long k = 0; k < S * S; k++, to += plane)
                store(to, keeps(rule, k / S, k % S) && !(resets && resets[row]) ? m[k] : wide{}, here);
        }
    }
}

// Steps and their linearization: `scan` and `linearize`, in memory that is made for both.
//
// arrays   J inputs x (T, B, N); K weights; S states before the first step (B, N); resets (B) bytes or null, of one step
//          alone; made, written: what `partials` finds anew and then M^{νν'}, (NEW + S · S, T, B, N); the kept numbers
//          (KEPT, T, B, N); and the states, what the first step reads, zero where reset, and then after each step,
//          (S, T + 1, B, N); memory for packed weights, or null, as in `scan`
// numbers  2 J distances; of each weight the number of its dimensions, and b; T, B, N, threads; the rule
template <class real> void step(Table table) {
    typedef Cell<real> C;
    constexpr long S = C::S, J = C::J, K = C::K, KEPT = C::KEPT, FOUND = C::NEW + S * S;
    const auto x = some<real>(table, J);
    Weight<real> weights[at_least_one(K)];
    for (long k = 0; k < K; k++) {
        weights[k].numbers = table.next<const real>();
        weights[k].dims = table.next(), weights[k].head = table.next();
    }
    const real *start[S];
    for (long nu = 0; nu < S; nu++) start[nu] = table.next<const real>();
    const auto resets = table.next<const unsigned char>();
    real *const made = table.next<real>(), *const packed = table.next<real>();
    const long steps = table.next(), batch = table.next(), units = table.next(), threads = table.next();
    const long rule = table.next(), numbers = batch * units, plane = steps * numbers;
    real *const saved = made + FOUND * plane, *const first = saved + KEPT * plane;
    const auto states = [&](long nu) { return first + nu * (steps + 1) * numbers; };
    for (long nu = 0; nu < S; nu++)
        for (long b = 0; b < batch; b++) {
            if (resets && resets[b])
                memset(states(nu) + b * units, 0, units * sizeof(real));
            else
                memcpy(states(nu) + b * units, start[nu] + b * units, units * sizeof(real));
        }

    // the tables of `scan` and `linearize`, whose memory for products and diagonals is made here
    std::vector<real> sums(K * numbers), diagonals(K * units);
    std::vector<void *> arrays;
    std::vector<long> apart;
    const auto add = [&](real *array, long step, long row) {
        arrays.push_back(array);
        apart.insert(apart.end(), {step, row});
    };
    for (long j = 0; j < J; j++) add(x.arrays[j], x.apart[2 * j], x.apart[2 * j + 1]);
    for (long k = 0; k < KEPT; k++) add(saved + k * plane, numbers, units);
    for (long k = 0; k < K; k++) {
        arrays.push_back((void *)weights[k].numbers);
        apart.insert(apart.end(), {weights[k].dims, weights[k].head});
    }
    for (long nu = 0; nu < S; nu++) arrays.push_back(states(nu));
    for (long nu = 0; nu < S; nu++) arrays.push_back(states(nu));
    arrays.insert(arrays.end(), {nullptr, nullptr, sums.data(), packed});
    apart.insert(apart.end(), {steps, batch, units, threads});
    scan<real>({arrays.data(), apart.data()});

    arrays.resize(J + KEPT), apart.resize(2 * (J + KEPT)); // x and the kept numbers stay
    for (long nu = 0; nu < S; nu++) add(states(nu), numbers, units);
    for (long k = 0; k < K; k++) {
        const Weight<real> &weight = weights[k];
        const long head = weight.dims == 3 ? weight.head : weight.dims == 2 ? units : 0;
        for (long i = 0; i < units; i++)
            diagonals[k * units + i] =
                weight.numbers[weight.dims == 1 ? i : i / head * head * head + i % head * (head + 1)];
        arrays.push_back(diagonals.data() + k * units);
        apart.push_back(1);
    }
    arrays.insert(arrays.end(), {(void *)resets, made});
    apart.insert(apart.end(), {steps, batch, units, threads, rule});
    linearize<real>({arrays.data(), apart.data()});
}

// What the two backward passes below have in common.
//
// arrays   J inputs x; KEPT arrays that were kept; S states before each step; δ of each state, null for zeros; the ENTERING
//          arrays E that are written, null for one that isn't wanted; K weights; carry (S, B, N), the credit that
//          later steps pass to the last one, or null for zeros; resets (T, B) bytes or null: a reset step reads zeros as
//          its state and passes nothing back; passed (S, B, N), written: what the first step passes back
// numbers  2 (J + KEPT + 2S + ENTERING) distances; a number for each weight; T, B, N, threads
template <class real> struct Backward {
    typedef Cell<real> C;
    typedef typename Lanes<real>::wide wide;
    static constexpr long S = C::S, J = C::J, K = C::K, KEPT = C::KEPT, ENTERING = C::ENTERING, W = Lanes<real>::width;

    Arrays<real> x, saved, states, delta, out;
    const real *weights[at_least_one(K)];
    long of_weight[at_least_one(K)];
    const unsigned char *resets;
    real *passed;
    long steps, batch, units, threads, numbers;

    explicit Backward(Table &table)
        : x(some<real>(table, J)), saved(some<real>(table, KEPT)), states(some<real>(table, S)),
          delta(some<real>(table, S)), out(some<real>(table, ENTERING)) {
        for (long k = 0; k < K; k++) weights[k] = table.next<const real>(), of_weight[k] = table.next();
        const real *const carry = table.next<const real>();
        resets = table.next<const unsigned char>();
        passed = table.next<real>();
        steps = table.next(), batch = table.next(), units = table.next(), threads = table.next();
        numbers = batch * units;
        if (carry)
            memcpy(passed, carry, S * numbers * sizeof(real));
        else
            memset(passed, 0, S * numbers * sizeof(real));
    }

    // The units from `first` on to `last` of a batch row at step t: λ = δ + passed, E, and in `passed` what goes back.
    // own: the diagonals of the weights, `apart` numbers apart, or null for zeros: what then goes back enters no matrix.
    inline void row(long t, long b, long first, long last, const Prepared<real> &prepared, const real *own,
                    long apart) const {
        const bool reset = resets && resets[t * batch + b];
        const real *x_at[at_least_one(J)], *kept_at[at_least_one(KEPT)], *c_at[S], *given_at[S];
        real *e_at[at_least_one(ENTERING)], *passed_at[S];
        for (long j = 0; j < J; j++) x_at[j] = x.at(j, t, b);
        for (long k = 0; k < KEPT; k++) kept_at[k] = saved.at(k, t, b);
        for (long k = 0; k < ENTERING; k++) e_at[k] = out.at(k, t, b);
        for (long nu = 0; nu < S; nu++) {
            c_at[nu] = states.at(nu, t, b);
            given_at[nu] = delta.at(nu, t, b);
            passed_at[nu] = passed + nu * numbers + b * units;
        }
        for (long i = first; i < last; i += W) {
            const long here = units - i < W ? units - i : W;
            wide given[at_least_one(J)], kept[at_least_one(KEPT)], c[S], w[at_least_one(K)] = {}, credit[S];
            wide e[at_least_one(ENTERING)], back[S];
            for (long j = 0; j < J; j++) given[j] = load(x_at[j] + i, here);
            for (long k = 0; k < KEPT; k++) kept[k] = load(kept_at[k] + i, here);
            for (long k = 0; own && k < K; k++) w[k] = *(const wide *)(own + k * apart + i);
            for (long nu = 0; nu < S; nu++) {
                c[nu] = reset ? wide{} : load(c_at[nu] + i, here);
                credit[nu] = load(passed_at[nu] + i, here);
                if (given_at[nu]) credit[nu] += load(given_at[nu] + i, here);
            }
            wide h[at_least_one(C::FIXED)];
            prepared.at(i, given, h);
            C::dual(c, kept, given, h, w, credit, e, back);
            for (long k = 0; k < ENTERING; k++)
                if (e_at[k]) store(e_at[k] + i, e[k], here);
            for (long nu = 0; nu < S; nu++) store(passed_at[nu] + i, reset ? wide{} : back[nu], here);
        }
    }
};

constexpr long TASK = 256; // a thread takes at most this many vectors of units through all steps at once

// The dual form, in one pass backward in time:
//
//     λ(t) = δ(t) + M(t+1)ᵀ λ(t+1),        E^g(t) = Σ_ν λ^ν(t) ∂F_ν/∂p^g(t),        E^j(t) = Σ_ν λ^ν(t) ∂F_ν/∂x^j(t)
//
// The partials, M and λ stay in registers; only E and what the first step passes back are written. Units are
// independent here, because M couples only the states of one unit: the B · ⌈N / width⌉ vectors of units are split into
// tasks, which threads share, and each task runs over all steps.
//
// The tables are those of `Backward`. A weight is its diagonal, and its number the distance of that one's numbers.
template <class real> void dual(Table table) {
    typedef Backward<real> Pass;
    constexpr long K = Pass::K, W = Pass::W;
    const Pass pass(table);
    const long steps = pass.steps, units = pass.units, of_row = (units + W - 1) / W, all = pass.batch * of_row;
    std::vector<real> own(at_least_one(K) * of_row * W, real(0));
    for (long k = 0; k < K; k++)
        for (long i = 0; i < units; i++) own[k * of_row * W + i] = pass.weights[k][i * pass.of_weight[k]];
    const bool shared = pass.threads > 1 && steps * pass.numbers >= SPREAD_FROM;
    const long each = shared ? (all + pass.threads - 1) / pass.threads : all, task = each < TASK ? each : TASK;
    if (!all) return;
    const Prepared<real> prepared(pass.x, steps, pass.batch, units);
#pragma omp parallel for schedule(static) num_threads(pass.threads) if (shared)
    for (long first = 0; first < all; first += task) {
        const long last = first + task < all ? first + task : all;
        for (long t = steps - 1; t >= 0; t--)
            for (long at = first, b = first / of_row; at < last; b++) {
                const long begin = b * of_row, end = begin + of_row < last ? begin + of_row : last;
                pass.row(t, b, (at - begin) * W, (end - begin) * W, prepared, own.data(), of_row * W);
                at = end;
            }
    }
}

// Backpropagation through time: the dual form with the exact credit
//
//     λ^ν'(t) = δ^ν'(t) + Σ_ν λ^ν(t+1) ∂F_ν/∂c^ν'(t+1) + Σ_k (W^k)ᵀ E^k(t+1),    k over the matrices that read ν'.
//
// The tables are those of `Backward`. A weight is (N, N), and its number the place of its E^k among the arrays E. Behind
// them: scratch memory for packed weights, K · ⌈N / PANEL⌉ · PANEL · N numbers.
template <class real> void exact(Table table) {
    typedef Backward<real> Pass;
    constexpr long S = Pass::S, K = Pass::K;
    const Pass pass(table);
    real *const packed = table.next<real>();
    const long batch = pass.batch, units = pass.units, panels = (units + PANEL<real> - 1) / PANEL<real>;
    const real *dense[at_least_one(K)];
    long source[at_least_one(K)], begin[S + 1] = {}; // of the matrices in the order of the states that they read
    for (long nu = 0, done = 0; nu < S; nu++, begin[nu] = done)
        for (long k = 0; k < K; k++)
            if (Pass::C::reads[k] == nu) dense[done] = pass.weights[k], source[done++] = pass.of_weight[k];
    const long of_matrix = panels * PANEL<real> * units;
    for (long nu = 0; nu < S; nu++)
        pack_columns(dense + begin[nu], begin[nu + 1] - begin[nu], units, packed + begin[nu] * of_matrix);
    std::vector<real> entering(at_least_one(K) * pass.numbers);
    const bool shared = pass.threads > 1 && K * units * pass.numbers >= SHARED_FROM;
    const Prepared<real> prepared(pass.x, pass.steps, batch, units);
    for (long t = pass.steps - 1; t >= 0; t--) {
        for (long b = 0; b < batch; b++) {
            pass.row(t, b, 0, units, prepared, nullptr, 0);
            for (long nu = 0; nu < S; nu++)
                for (long k = begin[nu], count = begin[nu + 1] - k; k < begin[nu + 1]; k++)
                    memcpy(&entering[begin[nu] * pass.numbers + (b * count + k - begin[nu]) * units],
                           pass.out.at(source[k], t, b), units * sizeof(real));
        }
#pragma omp parallel for schedule(static) num_threads(pass.threads) if (shared)
        for (long each = 0; each < S * panels; each++) {
            const long nu = each / panels;
            add_panel(packed + begin[nu] * of_matrix, &entering[begin[nu] * pass.numbers],
                      pass.passed + nu * pass.numbers, each % panels, (begin[nu + 1] - begin[nu]) * units, batch, units);
        }
        for (long b = 0; pass.resets && b < batch; b++)
            for (long nu = 0; pass.resets[t * batch + b] && nu < S; nu++)
                memset(pass.passed + nu * pass.numbers + b * units, 0, units * sizeof(real));
    }
}

} // namespace

#define EXPORTED(name, real)                                                                                           \
    extern "C" void name##_##real(void *const *arrays, const long *numbers) { name<real>({arrays, numbers}); }
EXPORTED(scan, float)
EXPORTED(scan, double)
EXPORTED(linearize, float)
EXPORTED(linearize, double)
EXPORTED(step, float)
EXPORTED(step, double)
EXPORTED(dual, float)
EXPORTED(dual, double)
EXPORTED(exact, float)
EXPORTED(exact, double)
