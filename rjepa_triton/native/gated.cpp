// Cells whose matrices all read state 0, on the CPU, float32: Elman, LSTM, GRU (`cells`), their loop over time and their
// partials. All arrays are contiguous, but where strides are given.
//
// A cell is what becomes of one unit's S states c, G pre-activations p and J inputs x, sixteen units at once: `update`
// gives its new states, `partials` the DISTINCT numbers that its partials are made of, own ones among them, and, added up
// from these and the matrices' diagonals w, M by rows.

#include "products.h"

namespace {

template <bool relu> struct Elman {
    static constexpr int S = 1, G = 1, DISTINCT = 1;

    static void update(const wide *, const wide *p, const wide *x, int, wide *now) { now[0] = f(p[0] + x[0]); }

    static void partials(const wide *, const wide *p, const wide *x, int, const wide *w, wide *found, wide *m) {
        const wide h = f(p[0] + x[0]);
        found[0] = relu ? chosen(h > 0.0f, wide{} + 1.0f, wide{}) : 1.0f - h * h;
        m[0] = found[0] * w[0];
    }

  private:
    static wide f(wide value) { return relu ? chosen(value < 0.0f, wide{}, value) : tanh_of(value); }
};

// p, x: i, f, g, o; c: h, c.
struct Lstm {
    static constexpr int S = 2, G = 4, DISTINCT = 9;

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
};

// p: r, z, n; x: r, z, n, and the bias inside n where there are four; c: h.
struct Gru {
    static constexpr int S = 1, G = 3, DISTINCT = 5;

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

template <class Cell>
void run(const Inputs &x, const float *const *weights, const float *const *start, const unsigned char *resets,
         float *states, float *sums, float *kept, float *packed, long steps, long batch, long units, long threads) {
    constexpr int S = Cell::S, G = Cell::G;
    const long numbers = batch * units, next_state = (steps + 1) * numbers;
    const bool shared = threads > 1 && G * units * numbers >= SHARED_FROM;
    const Readers readers{weights, G, units, packed};
    if (packed) pack(readers, packed);
    for (int nu = 0; nu < S; nu++) memcpy(states + nu * next_state, start[nu], numbers * sizeof(float));
    for (long t = 0; t < steps; t++) {
        const float *before[S];
        for (int nu = 0; nu < S; nu++)
            before[nu] = read_state(states + nu * next_state + t * numbers, resets ? resets + t * batch : nullptr,
                                    kept + nu * numbers, batch, units);
        float *drive = sums + t * G * numbers;
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
        for (long panel = 0; panel < readers.panels(); panel++)
            multiply_panel<false>(readers, panel, before[0], drive, batch);
        for (long b = 0; b < batch; b++)
            for (long i = 0; i < units; i += WIDTH) {
                const long here = units - i < WIDTH ? units - i : WIDTH;
                wide c[S], p[G], given[MOST_INPUTS] = {}, now[S];
                for (int nu = 0; nu < S; nu++) c[nu] = load(before[nu] + b * units + i, here);
                for (int g = 0; g < G; g++) p[g] = load(drive + (b * G + g) * units + i, here);
                x.load_at(t, b, i, here, given);
                Cell::update(c, p, given, x.count, now);
                for (int nu = 0; nu < S; nu++)
                    store(states + nu * next_state + (t + 1) * numbers + b * units + i, now[nu], here);
            }
    }
}

template <class Cell>
void linearize(const Inputs &x, const float *sums, const float *before, const unsigned char *resets,
               const float *const *diagonals, const long *strides, float *out, long next_before, long steps, long batch,
               long units, long threads) {
    constexpr int S = Cell::S, G = Cell::G, DISTINCT = Cell::DISTINCT;
    const long rows = steps * batch, plane = rows * units;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && plane >= SPREAD_FROM)
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < units; i += WIDTH) {
            const long here = units - i < WIDTH ? units - i : WIDTH;
            wide c[S], p[G], given[MOST_INPUTS] = {}, w[G], found[DISTINCT], m[S * S];
            for (int nu = 0; nu < S; nu++) c[nu] = load(before + nu * next_before + row * units + i, here);
            for (int g = 0; g < G; g++) {
                p[g] = load(sums + (row * G + g) * units + i, here);
                w[g] = wide{};
                for (long lane = 0; lane < here; lane++) w[g][lane] = diagonals[g][(i + lane) * strides[g]];
            }
            x.load_at(row / batch, row % batch, i, here, given);
            Cell::partials(c, p, given, x.count, w, found, m);
            float *to = out + row * units + i;
            for (int k = 0; k < DISTINCT; k++, to += plane) store(to, found[k], here);
            for (int k = 0; k < S * S; k++, to += plane) store(to, resets && resets[row] ? wide{} : m[k], here);
        }
}

} // namespace

// T steps of a cell, 0: Elman with tanh, 1: with relu, 2: LSTM, 3: GRU. x (J, T, B, N), `strides` of its J, T and B;
// weights G of (N, N), start S of (B, N), resets (T, B) bytes or null; states (S, T + 1, B, N) and sums (T, B, G, N)
// written. kept: S · B · N numbers for what a step reads where rows are reset, or null. packed: `packed_numbers(G, N)` for
// packed weights, or null: they are read as they are.
extern "C" void gated_scan(const float *x, const long *strides, const float *const *weights, const float *const *start,
                           const unsigned char *resets, float *states, float *sums, float *kept, float *packed,
                           long cell, long inputs, long steps, long batch, long units, long threads) {
    const Inputs given{x, strides[0], strides[1], strides[2], (int)inputs};
    const auto scan = cell == 0 ? run<Elman<false>> : cell == 1 ? run<Elman<true>> : cell == 2 ? run<Lstm> : run<Gru>;
    scan(given, weights, start, resets, states, sums, kept, packed, steps, batch, units, threads);
}

// Partials and RFP's M along T steps: sums (T, B, G, N); before (S, T, B, N), its states `next_before` apart; x, strides,
// resets as above; diagonals of the G matrices, N numbers each `diagonal_strides` apart. Writes out (·, T, B, N): what
// the cell's `partials` finds, and M by rows, zero where reset.
extern "C" void gated_linearize(const float *x, const long *strides, const float *sums, const float *before,
                                const unsigned char *resets, const float *const *diagonals,
                                const long *diagonal_strides, float *out, long cell, long inputs, long next_before,
                                long steps, long batch, long units, long threads) {
    const Inputs given{x, strides[0], strides[1], strides[2], (int)inputs};
    const auto find = cell == 0   ? linearize<Elman<false>>
                      : cell == 1 ? linearize<Elman<true>>
                      : cell == 2 ? linearize<Lstm>
                                  : linearize<Gru>;
    find(given, sums, before, resets, diagonals, diagonal_strides, out, next_before, steps, batch, units, threads);
}

// tanh of `count` numbers in place, or their sigmoid, by which their accuracy is tested.
extern "C" void activate(float *values, long count, long sigmoid) {
    for (long i = 0; i < count; i += WIDTH) {
        const long here = count - i < WIDTH ? count - i : WIDTH;
        const wide value = load(values + i, here);
        store(values + i, sigmoid ? sigmoid_of(value) : tanh_of(value), here);
    }
}
