// The reverse scan on the CPU, float32, in one thread; arrays are contiguous. A product with a zero of M or of the
// credit is zero even where the other factor is NaN, so that a NaN doesn't cross a reset.

// out^ν' += Σ_ν M^{νν'} λ^ν for one step and `count` units. M^{νν'} begins at m + (ν · S + ν') · plane, λ^ν at
// credit + ν · credit_state and out^ν' at out + ν' · out_state.
static inline void pass_back(const float *m, long plane, const float *credit, long credit_state, float *out,
                             long out_state, long states, long count) {
    for (long source = 0; source < states; source++) {
        float *__restrict to = out + source * out_state;
        for (long nu = 0; nu < states; nu++) {
            const float *__restrict by = m + (nu * states + source) * plane, *__restrict from = credit + nu * credit_state;
            for (long i = 0; i < count; i++) to[i] += by[i] == 0.0f || from[i] == 0.0f ? 0.0f : by[i] * from[i];
        }
    }
}

// λ(t) = δ(t) + M(t+1)ᵀ λ(t+1), where λ(T) = δ(T) + carry. Reads m (S, S, T, R), delta (S, T, R) and carry (S, R),
// which may be null for zeros; R = count = B·N. Writes λ to credit (S, T, R) and M(1)ᵀ λ(1) to first (S, R).
extern "C" void reverse_scan(const float *m, const float *__restrict delta, const float *__restrict carry,
                             float *credit, float *first, long states, long steps, long count) {
    long plane = steps * count;
    for (long t = steps - 1; t >= 0; t--) {
        for (long nu = 0; nu < states; nu++) {
            float *__restrict to = credit + nu * plane + t * count;
            const float *__restrict own = delta + nu * plane + t * count;
            if (carry && t == steps - 1)
                for (long i = 0; i < count; i++) to[i] = own[i] + carry[nu * count + i];
            else
                for (long i = 0; i < count; i++) to[i] = own[i];
        }
        if (t < steps - 1)
            pass_back(m + (t + 1) * count, plane, credit + (t + 1) * count, plane, credit + t * count, plane, states,
                      count);
    }
    for (long i = 0; i < states * count; i++) first[i] = 0.0f;
    pass_back(m, plane, credit, plane, first, count, states, count);
}
