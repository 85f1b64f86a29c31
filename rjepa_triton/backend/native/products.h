// The products of a layer's matrices with the states of a few batch rows.

#pragma once

#include "vectors.h"

namespace {

template <class real> constexpr long PANEL = 2 * Lanes<real>::width; // output units of one packed panel
template <class real> constexpr long FEW = PANEL<real> < 8 ? PANEL<real> : 8; // rows that `pack` copies together

// The `count` matrices (N, N) that read one state, N = units, regarded as one matrix of count · N rows. `packed` holds
// the same weights as `pack` lays them out; where it is null, products read `matrices`.
template <class real> struct Readers {
    const real *const *matrices;
    long count, units;
    const real *packed;

    long rows() const { return count * units; }
    long panels() const { return (rows() + PANEL<real> - 1) / PANEL<real>; }
};

// How many numbers `pack` writes for `count` matrices: panels of PANEL rows, laid out as [panel][column][row], where
// the rows that the last panel lacks are zeros.
template <class real> inline long packed_numbers(long count, long units) {
    return (count * units + PANEL<real> - 1) / PANEL<real> * PANEL<real> * units;
}

// Writes the packed form of readers.matrices to `out`.
template <class real> void pack(const Readers<real> &readers, real *__restrict out) {
    constexpr long LINE = 64 / sizeof(real), PANEL = 2 * Lanes<real>::width, FEW = ::FEW<real>;
    static const real zeros[LINE] = {};
    const long units = readers.units;
    for (long first = 0; first < readers.rows(); first += PANEL, out += units * PANEL)
        // LINE columns of FEW rows at a time: each cache line is then used whole before another row evicts it. Rows
        // that lie a power of two apart map to the same cache sets, and reading PANEL of them at a time would evict
        // lines early.
        for (long k = 0; k < units; k += LINE) {
            const long columns = units - k < LINE ? units - k : LINE;
            for (long some = 0; some < PANEL; some += FEW) {
                const real *from[FEW];
                for (long i = 0; i < FEW; i++) {
                    const long row = first + some + i;
                    from[i] = row < readers.rows() ? readers.matrices[row / units] + row % units * units + k : zeros;
                }
                real *__restrict to = out + k * PANEL + some;
                for (long j = 0; j < columns; j++)
                    for (long i = 0; i < FEW; i++) to[j * PANEL + i] = from[i][j];
            }
        }
}

// sums[r][h] = Σ_k w[k][h] c[r][k]: one packed panel w [N][2][WIDTH] times R rows c (R, N), N = units. For a single
// row, even and odd k have separate sums, because each addition to a sum has to wait for the one before.
template <int R, class real>
inline void packed_rows(const real *__restrict w, const real *__restrict c, typename Lanes<real>::wide (&sums)[R][2],
                        long units) {
    typedef typename Lanes<real>::wide wide;
    constexpr long PANEL = 2 * Lanes<real>::width;
    wide odd[2] = {};
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = wide{};
    long k = 0;
    if (R == 1)
        for (; k + 2 <= units; k += 2, w += 2 * PANEL) {
            const wide *at = (const wide *)w;
            sums[0][0] += c[k] * at[0];
            sums[0][1] += c[k] * at[1];
            odd[0] += c[k + 1] * at[2];
            odd[1] += c[k + 1] * at[3];
        }
    for (; k < units; k++, w += PANEL) {
        const wide left = ((const wide *)w)[0], right = ((const wide *)w)[1];
        for (int r = 0; r < R; r++) {
            sums[r][0] += c[r * units + k] * left;
            sums[r][1] += c[r * units + k] * right;
        }
    }
    if (R == 1) {
        sums[0][0] += odd[0];
        sums[0][1] += odd[1];
    }
}

// out[r · next + p] = Σ_k weights[p][k] c[r][k]: P rows of unpacked matrices times R rows c (R, N), N = units. The P rows
// are read side by side: of a single one a processor fetches nothing ahead beyond the end of a page.
template <int P, int R, class real>
inline void plain_rows(const real *const *weights, const real *__restrict c, real *__restrict out, long next,
                       long units) {
    typedef typename Lanes<real>::wide wide;
    constexpr long WIDTH = Lanes<real>::width;
    wide sums[P][R] = {};
    real rest[P][R] = {};
    long k = 0;
    for (; k + WIDTH <= units; k += WIDTH) {
        wide at[P];
        for (int p = 0; p < P; p++) at[p] = *(const wide *)(weights[p] + k);
        for (int r = 0; r < R; r++) {
            const wide state = *(const wide *)(c + r * units + k);
            for (int p = 0; p < P; p++) sums[p][r] += at[p] * state;
        }
    }
    for (; k < units; k++)
        for (int p = 0; p < P; p++)
            for (int r = 0; r < R; r++) rest[p][r] += weights[p][k] * c[r * units + k];
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) {
            for (long i = 0; i < WIDTH; i++) rest[p][r] += sums[p][r][i];
            out[r * next + p] = rest[p][r];
        }
}

// `multiply_panel` for R batch rows, by the packed weights where there are any.
template <int R, class real>
inline void panel_rows(const Readers<real> &readers, long panel, const real *c, real *out) {
    typedef typename Lanes<real>::wide wide;
    constexpr long WIDTH = Lanes<real>::width, PANEL = 2 * WIDTH;
    const long units = readers.units, all = readers.rows(), first = panel * PANEL;
    const long count = all - first < PANEL ? all - first : PANEL;
    if (!readers.packed) {
        constexpr int P = R == 1 ? 8 : R * 4 <= (BYTES == 64 ? 16 : 8) ? 4 : 2; // as far as registers last
        const auto weights = [&](long row) { return readers.matrices[row / units] + row % units * units; };
        long row = first;
        for (; row + P <= first + count; row += P) {
            const real *side[P];
            for (int p = 0; p < P; p++) side[p] = weights(row + p);
            plain_rows<P, R>(side, c, out + row, all, units);
        }
        for (; row < first + count; row++) {
            const real *one = weights(row);
            plain_rows<1, R>(&one, c, out + row, all, units);
        }
        return;
    }
    wide sums[R][2];
    packed_rows<R>(readers.packed + first * units, c, sums, units);
    for (int r = 0; r < R; r++)
        for (long half = 0; half < 2 && half * WIDTH < count; half++)
            store(out + r * all + first + half * WIDTH, sums[r][half], count - half * WIDTH);
}

// out[b] = W c[b] for the PANEL rows of W that belong to this panel and all batch rows b.
// W is the matrices of `readers` stacked, c is (B, N), and out (B, count, N).
template <class real>
void multiply_panel(const Readers<real> &readers, long panel, const real *c, real *out, long batch) {
    long b = 0;
    if (BYTES == 64) // whose 32 registers hold the sums of eight rows
        for (; b + 8 <= batch; b += 8)
            panel_rows<8>(readers, panel, c + b * readers.units, out + b * readers.rows());
    for (; b + 4 <= batch; b += 4)
        panel_rows<4>(readers, panel, c + b * readers.units, out + b * readers.rows());
    for (; b < batch; b++)
        panel_rows<1>(readers, panel, c + b * readers.units, out + b * readers.rows());
}

// Copies `count` matrices (N, N) that read one state to `out` as panels of PANEL columns, laid out as
// [panel][matrix][row][column in the panel]. Columns past N in the last panel are zeros. A panel is then the operand of
// `packed_rows` for the products with the transposed matrices.
template <class real> void pack_columns(const real *const *matrices, long count, long units, real *__restrict out) {
    constexpr long PANEL = 2 * Lanes<real>::width;
    for (long first = 0; first < units; first += PANEL) {
        const long here = units - first < PANEL ? units - first : PANEL;
        for (long k = 0; k < count; k++)
            for (long i = 0; i < units; i++, out += PANEL) {
                memcpy(out, matrices[k] + i * units + first, here * sizeof(real));
                for (long j = here; j < PANEL; j++) out[j] = real(0);
            }
    }
}

// Adds Σ_k (W^k)ᵀ E^k for the PANEL units of one panel and all batch rows to out (B, N). `entering` (B, columns) holds
// E^k of the matrices side by side, columns = (number of matrices) · N; `packed` comes from `pack_columns`.
template <class real>
void add_panel(const real *packed, const real *entering, real *out, long panel, long columns, long batch,
               long units) {
    typedef typename Lanes<real>::wide wide;
    constexpr long WIDTH = Lanes<real>::width, PANEL = 2 * WIDTH;
    const real *w = packed + panel * columns * PANEL;
    const long first = panel * PANEL, here = units - first < PANEL ? units - first : PANEL;
    const auto add = [&](long b, const wide(&sums)[2]) {
        for (long half = 0; half < 2 && half * WIDTH < here; half++) {
            real *at = out + b * units + first + half * WIDTH;
            store(at, load(at, here - half * WIDTH) + sums[half], here - half * WIDTH);
        }
    };
    long b = 0;
    if (BYTES == 64)
        for (; b + 8 <= batch; b += 8) {
            wide sums[8][2];
            packed_rows<8>(w, entering + b * columns, sums, columns);
            for (int r = 0; r < 8; r++) add(b + r, sums[r]);
        }
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

// The sizes from which a second thread saves time: SHARED_FROM multiplications in a step's matrix products, and
// SPREAD_FROM = T·B·N numbers in elementwise work over all steps.
constexpr long SHARED_FROM = 1 << 18, SPREAD_FROM = 1 << 15;

// The state (B, N) that a step reads. If no row is reset it is `state` itself; otherwise it is `kept`, which is written
// with the state and zeros in the reset rows. resets: (B,) bytes, or null.
template <class real>
inline const real *read_state(const real *state, const unsigned char *resets, real *kept, long batch, long units) {
    bool any = false;
    for (long b = 0; resets && b < batch; b++) any |= resets[b];
    if (!any) return state;
    for (long b = 0; b < batch; b++)
        for (long i = b * units; i < (b + 1) * units; i++) kept[i] = resets[b] ? real(0) : state[i];
    return kept;
}

} // namespace
