// Cells on the CPU, float32 (`cells`): what becomes of one unit's S states c, G pre-activations p and J inputs x, sixteen
// units at once. `update` gives its new states, `partials` the DISTINCT numbers that its partials are made of, own ones
// among them, and, added up from these and the matrices' diagonals w, M by rows. `entering` gives, of these numbers and
// the credit λ of the S states, what enters each gate and each input, ENTERING numbers: the gates first.

#pragma once

#include "products.h"

namespace {

// p: tanh of what enters ss, ms, mm and sm; c: s, m; x: one.
struct Rgc {
    static constexpr int S = 2, G = 4, DISTINCT = 6, ENTERING = 5;

    // The gates' ss, ms, mm, sm; of x to s and to m.
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

// p, x: i, f, g, o; c: h, c.
struct Lstm {
    static constexpr int S = 2, G = 4, DISTINCT = 9, ENTERING = 4;

    static void update(const wide *c, const wide *p, const wide *x, int, wide *now) {
        now[1] = sigmoid_of(p[1] + x[1]) * c[1] + sigmoid_of(p[0] + x[0]) * tanh_of(p[2] + x[2]);
        now[0] = sigmoid_of(p[3] + x[3]) * tanh_of(now[1]);
    }

    // Of c to i, f and g; of h to i, f, g and o; of h and c to c.
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

// p: r, z, n; x: r, z, n, and the bias inside n where there are four; c: h.
struct Gru {
    static constexpr int S = 1, G = 3, DISTINCT = 5, ENTERING = 5;

    static void update(const wide *c, const wide *p, const wide *x, int inputs, wide *now) {
        const wide r = sigmoid_of(p[0] + x[0]), z = sigmoid_of(p[1] + x[1]);
        const wide n = tanh_of(x[2] + r * recurrent(p, x, inputs));
        now[0] = (1.0f - z) * n + z * c[0];
    }

    // To r, to z, to W_hn h', to x_n, to h.
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

    // r, z, what W_hn h' enters, x_n, and the bias inside n, which enters what W_hn h' does.
    static void entering(const wide *found, const wide *credit, wide *e) {
        for (int k = 0; k < 4; k++) e[k] = credit[0] * found[k];
        e[4] = e[2];
    }

  private:
    static wide recurrent(const wide *p, const wide *x, int inputs) { return inputs > 3 ? p[2] + x[3] : p[2]; }
};

constexpr int MOST_INPUTS = 4;

// Where the inputs of one row and step begin: x (J, T, B, N), its units next to one another.
struct Inputs {
    const float *x;
    long of_input, of_step, of_row;
    int count;

    void load_at(long t, long b, long i, long here, wide *out) const {
        for (int j = 0; j < count; j++) out[j] = load(x + j * of_input + t * of_step + b * of_row + i, here);
    }
};

} // namespace
