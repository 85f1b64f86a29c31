// The recursion of the sensitivities Γ^ν (B, K, N, M), ν = 1 … S, on the CPU. One pass over their memory advances them
// in place and reads the gradient from them:
//
//     Γ^ν ← Σ_ν' M^{νν'} Γ^ν' + Σ_t U^ν(t) y(t)ᵀ,        gradient (K, N, M) = Σ_{b,ν} credit^ν Γ^ν.
//
// B counts batch rows, K matrices, N units and M the inputs (fan-in) of a unit. A "row" is the M numbers that Γ^ν has
// for one batch row, matrix and unit; all of them share the coefficients M^{νν'}, U^ν and credit^ν. The pass takes all
// batch rows of a few units together, so that their sum, a few rows of the gradient, stays in the nearest cache. OpenMP
// shares the rows among threads; torch uses the same OpenMP library. Arrays are contiguous except where a distance is
// given.

#include <algorithm>
#include <cstddef>
#include <vector>

#include "vectors.h"

#ifndef STATES // S; the library that is built first serves 1 and 2, every other one its own
#define STATES 2
#endif

namespace {

constexpr long SHARED_FROM = 1 << 16; // with fewer numbers in Γ, a second thread costs more than it saves
constexpr long TILE = 2048;           // Σ_t U(t) y(t)ᵀ is formed for this many numbers of a row at a time
constexpr long GRADIENT = 1 << 16;    // bytes of the gradient that all batch rows add to before they go on
constexpr long BLOCK = 64;            // Σ_t adds this many steps at a time
constexpr int SUMS = 8; // this many running sums fit in the registers
static_assert(STATES > 1 && STATES <= SUMS, "the sums of one unit must fit");

// The operands of one pass over C ≥ 1 steps. Each `const *` is a table of arrays.
template <typename real> struct Arrays {
    real *const *gammas;         // S arrays (B, K, N, M), mutated if `m` is given
    const real *m;               // (S, S, B, N), its S·S planes `next_m` apart; null: Γ is read and doesn't move
    const real *const *entering; // U: S·K arrays (C, B, N), the one of state ν and matrix k at [ν·K + k]; null: zeros
    const real *const *y;        // K arrays (C, B, Y). If Y = M, all units read y; if Y = N, each reads its head's M
    const real *const *credit;   // S arrays (B, N), null: zeros; the whole table is null if no gradient is wanted
    real *total;                 // (K, N, M), written with the gradient if there is credit and `weights` is null
    real *const *weights;        // K arrays (N, M), or null: W -= rate · gradient. A null array's weight stays as it is
    real rate;
    // Distances in numbers: of the planes of m; of the steps and batch rows of `entering`; and of those of y.
    long next_m, next_step, next_row, next_y_step, next_y_row;
    long steps, batch, matrices, units, fan_in, reads; // C, B, K, N, M, Y

    // The offset in y of the M numbers that unit n reads.
    long head(long n) const { return reads == fan_in ? 0 : n / fan_in * fan_in; }
};

// The coefficients of one row: m[ν][ν'] = M^{νν'}; phi, the factor of what enters (U of the one step, or 1 where
// several steps are summed beforehand); and credit. kept[ν'] is zero where all M^{νν'} are zero, as after a reset: the
// old Γ^ν' then counts as zero, even where it is NaN. read[ν] is zero where the credit is zero: where Γ is read before
// it moves, the old Γ^ν then counts as zero likewise. Otherwise all bits of these are set.
template <typename real, int S> struct Coefficients {
    typedef decltype(typename Lanes<real>::bits{}[0]) mask;
    real m[S][S], phi[S], credit[S];
    mask kept[S], read[S];
};

// Advances and reads `count` numbers of a row for one batch row. gammas[ν], y[ν], total and weight point at the first
// of them. If `moves`, Γ^ν ← Σ_ν' M^{νν'} Γ^ν' + φ^ν y^ν. If `reads`, sum = Σ_ν credit^ν Γ^ν, with the new Γ, or with
// the old one if `before`; `add` adds what `total` holds already. The sum is written to `total`, or if `descends`,
// weight -= rate · sum.
template <typename real, int S, bool moves, bool reads, bool before, bool descends>
inline __attribute__((always_inline)) void pass(real *const *gammas, const Coefficients<real, S> &c, const real *const *y, real *total, bool add,
                 real *weight, real rate, long count) {
    typedef typename Lanes<real>::wide wide;
    typedef typename Lanes<real>::bits bits;
    // copies, which no store can change: they stay in registers
    const Coefficients<real, S> by = c;
    real *gamma[S];
    const real *entering[S];
    for (int nu = 0; nu < S; nu++) gamma[nu] = gammas[nu], entering[nu] = moves ? y[nu] : nullptr;
    for (long i = 0; i < count; i += Lanes<real>::width) {
        const long here = count - i;
        wide was[S], kept[S], now[S];
        for (int nu = 0; nu < S; nu++) {
            was[nu] = now[nu] = load(gamma[nu] + i, here);
            kept[nu] = (wide)((bits)was[nu] & by.kept[nu]);
        }
        if (moves)
            for (int nu = 0; nu < S; nu++) {
                now[nu] = by.phi[nu] * load(entering[nu] + i, here);
                for (int source = 0; source < S; source++) now[nu] += by.m[nu][source] * kept[source];
                store(gamma[nu] + i, now[nu], here);
            }
        if (reads) {
            wide sum = add ? load(total + i, here) : wide{};
            for (int nu = 0; nu < S; nu++)
                sum += by.credit[nu] * (before ? (wide)((bits)was[nu] & by.read[nu]) : now[nu]);
            if (descends)
                store(weight + i, load(weight + i, here) - rate * sum, here);
            else
                store(total + i, sum, here);
        }
    }
}

// sums[r][i] = Σ_t u[t][r] y[t][i] for i < count, added to what is there unless `first`. sums is [COUNT][TILE], u is
// [steps][COUNT], and the steps of y lie `stride` numbers apart.
template <typename real, int COUNT>
void add_products(const real *__restrict u, const real *__restrict y, size_t stride, real *__restrict sums, long steps,
                  long count, bool first) {
    typedef typename Lanes<real>::wide wide;
    constexpr long width = Lanes<real>::width;
    long i = 0;
    for (; i + width <= count; i += width) {
        wide sum[COUNT];
        for (int r = 0; r < COUNT; r++) sum[r] = first ? wide{} : *(const wide *)(sums + r * TILE + i);
        for (long t = 0; t < steps; t++) {
            wide at = *(const wide *)(y + t * stride + i);
            for (int r = 0; r < COUNT; r++) sum[r] += u[t * COUNT + r] * at;
        }
        for (int r = 0; r < COUNT; r++) *(wide *)(sums + r * TILE + i) = sum[r];
    }
    for (; i < count; i++)
        for (int r = 0; r < COUNT; r++) {
            real sum = first ? 0 : sums[r * TILE + i];
            for (long t = 0; t < steps; t++) sum += u[t * COUNT + r] * y[t * stride + i];
            sums[r * TILE + i] = sum;
        }
}

// Does the pass for the R units n … n + R - 1 of matrix k and batch row b. These units must read the same part of y.
// Adds to `totals` (R, M), which holds the gradient of the batch rows before.
template <typename real, int S, int R, bool moves, bool reads, bool before>
void rows(const Arrays<real> &a, long k, long n, long b, real *totals) {
    real *const weights = a.weights && a.weights[k] ? a.weights[k] + n * (size_t)a.fan_in : nullptr;
    real u[BLOCK * S * R], sums[S * R * TILE];
    Coefficients<real, S> c[R];
    size_t begin[R];
    const real *entered[S], *credit[S]; // at this batch row and unit n; null: zeros
    for (int nu = 0; nu < S; nu++) {
        const real *phi = moves ? a.entering[nu * a.matrices + k] : nullptr;
        entered[nu] = phi ? phi + b * a.next_row + n : nullptr;
        credit[nu] = reads && a.credit[nu] ? a.credit[nu] + b * a.units + n : nullptr;
    }
    const real *m = moves ? a.m + b * a.units + n : nullptr;
    for (int r = 0; r < R; r++) {
        for (int nu = 0; nu < S; nu++) {
            for (int source = 0; moves && source < S; source++)
                c[r].m[nu][source] = m[(nu * S + source) * a.next_m + r];
            if (moves) c[r].phi[nu] = a.steps > 1 ? real(1) : entered[nu] ? entered[nu][r] : real(0);
            if (reads) c[r].credit[nu] = credit[nu] ? credit[nu][r] : real(0);
            c[r].read[nu] = -(reads && c[r].credit[nu] != 0);
        }
        for (int source = 0; source < S; source++) {
            bool kept = false;
            for (int nu = 0; moves && nu < S; nu++) kept |= c[r].m[nu][source] != 0;
            c[r].kept[source] = -kept;
        }
        begin[r] = ((b * a.matrices + k) * a.units + n + r) * (size_t)a.fan_in;
    }
    const size_t stride = (size_t)a.next_y_step;
    const real *y = !moves ? nullptr : a.y[k] + b * (size_t)a.next_y_row + a.head(n);
    const long tile = moves && a.steps > 1 ? TILE : a.fan_in;
    for (long first = 0; first < a.fan_in; first += tile) {
        const long count = std::min(tile, a.fan_in - first);
        if (moves && a.steps > 1) {
            for (long t = 0; t < a.steps; t += BLOCK) {
                const long steps = std::min(BLOCK, a.steps - t);
                for (long i = 0; i < steps; i++)
                    for (int nu = 0; nu < S; nu++)
                        for (int r = 0; r < R; r++)
                            u[(i * S + nu) * R + r] =
                                entered[nu] ? entered[nu][(t + i) * a.next_step + r] : real(0);
                add_products<real, S * R>(u, y + t * stride + first, stride, sums, steps, count, t == 0);
            }
        }
        for (int r = 0; r < R; r++) {
            real *gammas[S];
            const real *arrived[S];
            for (int nu = 0; nu < S; nu++) {
                gammas[nu] = a.gammas[nu] + begin[r] + first;
                arrived[nu] = a.steps > 1 ? sums + (nu * R + r) * TILE : y + first;
            }
            real *total = reads ? totals + r * (size_t)a.fan_in + first : nullptr;
            real *const weight = reads && weights && b == a.batch - 1 ? weights + r * (size_t)a.fan_in + first : nullptr;
            if (weight)
                pass<real, S, moves, reads, before, true>(gammas, c[r], arrived, total, b > 0, weight, a.rate, count);
            else
                pass<real, S, moves, reads, before, false>(gammas, c[r], arrived, total, b > 0, weight, a.rate, count);
        }
    }
}

// Shares the units of all matrices among threads. All batch rows take some units in turn, as many as leave their gradient
// in the nearest caches: the memory that is gone through without a break is then longer than a page. Of these, R at a
// time, or one by one where R units don't read the same part of y.
template <typename real, int S, bool moves, bool reads, bool before>
void all_rows(const Arrays<real> &a, int threads) {
    constexpr int R = SUMS / S;
    const long numbers = S * a.batch * a.matrices * a.units * a.fan_in;
    const bool shared = threads > 1 && numbers >= SHARED_FROM;
    const long most = shared ? a.matrices * a.units / (4 * threads) : a.units;
    const long some = std::max(std::min(most, GRADIENT / (long)sizeof(real) / a.fan_in) / R, 1L) * R;
    const long blocks = (a.units + some - 1) / some;
#pragma omp parallel num_threads(threads) if (shared)
    {
        std::vector<real> room(a.weights ? some * a.fan_in : 0);
#pragma omp for schedule(static)
        for (long block = 0; block < a.matrices * blocks; block++) {
            const long k = block / blocks, begin = block % blocks * some, end = std::min(begin + some, a.units);
            real *const totals = a.weights ? room.data() : a.total + (k * a.units + begin) * (size_t)a.fan_in;
            for (long b = 0; b < a.batch; b++)
                for (long n = begin; n < end;) {
                    real *const of = reads ? totals + (n - begin) * (size_t)a.fan_in : nullptr;
                    if (n + R <= end && a.head(n) == a.head(n + R - 1)) {
                        rows<real, S, R, moves, reads, before>(a, k, n, b, of);
                        n += R;
                    } else {
                        rows<real, S, 1, moves, reads, before>(a, k, n, b, of);
                        n++;
                    }
                }
        }
    }
}

// Picks the variant: read only; advance only; read, then advance; advance, then read.
template <typename real, int S> void of_states(const Arrays<real> &a, bool before, int threads) {
    if (!a.m)
        all_rows<real, S, false, true, true>(a, threads);
    else if (!a.credit)
        all_rows<real, S, true, false, false>(a, threads);
    else if (before)
        all_rows<real, S, true, true, true>(a, threads);
    else
        all_rows<real, S, true, true, false>(a, threads);
}

// U(t) = M(C) … M(t+1) φ(t), the immediate influence of step t as it stands after all C steps, and M(C) … M(1), both
// as S×S products for each batch row and unit. m (S, S, C, B, N) and φ are read: S·K arrays (C, B, N), the one of state ν
// and matrix k at phi[ν·K + k], null for zeros, whose steps are next_step and batch rows next_row numbers apart. Writes
// U to arrived (S, C, B, K, N) and the full product to whole (S, S, B, N).
template <typename real, int S>
void arrive(const real *__restrict m, const real *const *phi, long next_step, long next_row, real *__restrict arrived,
            real *__restrict whole, long steps, long batch, long matrices, long units) {
    constexpr long WIDTH = 64;
    static const real zeros[WIDTH] = {};
    const size_t plane = (size_t)batch * units;
    for (long b = 0; b < batch; b++)
        for (long first = 0; first < units; first += WIDTH) {
            const long count = std::min(WIDTH, units - first);
            real product[S][S][WIDTH];
            for (int nu = 0; nu < S; nu++)
                for (int source = 0; source < S; source++)
                    std::fill(product[nu][source], product[nu][source] + WIDTH, real(nu == source));
            for (long t = steps - 1; t >= 0; t--) {
                for (long k = 0; k < matrices; k++) {
                    const size_t at = ((t * batch + b) * matrices + k) * units + first;
                    const size_t state = steps * plane * matrices;
                    const real *entering[S];
                    for (int nu = 0; nu < S; nu++) {
                        const real *of = phi[nu * matrices + k];
                        entering[nu] = of ? of + t * next_step + b * next_row + first : zeros;
                    }
#pragma omp simd
                    for (long i = 0; i < count; i++)
                        for (int nu = 0; nu < S; nu++) {
                            real sum = 0;
                            for (int source = 0; source < S; source++)
                                sum += product[nu][source][i] * entering[source][i];
                            arrived[nu * state + at + i] = sum;
                        }
                }
                const real *step = m + t * plane + b * units + first;
#pragma omp simd
                for (long i = 0; i < count; i++)
                    for (int nu = 0; nu < S; nu++) {
                        real now[S];
                        for (int source = 0; source < S; source++) {
                            now[source] = 0;
                            for (int by = 0; by < S; by++)
                                now[source] += product[nu][by][i] * step[(by * S + source) * steps * plane + i];
                        }
                        for (int source = 0; source < S; source++) product[nu][source][i] = now[source];
                    }
            }
            for (int nu = 0; nu < S; nu++)
                for (int source = 0; source < S; source++)
                    std::copy(product[nu][source], product[nu][source] + count,
                              whole + (nu * S + source) * plane + b * units + first);
        }
}

template <typename real>
void arrive_of_type(const void *m, const void *const *phi, long next_step, long next_row, void *arrived, void *whole,
                    long states, long steps, long batch, long matrices, long units) {
    auto run = arrive<real, STATES>;
    if constexpr (STATES == 2)
        if (states == 1) run = arrive<real, 1>;
    run((const real *)m, (const real *const *)phi, next_step, next_row, (real *)arrived, (real *)whole, steps, batch,
        matrices, units);
}

template <typename real> void of_type(void *const *arrays, const long *numbers, double rate) {
    const auto next = [&] { return *numbers++; };
    const auto table = [&](bool given, long count) {
        const auto found = given ? (real *const *)arrays : nullptr;
        arrays += given ? count : 0;
        return found;
    };
    const long states = next(), steps = next(), batch = next(), matrices = next(), units = next(), fan_in = next();
    const long reads = next(), before = next(), threads = next(), moves = next(), credited = next(), descends = next();
    real *const *const gammas = table(true, states), *const *const rest = table(true, 2);
    const auto entering = table(moves, states * matrices), y = table(moves, matrices);
    const auto credit = table(credited, states), weights = table(descends, matrices);
    const Arrays<real> a{gammas,     rest[0],    entering,   y,          credit,     rest[1], weights,
                         (real)rate, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
                         steps,      batch,      matrices,   units,      fan_in,     reads};
    auto run = of_states<real, STATES>;
    if constexpr (STATES == 2)
        if (states == 1) run = of_states<real, 1>;
    run(a, before, threads);
}

} // namespace

// Γ ← M Γ + Σ_t U(t) y(t)ᵀ in place, and total = Σ_{b,ν} credit · Γ (see the top of this file), for the S of this
// library. All arrays and numbers come in one table each, since a call with few arguments takes less time:
//
// arrays   S of Γ; m; total; S·K of U and K of y, where they are given; S of credit, likewise; K weights, likewise
// numbers  S, C, B, K, N, M, Y; whether the gradient is read before Γ moves; the threads; whether U and y, credit, and
//          weights are given; next_m, next_step, next_row, next_y_step, next_y_row
//
// The arrays are as in `Arrays`. With weights, these take a step of `rate` against the gradient, and `total` isn't
// written.
extern "C" void gamma_pass_float(void *const *arrays, const long *numbers, double rate) {
    of_type<float>(arrays, numbers, rate);
}
extern "C" void gamma_pass_double(void *const *arrays, const long *numbers, double rate) {
    of_type<double>(arrays, numbers, rate);
}

// `arrive` for the S of this library. Numbers are double if `item` is 8, otherwise float.
extern "C" void gamma_arriving(const void *m, const void *const *phi, void *arrived, void *whole, long next_step,
                               long next_row, long states, long steps, long batch, long matrices, long units,
                               long item) {
    const auto run = item == sizeof(double) ? arrive_of_type<double> : arrive_of_type<float>;
    run(m, phi, next_step, next_row, arrived, whole, states, steps, batch, matrices, units);
}
