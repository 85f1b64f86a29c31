// The exact credits of backpropagation through time (`rules.bptt.credits`) on the CPU, for a cell with dense
// matrices. For each state ν',
//
//     λ^ν'(t) = δ^ν'(t) + Σ_ν A^{νν'}(t+1) λ^ν(t+1) + Σ_k (W^k)ᵀ E^k(t+1),        E^k(t) = Σ_ν λ^ν(t) φ^{ν,k}(t),
//
// where A^{νν'} = ∂F_ν/∂c^ν' of one unit, φ^{ν,k} = ∂F_ν/∂p^k, and k runs over the matrices that read state ν'.

#include <vector>

#include "products.h"

namespace {

// An array (T, B, N) whose T·B rows of N contiguous numbers lie `next` numbers apart. A null `first` stands for zeros.
template <class real> struct Rows {
    const real *first;
    long next;

    const real *at(long row) const { return first + row * next; }
};

// The credits of all T steps (see the top of this file). S = states.
//
// weights  K matrices (N, N), contiguous, sorted by the state that they read; readers (S,): how many read each state
// own      A^{νν'} at [ν' · S + ν], each (T, B, N) with rows own_next[·] apart, or null for zeros
// phi      φ^{ν,k} at [k · S + ν], each (T, B, N) with rows phi_next[·] apart, or null for zeros
// delta    (S, T, B, N), contiguous
// carry    (S, B, N), the credit that later steps pass to the last step, or null for zeros
// resets   (T, B) bytes, or null; a reset step passes nothing back
// credit   (S, T, B, N), written: λ
// first    (S, B, N), written: the credit that the first step passes to the state before it
// packed   scratch memory for the packed matrices, K · ⌈N / PANEL⌉ · PANEL · N numbers
template <class real>
void exact_credits(const real *const *weights, const long *readers, const real *const *own,
                              const long *own_next, const real *const *phi, const long *phi_next, const real *delta,
                              const real *carry, const unsigned char *resets, real *credit, real *first,
                              real *packed, long states, long steps, long batch, long units, long threads) {
    const long numbers = batch * units, plane = steps * numbers, panels = (units + PANEL<real> - 1) / PANEL<real>;
    std::vector<long> begin(states + 1, 0);
    for (long j = 0; j < states; j++) begin[j + 1] = begin[j] + readers[j];
    const long all = begin[states], of_matrix = panels * PANEL<real> * units;
    for (long j = 0; j < states; j++)
        pack_columns(weights + begin[j], readers[j], units, packed + begin[j] * of_matrix);
    std::vector<real> entering(all * numbers), passed(states * numbers);
    const bool shared = threads > 1 && all * units * numbers >= SHARED_FROM;
    for (long t = steps - 1; t >= 0; t--) {
        for (long nu = 0; nu < states; nu++) {
            real *to = credit + nu * plane + t * numbers;
            const real *given = delta + nu * plane + t * numbers;
            const real *more = t < steps - 1 ? &passed[nu * numbers] : carry ? carry + nu * numbers : nullptr;
            for (long i = 0; i < numbers; i++) to[i] = more ? given[i] + more[i] : given[i];
        }
        for (long j = 0; j < states; j++)
            for (long b = 0; b < batch; b++) {
                const long row = t * batch + b;
                for (long k = begin[j]; k < begin[j + 1]; k++) {
                    real *to = &entering[begin[j] * numbers + (b * readers[j] + k - begin[j]) * units];
                    memset(to, 0, units * sizeof(real));
                    for (long nu = 0; nu < states; nu++) {
                        const Rows<real> by{phi[k * states + nu], phi_next[k * states + nu]};
                        const real *from = credit + nu * plane + row * units;
                        for (long i = 0; by.first && i < units; i++) to[i] += by.at(row)[i] * from[i];
                    }
                }
                real *to = &passed[j * numbers + b * units];
                memset(to, 0, units * sizeof(real));
                for (long nu = 0; nu < states; nu++) {
                    const Rows<real> by{own[j * states + nu], own_next[j * states + nu]};
                    const real *from = credit + nu * plane + row * units;
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
                memset(&passed[nu * numbers + b * units], 0, units * sizeof(real));
    }
    memcpy(first, passed.data(), states * numbers * sizeof(real));
}

} // namespace

#define EXPORTED(real)                                                                                                 \
    extern "C" void exact_credits_##real(                                                                              \
        const real *const *weights, const long *readers, const real *const *own, const long *own_next,                 \
        const real *const *phi, const long *phi_next, const real *delta, const real *carry,                            \
        const unsigned char *resets, real *credit, real *first, real *packed, long states, long steps, long batch,     \
        long units, long threads) {                                                                                    \
        exact_credits<real>(weights, readers, own, own_next, phi, phi_next, delta, carry, resets, credit, first,       \
                            packed, states, steps, batch, units, threads);                                             \
    }
EXPORTED(float)
EXPORTED(double)
