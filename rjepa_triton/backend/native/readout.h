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
template <class Body> inline void share(bool team, long count, const Body &body) {
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

    // o (B, O) of h (B, N), by the threads of the team if there is one.
    void forward(const real *h, real *o, bool team) const {
        for (size_t l = 0; l < parts.size(); l++) {
            const auto &part = parts[l];
            const real *from = l ? parts[l - 1].value : h;
            real *to = l + 1 < parts.size() ? part.value : o;
            if (part.kind == LINEAR)
                share(team, (part.out + 3) / 4, [&](long four) {
                    const long first = 4 * four, count = std::min(4L, part.out - first);
                    const real *w = part.weight.weight + first * part.in;
                    for (long b = 0; b < batch; b++) {
                        real *into = to + b * part.out + first;
                        for (long r = 0; r < count; r++) into[r] = part.bias.weight ? part.bias.weight[first + r] : real(0);
                        if (count == 4)
                            add_four_dots(w, from + b * part.in, into, part.in);
                        else
                            for (long r = 0; r < count; r++) into[r] += dot(w + r * part.in, from + b * part.in, part.in);
                    }
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
               bool first, bool team) {
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
                for (long b = 0; b < batch; b++) std::fill(to + b * part.in + begin, to + b * part.in + end, real(0));
                for (long o = 0; o < part.out; o++)
                    for (long i = begin; i < end; i += W) {
                        const long here = part.in - i < W ? part.in - i : W;
                        const wide w = load(part.weight.weight + o * part.in + i, here);
                        wide gradient{};
                        for (long b = 0; b < batch; b++) {
                            const real by = credit[b * part.out + o];
                            real *back = to + b * part.in + i;
                            store(back, load(back, here) + by * w, here);
                            gradient += by * load(from + b * part.in + i, here);
                        }
                        take(own, part.weight, o * part.in + i, gradient, here, sums_up, first);
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
};

} // namespace
