// Γ's recursion for the CPU: one pass over Γ^ν (B, K, N, M) of S states, in place, that advances and reads it.
//
// A row is what unit n has of matrix k: M numbers a state and batch row, which share their coefficients. All batch rows
// of a few units are gone through together, so that their sum, the gradient's rows, stays in the nearest cache. Rows
// are shared among threads by OpenMP, of which torch has the same library in use. Arrays are contiguous, but where a
// distance is given.

#include <algorithm>
#include <cstddef>
#include <vector>

namespace {

constexpr long SHARED_FROM = 1 << 16; // numbers of Γ from which a second thread is worth calling
constexpr long TILE = 256;            // numbers of a row whose entering sums are made at once
constexpr long BLOCK = 64;            // steps that are summed at once
#ifdef __AVX512F__
constexpr int SUMS = 8; // of 64 bytes, that registers hold
#else
constexpr int SUMS = 4;
#endif

template <typename real> struct Arrays {
    real *const *gammas;         // S of (B, K, N, M)
    const real *m;               // (S, S, B, N), entries `next_m` apart, or null: Γ stays as it is
    const real *const *entering; // S·K of (C, B, N), of C ≥ 1 steps; null: zeros
    const real *const *y;        // K of (C, B, Y): Y = M, which every row reads, or N, of which a row reads its head's M
    const real *const *credit;   // S of (B, N), null: zeros; or null
    real *total;                 // (K, N, M): Σ credit · Γ over states and batch rows; written where there is credit
    real *const *weights;        // K of (N, M), or null: they take a step down that sum, which goes nowhere then; or null
    real rate;                   // of that step
    long next_m, next_step, next_row, next_y_step, next_y_row; // from one step, or batch row, to the next
    long steps, batch, matrices, units, fan_in, reads;

    // What rows of unit n read.
    long head(long n) const { return reads == fan_in ? 0 : n / fan_in * fan_in; }
};

// Of one row: S×S transitions, what a step's immediates are, and the credit that reads. A state whose transitions are
// all zero is forgotten, and one without credit isn't read before Γ moves: it counts as zero, even where it is NaN.
template <typename real, int S> struct Coefficients {
    real m[S][S], phi[S], credit[S];
    bool kept[S], read[S];
};

// `count` numbers of a row: new = M Γ + φ y, y by state; and credit · new to `total`, or added to it; credit · Γ where
// Γ is read before it moves. descends: the sum goes to the weight, which takes a step of `rate` down it.
template <typename real, int S, bool moves, bool reads, bool before, bool descends>
inline __attribute__((always_inline)) void pass(real *const *gammas, const Coefficients<real, S> &c, const real *const *y, real *total, bool add,
                 real *weight, real rate, long count) {
#pragma omp simd
    for (long i = 0; i < count; i++) {
        real was[S], now[S];
        for (int nu = 0; nu < S; nu++) was[nu] = now[nu] = gammas[nu][i];
        if (moves)
            for (int nu = 0; nu < S; nu++) {
                now[nu] = c.phi[nu] * y[nu][i];
                for (int source = 0; source < S; source++)
                    now[nu] += c.m[nu][source] * (c.kept[source] ? was[source] : real(0));
                gammas[nu][i] = now[nu];
            }
        if (reads) {
            real sum = add ? total[i] : real(0);
            for (int nu = 0; nu < S; nu++)
                sum += c.credit[nu] * (!before ? now[nu] : c.read[nu] ? was[nu] : real(0));
            if (descends)
                weight[i] -= rate * sum;
            else
                total[i] = sum;
        }
    }
}

// Σ_t u(t) y(t) added to `sums` [COUNT][TILE]: u (steps, COUNT), `count` numbers of y, whose steps are `stride` apart.
template <typename real, int COUNT>
void add_products(const real *__restrict u, const real *__restrict y, size_t stride, real *__restrict sums, long steps,
                  long count) {
    typedef real wide __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));
    constexpr long width = 64 / sizeof(real);
    long i = 0;
    for (; i + width <= count; i += width) {
        wide sum[COUNT];
        for (int r = 0; r < COUNT; r++) sum[r] = *(const wide *)(sums + r * TILE + i);
        for (long t = 0; t < steps; t++) {
            wide at = *(const wide *)(y + t * stride + i);
            for (int r = 0; r < COUNT; r++) sum[r] += u[t * COUNT + r] * at;
        }
        for (int r = 0; r < COUNT; r++) *(wide *)(sums + r * TILE + i) = sum[r];
    }
    for (; i < count; i++)
        for (long t = 0; t < steps; t++)
            for (int r = 0; r < COUNT; r++) sums[r * TILE + i] += u[t * COUNT + r] * y[t * stride + i];
}

// All that is done to R rows, of matrix k from unit n on, which read the same. room: of R · M numbers where weights step.
template <typename real, int S, int R, bool moves, bool reads, bool before>
void rows(const Arrays<real> &a, long k, long n, real *room) {
    real *const totals = a.weights ? room : a.total + (k * a.units + n) * (size_t)a.fan_in;
    real *const weights = a.weights && a.weights[k] ? a.weights[k] + n * (size_t)a.fan_in : nullptr;
    real u[BLOCK * S * R], sums[S * R * TILE];
    for (long b = 0; b < a.batch; b++) {
        Coefficients<real, S> c[R];
        size_t begin[R];
        const real *entered[S], *credit[S]; // of this batch row from unit n on, or null: zeros
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
                c[r].read[nu] = reads && c[r].credit[nu] != 0;
            }
            for (int source = 0; source < S; source++) {
                c[r].kept[source] = false;
                for (int nu = 0; moves && nu < S; nu++) c[r].kept[source] |= c[r].m[nu][source] != 0;
            }
            begin[r] = ((b * a.matrices + k) * a.units + n + r) * (size_t)a.fan_in;
        }
        const size_t stride = (size_t)a.next_y_step;
        const real *y = !moves ? nullptr : a.y[k] + b * (size_t)a.next_y_row + a.head(n);
        const long tile = moves && a.steps > 1 ? TILE : a.fan_in;
        for (long first = 0; first < a.fan_in; first += tile) {
            const long count = std::min(tile, a.fan_in - first);
            if (moves && a.steps > 1) {
                std::fill(sums, sums + S * R * TILE, real(0));
                for (long t = 0; t < a.steps; t += BLOCK) {
                    const long steps = std::min(BLOCK, a.steps - t);
                    for (long i = 0; i < steps; i++)
                        for (int nu = 0; nu < S; nu++)
                            for (int r = 0; r < R; r++)
                                u[(i * S + nu) * R + r] =
                                    entered[nu] ? entered[nu][(t + i) * a.next_step + r] : real(0);
                    add_products<real, S * R>(u, y + t * stride + first, stride, sums, steps, count);
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
                if (reads && weights && b == a.batch - 1)
                    pass<real, S, moves, reads, before, true>(gammas, c[r], arrived, total, b > 0,
                                                              weights + r * (size_t)a.fan_in + first, a.rate, count);
                else
                    pass<real, S, moves, reads, before, false>(gammas, c[r], arrived, total, b > 0, nullptr, 0, count);
            }
        }
    }
}

template <typename real, int S, bool moves, bool reads, bool before>
void all_rows(const Arrays<real> &a, int threads) {
    constexpr int R = SUMS / S;
    const long blocks = (a.units + R - 1) / R;
    const long numbers = S * a.batch * a.matrices * a.units * a.fan_in;
#pragma omp parallel num_threads(threads) if (threads > 1 && numbers >= SHARED_FROM)
    {
        std::vector<real> room(a.weights ? R * a.fan_in : 0);
#pragma omp for schedule(static)
        for (long block = 0; block < a.matrices * blocks; block++) {
            const long k = block / blocks, n = block % blocks * R;
            if (n + R <= a.units && a.head(n) == a.head(n + R - 1)) {
                rows<real, S, R, moves, reads, before>(a, k, n, room.data());
            } else {
                for (long each = n; each < std::min(n + R, a.units); each++)
                    rows<real, S, 1, moves, reads, before>(a, k, each, room.data());
            }
        }
    }
}

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

// What each of C steps adds to Γ at their end, U(t) = M(C) … M(t+1) φ(t), and M(C) … M(1): m (S, S, C, B, N),
// phi and arrived (S, C, B, K, N), whole (S, S, B, N).
template <typename real, int S>
void arrive(const real *__restrict m, const real *__restrict phi, real *__restrict arrived, real *__restrict whole,
            long steps, long batch, long matrices, long units) {
    constexpr long WIDTH = 64;
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
#pragma omp simd
                    for (long i = 0; i < count; i++)
                        for (int nu = 0; nu < S; nu++) {
                            real sum = 0;
                            for (int source = 0; source < S; source++)
                                sum += product[nu][source][i] * phi[source * state + at + i];
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
void arrive_of_type(const void *m, const void *phi, void *arrived, void *whole, long states, long steps, long batch,
                    long matrices, long units) {
    const auto run = states == 1 ? arrive<real, 1> : arrive<real, 2>;
    run((const real *)m, (const real *)phi, (real *)arrived, (real *)whole, steps, batch, matrices, units);
}

template <typename real>
void of_type(void *const *gammas, const void *m, const void *const *entering, const void *const *y,
             const void *const *credit, void *total, void *const *weights, const long *apart, double rate, long states,
             long steps, long batch, long matrices, long units, long fan_in, long reads, bool before, int threads) {
    const Arrays<real> a{(real *const *)gammas,
                         (const real *)m,
                         (const real *const *)entering,
                         (const real *const *)y,
                         (const real *const *)credit,
                         (real *)total,
                         (real *const *)weights,
                         (real)rate,
                         apart[0],
                         apart[1],
                         apart[2],
                         apart[3],
                         apart[4],
                         steps,
                         batch,
                         matrices,
                         units,
                         fan_in,
                         reads};
    if (states == 1)
        of_states<real, 1>(a, before, threads);
    else
        of_states<real, 2>(a, before, threads);
}

} // namespace

// Γ ← M Γ + Σ_t U(t) y(t)ᵀ in place, and total = Σ credit · Γ: of S = 1 or 2 states, arrays and their five distances
// `apart` as in `Arrays`, of floats, or of doubles where `item` is 8. `before`: Γ is read before it moves. weights, or
// null: they take a step of `rate` down the sum, in place of `total`.
extern "C" void gamma_pass(void *const *gammas, const void *m, const void *const *entering, const void *const *y,
                           const void *const *credit, void *total, void *const *weights, const long *apart, double rate,
                           long states, long steps, long batch, long matrices, long units, long fan_in, long reads,
                           long before, long item, long threads) {
    const auto run = item == sizeof(double) ? of_type<double> : of_type<float>;
    run(gammas, m, entering, y, credit, total, weights, apart, rate, states, steps, batch, matrices, units, fan_in,
        reads, before, threads);
}

// `arrive` of S = 1 or 2 states, of floats, or of doubles where `item` is 8.
extern "C" void gamma_arriving(const void *m, const void *phi, void *arrived, void *whole, long states, long steps,
                               long batch, long matrices, long units, long item) {
    const auto run = item == sizeof(double) ? arrive_of_type<double> : arrive_of_type<float>;
    run(m, phi, arrived, whole, states, steps, batch, matrices, units);
}
