// The per-unit functions of the built-in cells (`rjepa_triton.cells`) on the CPU, float32. A `wide` holds sixteen
// units. A unit has S states c, G pre-activations p^g = (W^g c)_n, without x, and J inputs x.
//
// update    computes the new states now[ν] = F_ν(c, p, x).
// partials  computes `found`, the DISTINCT numbers that occur among ∂F/∂c, ∂F/∂p and ∂F/∂x (each cell lists them), and
//           RFP's M^{νν'} = ∂F_ν/∂c^ν' + Σ_g ∂F_ν/∂p^g w^g at m[ν · S + ν'], where w^g is the unit's entry on the
//           diagonal of W^g and g runs over the matrices that read state ν'.
// entering  computes, from `found` and the credit λ of the S states, the ENTERING numbers Σ_ν λ^ν ∂F_ν/∂p^g for each
//           gate, then Σ_ν λ^ν ∂F_ν/∂x^j for the inputs that don't share a gate's number.

#pragma once

#include "products.h"

namespace {

// Reciprocal gated circuit: s' = x + p_ss s - p_ms x, m' = x + p_mm m - p_sm x.
// c = {s, m}; p = {ss, ms, mm, sm}, here after their tanh; x is one input.
struct Rgc {
    static constexpr int S = 2, G = 4, DISTINCT = 6, ENTERING = 5;

    // found: ∂s'/∂ss, ∂s'/∂ms, ∂m'/∂mm, ∂m'/∂sm (with respect to the pre-activations), ∂s'/∂x, ∂m'/∂x.
    static void partials(const wide *c, const wide *p, const wide *x, int, const wide *w, wide *found, wide *m) {
        found[0] = c[0] - p[0] * p[0] * c[0];
        found[1] = p[1] * p[1] * x[0] - x[0];
        found[2] = c[1] - p[2] * p[2] * c[1];
        found[3] = p[3] * p[3] * x[0] - x[0];
        found[4] = 1.0f - p[1];
        found[5] = 1.0f - p[3];
        m[0] = p[0] + found[0] * w[0];
        m[1] = found[1] * w[1];
        m[2] = found[3] * w[3];
        m[3] = p[2] + found[2] * w[2];
    }

    static void entering(const wide *found, const wide *credit, wide *e) {
        e[0] = credit[0] * found[0];
        e[1] = credit[0] * found[1];
        e[2] = credit[1] * found[2];
        e[3] = credit[1] * found[3];
        e[4] = credit[0] * found[4] + credit[1] * found[5];
    }
};

// h' = f(p + x), f = tanh or relu. found: f'(p + x), which is ∂h'/∂p and ∂h'/∂x.
template <bool relu> struct Elman {
    static constexpr int S = 1, G = 1, DISTINCT = 1, ENTERING = 1;

    static void update(const wide *, const wide *p, const wide *x, int, wide *now) { now[0] = f(p[0] + x[0]); }

    static void partials(const wide *, const wide *p, const wide *x, int, const wide *w, wide *found, wide *m) {
        const wide h = f(p[0] + x[0]);
        found[0] = relu ? chosen(h > 0.0f, wide{} + 1.0f, wide{}) : 1.0f - h * h;
        m[0] = found[0] * w[0];
    }

    static void entering(const wide *found, const wide *credit, wide *e) { e[0] = credit[0] * found[0]; }

  private:
    static wide f(wide value) { return relu ? chosen(value < 0.0f, wide{}, value) : tanh_of(value); }
};

// c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c'), where each gate is p + x. p, x = {i, f, g, o}; c = {h, c}.
struct Lstm {
    static constexpr int S = 2, G = 4, DISTINCT = 9, ENTERING = 4;

    static void update(const wide *c, const wide *p, const wide *x, int, wide *now) {
        now[1] = sigmoid_of(p[1] + x[1]) * c[1] + sigmoid_of(p[0] + x[0]) * tanh_of(p[2] + x[2]);
        now[0] = sigmoid_of(p[3] + x[3]) * tanh_of(now[1]);
    }

    // found: ∂c'/∂i, ∂c'/∂f, ∂c'/∂g; ∂h'/∂i, ∂h'/∂f, ∂h'/∂g, ∂h'/∂o; ∂h'/∂c, ∂c'/∂c.
    static void partials(const wide *c, const wide *p, const wide *x, int, const wide *w, wide *found, wide *m) {
        const wide i = sigmoid_of(p[0] + x[0]), f = sigmoid_of(p[1] + x[1]);
        const wide g = tanh_of(p[2] + x[2]), o = sigmoid_of(p[3] + x[3]);
        const wide shown = tanh_of(f * c[1] + i * g), to_h = o * (1.0f - shown * shown);
        found[0] = g * i * (1.0f - i);
        found[1] = c[1] * f * (1.0f - f);
        found[2] = i * (1.0f - g * g);
        for (int k = 0; k < 3; k++) found[3 + k] = to_h * found[k];
        found[6] = shown * o * (1.0f - o);
        found[7] = to_h * f;
        found[8] = f;
        m[0] = found[3] * w[0] + found[4] * w[1] + found[5] * w[2] + found[6] * w[3];
        m[1] = found[7];
        m[2] = found[0] * w[0] + found[1] * w[1] + found[2] * w[2];
        m[3] = found[8];
    }

    static void entering(const wide *found, const wide *credit, wide *e) {
        for (int k = 0; k < 3; k++) e[k] = credit[0] * found[3 + k] + credit[1] * found[k];
        e[3] = credit[0] * found[6];
    }
};

// r = σ(p_r + x_r), z = σ(p_z + x_z), n = tanh(x_n + r (p_n + b)), h' = (1 - z) n + z h.
// p = {r, z, n}; x = {r, z, n} or {r, z, n, b} with the bias b inside n; c = {h}.
struct Gru {
    static constexpr int S = 1, G = 3, DISTINCT = 5, ENTERING = 5;

    static void update(const wide *c, const wide *p, const wide *x, int inputs, wide *now) {
        const wide r = sigmoid_of(p[0] + x[0]), z = sigmoid_of(p[1] + x[1]);
        const wide n = tanh_of(x[2] + r * recurrent(p, x, inputs));
        now[0] = (1.0f - z) * n + z * c[0];
    }

    // found: ∂h'/∂p_r, ∂h'/∂p_z, ∂h'/∂p_n, ∂h'/∂x_n, ∂h'/∂h.
    static void partials(const wide *c, const wide *p, const wide *x, int inputs, const wide *w, wide *found, wide *m) {
        const wide r = sigmoid_of(p[0] + x[0]), z = sigmoid_of(p[1] + x[1]);
        const wide inside = recurrent(p, x, inputs), n = tanh_of(x[2] + r * inside);
        found[3] = (1.0f - z) * (1.0f - n * n);
        found[0] = found[3] * inside * r * (1.0f - r);
        found[1] = (c[0] - n) * z * (1.0f - z);
        found[2] = found[3] * r;
        found[4] = z;
        m[0] = z + found[0] * w[0] + found[1] * w[1] + found[2] * w[2];
    }

    // e: the credit of p_r, p_z, p_n, x_n and b. The credit of b equals that of p_n, since n depends on p_n + b, but it
    // has a place of its own, so that the credit of all inputs can be written side by side.
    static void entering(const wide *found, const wide *credit, wide *e) {
        for (int k = 0; k < 4; k++) e[k] = credit[0] * found[k];
        e[4] = e[2];
    }

  private:
    // p_n + b, or p_n if there is no b.
    static wide recurrent(const wide *p, const wide *x, int inputs) { return inputs > 3 ? p[2] + x[3] : p[2]; }
};

constexpr int MOST_INPUTS = 4;

// The inputs x (J, T, B, N) with units contiguous and the distances of the other dimensions given in numbers. `load_at`
// loads the `here` units from unit i on, of all J inputs at step t and batch row b.
struct Inputs {
    const float *x;
    long of_input, of_step, of_row;
    int count;

    void load_at(long t, long b, long i, long here, wide *out) const {
        for (int j = 0; j < count; j++) out[j] = load(x + j * of_input + t * of_step + b * of_row + i, here);
    }
};

} // namespace
