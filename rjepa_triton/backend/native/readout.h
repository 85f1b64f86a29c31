// A stream's readout (stream.h): linear parts and activations, one after the other; o = parts(h), or o = h + parts(h).

#pragma once

#include <algorithm>
#include <vector>

#include "learned.h"
#include "products.h"

namespace {

enum { LINEAR, RELU, LEAKY_RELU, ELU, TANH, SIGMOID, SILU, GELU, GELU_BY_TANH }; // parts

// 1 / (1 + exp(-x)), which is 0 at -∞, as torch has it.
template <class real, class wide> inline wide logistic(wide x) { return real(1) / (real(1) + exp_of(-x)); }

// f(x) of an activation, as torch.nn has it. setting: its number, if it has one.
template <class real, class wide> inline wide activated(long kind, wide x, real setting) {
    switch (kind) {
    case RELU: return chosen(x <= real(0), wide{}, x);
    case LEAKY_RELU: return chosen(x > real(0), x, x * setting);
    case ELU: return chosen(x > real(0), x, setting * expm1_of(x));
    case TANH: return tanh_of(x);
    case SIGMOID: return logistic<real>(x);
    case SILU: return x * logistic<real>(x);
    case GELU: return real(0.5) * x * (real(1) + erf_of(x * real(0.70710678118654752440)));
    default: return real(0.5) * x * (real(1) + tanh_of(real(0.79788456080286535588) * (x + real(0.044715) * x * x * x)));
    }
}

// f'(x).
template <class real, class wide> inline wide slope_of(long kind, wide x, real setting) {
    const wide one = wide{} + real(1);
    switch (kind) {
    case RELU: return chosen(x <= real(0), wide{}, one);
    case LEAKY_RELU: return chosen(x > real(0), one, wide{} + setting);
    case ELU: return chosen(x > real(0), one, setting * exp_of(x));
    case TANH: {
        const wide f = tanh_of(x);
        return one - f * f;
    }
    case SIGMOID: {
        const wide f = logistic<real>(x);
        return f * (one - f);
    }
    case SILU: {
        const wide f = logistic<real>(x);
        return f * (one + x * (one - f));
    }
    case GELU:
        return real(0.5) * (one + erf_of(x * real(0.70710678118654752440))) +
               x * real(0.39894228040143267794) * exp_of(real(-0.5) * x * x);
    default: {
        const real by = 0.79788456080286535588, cubic = 0.044715;
        const wide f = tanh_of(by * (x + cubic * x * x * x));
        return real(0.5) * (one + f) + real(0.5) * x * (one - f * f) * by * (one + 3 * cubic * x * x);
    }
    }
}

// body(i) for all i < count, as `spread`. Its code is there once: inlined twice, with and without a team, it might round
// differently, since a compiler may make one operation of a product and a sum.
template <class Body> __attribute__((noinline)) void call(const Body &body, long i) { body(i); }
template <class Body> inline void share(const Team &team, long count, const Body &body) {
    spread(team, count, [&](long i) { call(body, i); });
}

// A linear part's weight (out, in) and bias, or an activation. value (B, out) is what it gives, credit (B, out) the
// loss's gradient with respect to that; the last part has them from its caller.
template <class real> struct Part {
    long kind, in, out;
    real setting;
    Learned<real> weight, bias;
    real *value, *credit;
};

template <class real> struct Readout {
    typedef typename Lanes<real>::wide wide;
    static constexpr long W = Lanes<real>::width;
    static constexpr long TOGETHER = 8 * W; // columns of a weight, or numbers, that one thread takes

    std::vector<Part<real>> parts;
    long batch, units, residual, products; // products: of the largest part, for all batch rows

    Readout() : batch(0), units(0), residual(0), products(0) {}

    // Reads the table, with the parts' settings from `settings` on.
    Readout(Table &table, long batch, long units, long steps, const double *rates, const double *settings)
        : batch(batch), units(units), products(0) {
        residual = table.next();
        parts.resize(table.next());
        long before = units;
        for (auto &part : parts) {
            part.kind = table.next(), part.in = before, part.out = table.next(), part.setting = *settings++;
            before = part.out;
            if (part.kind != LINEAR) continue;
            part.weight = Learned<real>::next(table, steps, rates), part.bias = Learned<real>::next(table, steps, rates);
            products = std::max(products, batch * part.in * part.out);
        }
    }

    // Takes room for values and credits from `room` on.
    void settle(real *room) {
        for (auto &part : parts) {
            part.value = room, part.credit = room + batch * part.out;
            room += 2 * batch * part.out;
        }
    }

    // o (B, O) of h (B, N), by the threads of the team.
    void forward(const real *h, real *o, const Team &team) const {
        for (size_t l = 0; l < parts.size(); l++) {
            const auto &part = parts[l];
            const real *from = l ? parts[l - 1].value : h;
            real *to = l + 1 < parts.size() ? part.value : o;
            if (part.kind == LINEAR)
                share(team, (part.out + 3) / 4, [&](long four) {
                    const long first = 4 * four, count = std::min(4L, part.out - first);
                    const real *w = part.weight.weight + first * part.in;
                    for (long b = 0; b < batch; b++)
                        for (long r = 0; r < count; r++)
                            to[b * part.out + first + r] = part.bias.weight ? part.bias.weight[first + r] : real(0);
                    add_rows(w, count, part.in, batch, [&](long b) { return from + b * part.in; },
                             [&](long b) { return to + b * part.out + first; });
                });
            else
                share(team, (batch * part.out + TOGETHER - 1) / TOGETHER, [&](long block) {
                    const long begin = block * TOGETHER, end = std::min(batch * part.out, begin + TOGETHER);
                    for (long at = begin; at < end; at += W)
                        store(to + at, activated(part.kind, load(from + at, end - at), part.setting), end - at);
                });
        }
        if (residual)
            once(team, [&] {
                for (long i = 0; i < batch * units; i++) o[i] += h[i];
            });
    }

    // From the loss's gradient with respect to o in `given`: delta (B, N), that with respect to h, and the weights' own.
    template <int kind>
    void learn(const real *h, const real *given, real *delta, const Optimizer<real, kind> &optimizer, long t, bool sums_up,
               bool first, const Team &team) {
        for (size_t l = parts.size(); l-- > 0;) {
            const auto &part = parts[l];
            const real *from = l ? parts[l - 1].value : h, *credit = l + 1 < parts.size() ? part.credit : given;
            real *to = l ? parts[l - 1].credit : delta;
            if (part.kind != LINEAR) {
                share(team, (batch * part.out + TOGETHER - 1) / TOGETHER, [&](long block) {
                    const long begin = block * TOGETHER, end = std::min(batch * part.out, begin + TOGETHER);
                    for (long at = begin; at < end; at += W) {
                        const wide slope = slope_of(part.kind, load(from + at, end - at), part.setting);
                        store(to + at, load(credit + at, end - at) * slope, end - at);
                    }
                });
                continue;
            }
            const auto own = optimizer.at(part.weight, t);
            share(team, (part.in + TOGETHER - 1) / TOGETHER, [&](long block) {
                const long begin = block * TOGETHER, end = std::min(part.in, begin + TOGETHER);
                if (batch > 1) {
                    for (long i = begin; i < end; i += 2 * W) pass_back(part, credit, to, i);
                    for (long i = begin; i < end; i += 2 * W) learn_columns(part, from, credit, i, own, sums_up, first);
                    return;
                }
                std::fill(to + begin, to + end, real(0));
                for (long o = 0; o < part.out; o++)
                    for (long i = begin; i < end; i += W) {
                        const long here = part.in - i < W ? part.in - i : W;
                        const wide w = load(part.weight.weight + o * part.in + i, here);
                        store(to + i, load(to + i, here) + credit[o] * w, here);
                        take(own, part.weight, o * part.in + i, credit[o] * load(from + i, here), here, sums_up, first);
                    }
            });
            if (part.bias.weight)
                once(team, [&] {
                    const auto of_bias = optimizer.at(part.bias, t);
                    for (long o = 0; o < part.out; o += W) {
                        const long here = part.out - o < W ? part.out - o : W;
                        wide gradient{};
                        for (long b = 0; b < batch; b++) gradient += load(credit + b * part.out + o, here);
                        take(of_bias, part.bias, o, gradient, here, sums_up, first);
                    }
                });
        }
        if (residual)
            once(team, [&] {
                for (long i = 0; i < batch * units; i++) delta[i] += given[i];
            });
    }

  private:
    // to[b][i…] = Σ_o credit[b][o] w[o][i…] for 2 W columns from i on and all batch rows, four together.
    void pass_back(const Part<real> &part, const real *credit, real *to, long i) const {
        const long here = part.in - i;
        for (long b = 0; b < batch; b += 4) {
            const long rows = std::min(4L, batch - b);
            wide sums[4][2] = {};
            const auto add = [&](long o, long r, wide left, wide right) {
                const real by = credit[(b + r) * part.out + o];
                sums[r][0] += by * left, sums[r][1] += by * right;
            };
            for (long o = 0; o < part.out; o++) {
                const real *w = part.weight.weight + o * part.in + i;
                const wide left = load(w, here), right = here > W ? load(w + W, here - W) : wide{};
                if (rows == 4)
                    for (long r = 0; r < 4; r++) add(o, r, left, right);
                else
                    for (long r = 0; r < rows; r++) add(o, r, left, right);
            }
            for (long r = 0; r < rows; r++) {
                real *back = to + (b + r) * part.in + i;
                store(back, sums[r][0], here);
                if (here > W) store(back + W, sums[r][1], here - W);
            }
        }
    }

    // The gradient Σ_b credit[b][o] from[b][i…] of 2 W columns from i on, four rows o together.
    template <int kind>
    void learn_columns(const Part<real> &part, const real *from, const real *credit, long i,
                       const Optimizer<real, kind> &own, bool sums_up, bool first) const {
        const long here = part.in - i;
        for (long o = 0; o < part.out; o += 4) {
            const long rows = std::min(4L, part.out - o);
            wide sums[4][2] = {};
            const auto add = [&](long b, long r, wide left, wide right) {
                const real by = credit[b * part.out + o + r];
                sums[r][0] += by * left, sums[r][1] += by * right;
            };
            for (long b = 0; b < batch; b++) {
                const real *y = from + b * part.in + i;
                const wide left = load(y, here), right = here > W ? load(y + W, here - W) : wide{};
                if (rows == 4)
                    for (long r = 0; r < 4; r++) add(b, r, left, right);
                else
                    for (long r = 0; r < rows; r++) add(b, r, left, right);
            }
            for (long r = 0; r < rows; r++) {
                take(own, part.weight, (o + r) * part.in + i, sums[r][0], here, sums_up, first);
                if (here > W) take(own, part.weight, (o + r) * part.in + i + W, sums[r][1], here - W, sums_up, first);
            }
        }
    }
};

} // namespace
