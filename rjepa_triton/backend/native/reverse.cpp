// The reverse scan on the CPU, float32, one thread; arrays are contiguous. A product with a zero of M or of the credit is
// zero, even where the other is NaN: a reset selects.

// Mᵀ λ of one step, for `count` units of S states, added to `out`. m: of the step, its planes `plane` apart; credit and
// out: their states as far apart as given.
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

// λ(t) = δ(t) + M(t+1)ᵀ λ(t+1) and M(1)ᵀ λ(1): m (S, S, T, R), delta and credit (S, T, R), carry (S, R) or null, first
// (S, R); R = B·N. Writes credit and first.
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
