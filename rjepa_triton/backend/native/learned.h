// Weights that learn, their products with a vector, and the step of their optimizer, for streams (stream.h).

#pragma once

#include <atomic>
#include <thread>

#include "loops.h"

namespace {

enum { SGD, ADAM, ADAMW, RMSPROP }; // optimizers
constexpr long SHARED_STREAM = 1 << 18; // numbers of Γ, or products of a readout, from which a second thread saves time

// Weights that learn: (rows, fan_in), the optimizer's two moments or null, the gradient's sum where it is kept, and
// whether they learn at all; `rests` while they don't. rates: the learning rate of each step.
template <class real> struct Learned {
    real *weight, *first, *second, *total;
    long learns, rests;
    const double *rates;

    bool now() const { return learns && !rests; }

    // Reads the table. rates: those of all groups of weights, `steps` each.
    static Learned next(Table &table, long steps, const double *rates) {
        Learned one;
        one.weight = table.next<real>(), one.first = table.next<real>(), one.second = table.next<real>();
        one.total = table.next<real>(), one.learns = table.next(), one.rests = 0, one.rates = rates + table.next() * steps;
        return one;
    }
};

// The sum of a vector's numbers, by halves.
template <long bytes, class real> inline real sum_of_halves(const real *v) {
    if constexpr (bytes > 16) {
        typedef real half __attribute__((vector_size(bytes / 2)));
        half h[2];
        memcpy(h, v, bytes);
        const half both = h[0] + h[1];
        return sum_of_halves<bytes / 2>((const real *)&both);
    } else {
        real sum = v[0];
        for (unsigned i = 1; i < bytes / sizeof(real); i++) sum += v[i];
        return sum;
    }
}
template <class wide, class real> inline real sum_of(wide v, real) { return sum_of_halves<sizeof(v)>((const real *)&v); }

// Σ_j w[j] c[j].
template <class real> inline real dot(const real *__restrict w, const real *__restrict c, long count) {
    typedef typename Lanes<real>::wide wide;
    constexpr long W = Lanes<real>::width;
    wide sum{}, more{};
    long j = 0;
    for (; j + 2 * W <= count; j += 2 * W) {
        sum += *(const wide *)(w + j) * *(const wide *)(c + j);
        more += *(const wide *)(w + j + W) * *(const wide *)(c + j + W);
    }
    for (; j < count; j += W) sum += load(w + j, count - j) * load(c + j, count - j);
    return sum_of(sum + more, real(0));
}

// out[r] += Σ_j w[r][j] c[j] for four rows w, `count` numbers each, that follow one another.
template <class real> inline void add_four_dots(const real *w, const real *c, real *out, long count) {
    typedef typename Lanes<real>::wide wide;
    constexpr long W = Lanes<real>::width;
    wide sums[4] = {};
    long j = 0;
    for (; j + W <= count; j += W) {
        const wide at = *(const wide *)(c + j);
        for (long r = 0; r < 4; r++) sums[r] += *(const wide *)(w + r * count + j) * at;
    }
    if (const long here = count - j) {
        const wide at = load(c + j, here);
        for (long r = 0; r < 4; r++) sums[r] += load(w + r * count + j, here) * at;
    }
    for (long r = 0; r < 4; r++) out[r] += sum_of(sums[r], real(0));
}

// As add_four_dots, for two vectors c and their outs.
template <class real>
inline void add_four_dots_of_two(const real *w, const real *const (&c)[2], real *const (&out)[2], long count) {
    typedef typename Lanes<real>::wide wide;
    constexpr long W = Lanes<real>::width;
    wide sums[4][2] = {};
    for (long j = 0; j < count; j += W) {
        const long here = count - j;
        const wide first = load(c[0] + j, here), second = load(c[1] + j, here);
        for (long r = 0; r < 4; r++) {
            const wide at = load(w + r * count + j, here);
            sums[r][0] += at * first, sums[r][1] += at * second;
        }
    }
    for (long r = 0; r < 4; r++) out[0][r] += sum_of(sums[r][0], real(0)), out[1][r] += sum_of(sums[r][1], real(0));
}

// out(b)[r] += Σ_j w[r][j] c(b)[j] for `rows` ≤ 4 rows w that follow one another, and all batch rows b.
template <class real, class Read, class Write>
inline void add_rows(const real *w, long rows, long count, long batch, const Read &c, const Write &out) {
    long b = 0;
    for (; rows == 4 && b + 2 <= batch; b += 2) add_four_dots_of_two(w, {c(b), c(b + 1)}, {out(b), out(b + 1)}, count);
    for (; b < batch; b++)
        if (rows == 4)
            add_four_dots(w, c(b), out(b), count);
        else
            for (long r = 0; r < rows; r++) out(b)[r] += dot(w + r * count, c(b), count);
}

// The step of one optimizer, as torch.optim has it, for weights that lie side by side.
template <class real, int kind> struct Optimizer {
    typedef typename Lanes<real>::wide wide;
    real lr, beta1, beta2, rest1, rest2, eps, decay; // rest: 1 - beta, rounded once
    real scale1, scale2; // Adam: w -= lr / scale1 m / (√v scale2 + eps)
    bool begins; // no momentum was kept before

    // As it steps these weights at step t.
    Optimizer at(const Learned<real> &one, long t) const {
        Optimizer own = *this;
        own.lr = one.rates[t];
        return own;
    }

    // Whether it has no weight decay, and SGD no momentum.
    bool plain(const Learned<real> &one) const { return decay == 0 && (kind != SGD || !one.first); }

    // Returns the weights that it has written. is_plain: known to be `plain`.
    template <bool is_plain = false>
    inline wide step(real *weight, real *first, real *second, wide gradient, long here) const {
        wide w = load(weight, here);
        if (kind == ADAMW)
            w = w * (real(1) - lr * decay);
        else if (!is_plain && decay != 0)
            gradient = gradient + decay * w;
        if (kind == SGD) {
            if (!is_plain && first) { // beta1: momentum, beta2: dampening, eps: Nesterov's
                const wide kept = begins ? gradient : beta1 * load(first, here) + rest2 * gradient;
                store(first, kept, here);
                gradient = eps != 0 ? gradient + beta1 * kept : kept;
            }
            w = w - lr * gradient;
        } else if (kind == RMSPROP) {
            const wide v = beta1 * load(second, here) + rest1 * gradient * gradient;
            store(second, v, here);
            w = w - lr * gradient / (root(v) + eps);
        } else {
            wide m = load(first, here);
            m = m + rest1 * (gradient - m);
            const wide v = beta2 * load(second, here) + rest2 * gradient * gradient;
            store(first, m, here);
            store(second, v, here);
            w = w - (lr / scale1) * m / (root(v) * scale2 + eps);
        }
        store(weight, w, here);
        return w;
    }

  private:
    static wide root(wide v) {
#if defined(__AVX__) && !defined(__AVX512F__)
        if constexpr (sizeof(real) == 4)
            return (wide)_mm256_sqrt_ps((__m256)v);
        else
            return (wide)_mm256_sqrt_pd((__m256d)v);
#endif
        wide r;
        for (unsigned i = 0; i < sizeof(v) / sizeof(real); i++) r[i] = std::sqrt(v[i]);
        return r;
    }
};

// Takes the gradient of `here` weights from `at` on: into the optimizer's step, or into the sum.
template <class real, int kind>
inline void take(const Optimizer<real, kind> &optimizer, const Learned<real> &one, long at,
                 typename Lanes<real>::wide gradient, long here, bool sums_up, bool first) {
    if (!one.now()) return;
    if (sums_up)
        store(one.total + at, first ? gradient : load(one.total + at, here) + gradient, here);
    else
        optimizer.step(one.weight + at, one.first ? one.first + at : nullptr,
                       one.second ? one.second + at : nullptr, gradient, here);
}

// Threads that share each step's work. One that waits for the others spins, since a barrier of OpenMP may put it to
// sleep, which takes longer than its part of a step; after a while it lets other threads have its core.
struct Barrier {
    std::atomic<long> arrived{0}, round{0};
};

// One thread of `count`, of which it is number `me`.
struct Team {
    static constexpr long SPINS = 1000;
    long count = 1, me = 0;
    Barrier *barrier = nullptr;

    void wait() const {
        if (count == 1) return;
        const long round = barrier->round.load(std::memory_order_relaxed);
        if (barrier->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            barrier->arrived.store(0, std::memory_order_relaxed);
            barrier->round.store(round + 1, std::memory_order_release);
            return;
        }
        for (long spins = 0; barrier->round.load(std::memory_order_acquire) == round; spins++)
            if (spins > SPINS)
                std::this_thread::yield();
            else {
#if defined(__SSE2__)
                _mm_pause();
#endif
            }
    }
};

// body(i) for all i < count. A thread takes the same i of equal counts.
template <class Body> inline void spread(const Team &team, long count, const Body &body, bool waits = true) {
    const long end = count * (team.me + 1) / team.count;
    for (long i = count * team.me / team.count; i < end; i++) body(i);
    if (waits) team.wait();
}

// body() by one thread, for which the others wait.
template <class Body> inline void once(const Team &team, const Body &body) {
    if (!team.me) body();
    team.wait();
}

} // namespace
