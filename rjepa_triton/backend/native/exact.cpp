// The exact credits of backpropagation through time on the CPU, float32: λ(t) = δ(t) + A(t+1)ᵀ λ(t+1) + Σ_k Wᵀ E(t+1),
// E = Σ_ν λ^ν φ^{ν,k} (`reference.bptt`), of a cell with dense matrices.

#include <vector>

#include "products.h"

namespace {

// An array (T, B, N) whose rows are `next` apart, or none.
struct Rows {
    const float *first;
    long next;

    const float *at(long row) const { return first + row * next; }
};

// Matrices that read one state, by columns, N numbers to each of K' · N: panels of PANEL units, filled up with zeros.
void pack_columns(const float *const *matrices, long count, long units, float *__restrict out) {
    for (long first = 0; first < units; first += PANEL) {
        const long here = units - first < PANEL ? units - first : PANEL;
        for (long k = 0; k < count; k++)
            for (long i = 0; i < units; i++, out += PANEL) {
                memcpy(out, matrices[k] + i * units + first, here * sizeof(float));
                for (long j = here; j < PANEL; j++) out[j] = 0.0f;
            }
    }
}

// A panel of the products of all rows: entering (B, K' · N), added to out (B, N).
void add_panel(const float *packed, const float *entering, float *out, long panel, long columns, long batch,
               long units) {
    const float *w = packed + panel * columns * PANEL;
    const long first = panel * PANEL, here = units - first < PANEL ? units - first : PANEL;
    const auto add = [&](long b, const wide(&sums)[2]) {
        for (long half = 0; half < 2 && half * WIDTH < here; half++) {
            float *at = out + b * units + first + half * WIDTH;
            store(at, load(at, here - half * WIDTH) + sums[half], here - half * WIDTH);
        }
    };
    long b = 0;
    for (; b + 4 <= batch; b += 4) {
        wide sums[4][2];
        packed_rows<4>(w, entering + b * columns, sums, columns);
        for (int r = 0; r < 4; r++) add(b + r, sums[r]);
    }
    for (; b < batch; b++) {
        wide sums[1][2];
        packed_rows<1>(w, entering + b * columns, sums, columns);
        add(b, sums[0]);
    }
}

} // namespace

// S states, K matrices (N, N) sorted by the state that they read, `readers` (S) of each. own: ∂F_ν/∂c^source at
// [source · S + ν], phi: at [k · S + ν], (T, B, N) each or null, their rows `own_next` and `phi_next` apart; delta, credit
// (S, T, B, N); carry (S, B, N) or null; resets (T, B) bytes or null. Writes credit and first (S, B, N), what goes on to
// the state before the first step. packed: K · panels · PANEL · N numbers of room.
extern "C" void exact_credits(const float *const *weights, const long *readers, const float *const *own,
                              const long *own_next, const float *const *phi, const long *phi_next, const float *delta,
                              const float *carry, const unsigned char *resets, float *credit, float *first,
                              float *packed, long states, long steps, long batch, long units, long threads) {
    const long numbers = batch * units, plane = steps * numbers, panels = (units + PANEL - 1) / PANEL;
    std::vector<long> begin(states + 1, 0);
    for (long j = 0; j < states; j++) begin[j + 1] = begin[j] + readers[j];
    const long all = begin[states], of_matrix = panels * PANEL * units;
    for (long j = 0; j < states; j++)
        pack_columns(weights + begin[j], readers[j], units, packed + begin[j] * of_matrix);
    std::vector<float> entering(all * numbers), passed(states * numbers);
    const bool shared = threads > 1 && all * units * numbers >= SHARED_FROM;
    for (long t = steps - 1; t >= 0; t--) {
        for (long nu = 0; nu < states; nu++) {
            float *to = credit + nu * plane + t * numbers;
            const float *given = delta + nu * plane + t * numbers;
            const float *more = t < steps - 1 ? &passed[nu * numbers] : carry ? carry + nu * numbers : nullptr;
            for (long i = 0; i < numbers; i++) to[i] = more ? given[i] + more[i] : given[i];
        }
        for (long j = 0; j < states; j++)
            for (long b = 0; b < batch; b++) {
                const long row = t * batch + b;
                for (long k = begin[j]; k < begin[j + 1]; k++) {
                    float *to = &entering[begin[j] * numbers + (b * readers[j] + k - begin[j]) * units];
                    memset(to, 0, units * sizeof(float));
                    for (long nu = 0; nu < states; nu++) {
                        const Rows by{phi[k * states + nu], phi_next[k * states + nu]};
                        const float *from = credit + nu * plane + row * units;
                        for (long i = 0; by.first && i < units; i++) to[i] += by.at(row)[i] * from[i];
                    }
                }
                float *to = &passed[j * numbers + b * units];
                memset(to, 0, units * sizeof(float));
                for (long nu = 0; nu < states; nu++) {
                    const Rows by{own[j * states + nu], own_next[j * states + nu]};
                    const float *from = credit + nu * plane + row * units;
                    for (long i = 0; by.first && i < units; i++) to[i] += by.at(row)[i] * from[i];
                }
            }
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
        for (long each = 0; each < states * panels; each++) {
            const long j = each / panels;
            add_panel(packed + begin[j] * of_matrix, &entering[begin[j] * numbers], &passed[j * numbers], each % panels,
                      readers[j] * units, batch, units);
        }
        for (long b = 0; resets && b < batch; b++)
            for (long nu = 0; resets[t * batch + b] && nu < states; nu++)
                memset(&passed[nu * numbers + b * units], 0, units * sizeof(float));
    }
    memcpy(first, passed.data(), states * numbers * sizeof(float));
}
