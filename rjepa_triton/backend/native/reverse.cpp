// The reverse scan on the CPU, in one thread; arrays are contiguous. A product with a zero of M or of the
// credit is zero even where the other factor is NaN, so that a NaN doesn't cross a reset.

// out^ν' += Σ_ν M^{νν'} λ^ν for one step and `count` units. M^{νν'} begins at m + (ν · S + ν') · plane, λ^ν at
// credit + ν · credit_state and out^ν' at out + ν' · out_state.
template <class real>
static inline void pass_back(const real *m, long plane, const real *credit, long credit_state, real *out,
                             long out_state, long states, long count) {
    for (long source = 0; source < states; source++) {
        real *__restrict to = out + source * out_state;
        for (long nu = 0; nu < states; nu++) {
            const real *__restrict by = m + (nu * states + source) * plane, *__restrict from = credit + nu * credit_state;
            for (long i = 0; i < count; i++) to[i] += by[i] == real(0) || from[i] == real(0) ? real(0) : by[i] * from[i];
        }
    }
}

// λ(t) = δ(t) + M(t+1)ᵀ λ(t+1), where λ(T) = δ(T) + carry. Reads m (S, S, T, R), delta (S, T, R) and carry (S, R),
// which may be null for zeros; R = count = B·N. Writes λ to credit (S, T, R) and M(1)ᵀ λ(1) to first (S, R).
template <class real>
static void reverse_scan(const real *m, const real *__restrict delta, const real *__restrict carry,
                             real *credit, real *first, long states, long steps, long count) {
    long plane = steps * count;
    for (long t = steps - 1; t >= 0; t--) {
        for (long nu = 0; nu < states; nu++) {
            real *__restrict to = credit + nu * plane + t * count;
            const real *__restrict own = delta + nu * plane + t * count;
            if (carry && t == steps - 1)
                for (long i = 0; i < count; i++) to[i] = own[i] + carry[nu * count + i];
            else
                for (long i = 0; i < count; i++) to[i] = own[i];
        }
        if (t < steps - 1)
            pass_back(m + (t + 1) * count, plane, credit + (t + 1) * count, plane, credit + t * count, plane, states,
                      count);
    }
    for (long i = 0; i < states * count; i++) first[i] = real(0);
    pass_back(m, plane, credit, plane, first, count, states, count);
}

#define EXPORTED(real)                                                                                                 \
    extern "C" void reverse_scan_##real(const real *m, const real *delta, const real *carry, real *credit,             \
                                        real *first, long states, long steps, long count) {                            \
        reverse_scan<real>(m, delta, carry, credit, first, states, steps, count);                                      \
    }
EXPORTED(float)
EXPORTED(double)
