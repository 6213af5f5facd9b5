// C interface: a linear layer, the experts of one MoE block, decoding, and the weighted sum of outputs.
//
// Work is divided by output rows, and each output is summed by one thread in a fixed order, so results do
// not depend on the number of threads. OpenMP's symbols are resolved by the runtime that torch has loaded:
// a second thread pool would compete for the same processors.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "matrix.h"
#include "tiles.h"

namespace {

constexpr int64_t CHUNK = 32;  // output rows that one thread takes at a time

enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED, IDENTITY };

float activate(float x, int64_t activation) {
    switch (activation) {
        case SILU: return x / (1 + std::exp(-x));
        case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
        case GELU_TANH: return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        case RELU: return std::max(x, 0.0f);
        case RELU_SQUARED: return x < 0 ? 0.0f : x * x;
        default: return x;
    }
}

float rounded(float x) {
    uint32_t word = uint32_t(to_bfloat16(x)) << 16;
    std::memcpy(&x, &word, 4);
    return x;
}

// Hidden units from gate (or input) and up; rounded where torch would round in a bfloat16 model.
void hidden_units(float *h, const float *up, int64_t number, int64_t activation, bool bfloat16) {
    for (int64_t f = 0; f < number; f++) {
        float a = bfloat16 ? rounded(activate(rounded(h[f]), activation)) : activate(h[f], activation);
        float b = !up ? a : bfloat16 ? rounded(a * rounded(up[f])) : a * up[f];
        h[f] = b;
    }
}

// Activations in both forms that kernels use, `cols` floats each.
class Inputs {
public:
    Inputs(const Level &level, int64_t number, int64_t cols)
        : level_(level), cols_(cols), groups_(groups_of(cols)), high_(number * groups_ * GROUP),
          low_(number * groups_ * GROUP), scale_(number * groups_), sum_(number * groups_), inputs_(number) {}

    // May be one past the last, for an expert without rows.
    const Input *operator[](int64_t i) const { return inputs_.data() + i; }

    // From floats padded with zeros to whole groups, which must stay valid.
    void set(int64_t i, const float *x) {
        int64_t at = i * groups_;
        inputs_[i] = {x, &high_[at * GROUP], &low_[at * GROUP], &scale_[at], &sum_[at]};
        for (int64_t g = 0; g < groups_; g++, at++)
            level_.integers(x + g * GROUP, &high_[at * GROUP], &low_[at * GROUP], &scale_[at], &sum_[at]);
    }

    // From token i of x; `floats` has room for all tokens.
    void set(int64_t i, const void *x, int64_t kind, std::vector<float> &floats) {
        float *mine = &floats[i * groups_ * GROUP];
        level_.widen((const char *)x + i * cols_ * (kind == BF16 ? 2 : 4), kind, cols_, mine, groups_ * GROUP);
        set(i, mine);
    }

private:
    const Level &level_;
    int64_t cols_, groups_;
    std::vector<int8_t> high_, low_;
    std::vector<float> scale_, sum_;
    std::vector<Input> inputs_;
};

// Rows first to last - 1 of a matrix times all of these tokens.
void dots(const Level &level, const Matrix &m, int64_t first, int64_t last, const Input *x, int64_t tokens,
          float *const *y) {
    for (int64_t t = 0; t < tokens; t += TOKENS)
        level.dot(m, first, last, x + t, std::min(TOKENS, tokens - t), y + t);
}

}  // namespace

extern "C" {

// One expert: its matrices, and its routed rows first to first + rows - 1.
struct Expert {
    Matrix in, down;
    int64_t first, rows;
};

// Increased with every change of a signature or structure, together with VERSION in quant/cpu_kernels.py:
// a library of older sources is then not used.
int64_t moefit_version() { return 7; }

#if defined(__x86_64__)
// Whether there is an instruction for float16; uses CPUID because older compilers do not know its name.
static bool half_floats_here() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The best level that this processor has: 0 portable, 1 AVX2, 2 AVX-512 with VNNI, 3 also with AMX.
int64_t moefit_best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && half_floats_here())) return 0;
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vnni");
    return !avx512 ? 1 : tiles_here() ? 3 : 2;
#else
    return 0;
#endif
}

// y_TO = x_TI W^T, both float32 or both bfloat16.
void moefit_linear(int64_t level, const Matrix *m, const void *x_TI, int64_t tokens, int64_t kind, void *y_TO) {
    const Level &use = level_of(level);
    Inputs inputs(use, tokens, m->cols);
    std::vector<float> floats(tokens * groups_of(m->cols) * GROUP);
#pragma omp parallel
    {
#pragma omp for
        for (int64_t t = 0; t < tokens; t++) inputs.set(t, x_TI, kind, floats);
#pragma omp for schedule(dynamic)
        for (int64_t c = 0; c < m->rows; c += CHUNK) {
            int64_t last = std::min(c + CHUNK, m->rows);
            for (int64_t t = 0; t < tokens; t += TOKENS) {
                float made[TOKENS][CHUNK], *y[TOKENS];
                int64_t number = std::min(TOKENS, tokens - t);
                for (int64_t i = 0; i < number; i++)
                    y[i] = kind == F32 ? (float *)y_TO + (t + i) * m->rows : made[i] - c;
                use.dot(*m, c, last, inputs[t], number, y);
                for (int64_t i = 0; i < number && kind == BF16; i++)
                    use.narrow(made[i], last - c, (uint16_t *)y_TO + (t + i) * m->rows + c);
            }
        }
    }
}

// Every routed row through its expert, unweighted: y_RD, as many rows as are routed; rows of no
// expert are not written.
//
// x_TD: float32 or, then hidden units are rounded, bfloat16 (kind). token_R: the token of each routed row;
// null, the first. h_RQ: scratch, where Q is in whole groups and at least the rows of `in`.
void moefit_experts(int64_t level, const Expert *experts, int64_t number, const int64_t *token_R,
                    int64_t routed, const void *x_TD, int64_t T, int64_t kind, float *h_RQ, int64_t Q,
                    int64_t gated, int64_t activation, float *y_RD) {
    if (!number) return;
    const Level &use = level_of(level);
    int64_t F = experts[0].down.cols, D = experts[0].down.rows;
    int64_t f_chunks = (F + CHUNK - 1) / CHUNK, d_chunks = (D + CHUNK - 1) / CHUNK;
    Inputs tokens(use, T, experts[0].in.cols), hidden(use, routed, F);
    std::vector<float> floats(T * groups_of(experts[0].in.cols) * GROUP);
    std::vector<Input> x(routed);
    std::vector<float *> h(routed), y(routed);
    for (int64_t r = 0; r < routed; r++) h[r] = h_RQ + r * Q, y[r] = y_RD + r * D;
#pragma omp parallel
    {
#pragma omp for
        for (int64_t t = 0; t < T; t++) tokens.set(t, x_TD, kind, floats);
#pragma omp single
        for (int64_t r = 0; r < routed; r++) x[r] = *tokens[token_R ? token_R[r] : 0];
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < number * f_chunks; item++) {
            const Expert &e = experts[item / f_chunks];
            int64_t f0 = item % f_chunks * CHUNK, f1 = std::min(f0 + CHUNK, F);
            const Input *mine = x.data() + e.first;
            float *const *to = h.data() + e.first;
            dots(use, e.in, f0, f1, mine, e.rows, to);
            if (gated) dots(use, e.in, F + f0, F + f1, mine, e.rows, to);
            for (int64_t r = e.first; r < e.first + e.rows; r++)
                hidden_units(h[r] + f0, gated ? h[r] + F + f0 : nullptr, f1 - f0, activation, kind == BF16);
        }
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < number; n++)
            for (int64_t r = experts[n].first; r < experts[n].first + experts[n].rows; r++) {
                // The padding overwrites the up projection, which is no longer needed.
                std::fill(h[r] + F, h[r] + groups_of(F) * GROUP, 0.0f);
                hidden.set(r, h[r]);
            }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < number * d_chunks; item++) {
            const Expert &e = experts[item / d_chunks];
            int64_t d0 = item % d_chunks * CHUNK, d1 = std::min(d0 + CHUNK, D);
            dots(use, e.down, d0, d1, hidden[e.first], e.rows, y.data() + e.first);
        }
    }
}

// Sum of each token's outputs, in order: y_TD = sum of weight * y over K, rounded wherever torch would.
//
// kind: of the tokens, thus of y_TD; y_RD, T * K rows of y_kind, counts as rounded to it. All are float32 or
// bfloat16; where tokens and weights are bfloat16, products are. energy_R: null, or each weighted output's
// squares, summed.
void moefit_weighted_sum(const void *y_RD, int64_t y_kind, int64_t T, int64_t K, int64_t D, const void *weights_R,
                         int64_t weights_kind, int64_t kind, void *y_TD, float *energy_R) {
    constexpr int64_t LANES = 16;
    std::vector<float> weight(T * K);
    PORTABLE.widen(weights_R, weights_kind, T * K, weight.data(), T * K);
    bool round = kind == BF16, round_products = round && weights_kind == BF16;
#pragma omp parallel for if (T > 1)
    for (int64_t t = 0; t < T; t++) {
        std::vector<float> total(D), output(D);
        for (int64_t r = t * K; r < (t + 1) * K; r++) {
            float squares[LANES] = {};
            PORTABLE.widen((const char *)y_RD + r * D * (y_kind == BF16 ? 2 : 4), y_kind, D, output.data(), D);
            for (int64_t d = 0; d < D; d++) {
                float y = round ? rounded(output[d]) : output[d], product = y * weight[r];
                product = round_products ? rounded(product) : product;
                total[d] += product;
                squares[d % LANES] += product * product;
            }
            if (energy_R) energy_R[r] = std::accumulate(squares, squares + LANES, 0.0f);
        }
        if (kind == BF16) PORTABLE.narrow(total.data(), D, (uint16_t *)y_TD + t * D);
        else std::memcpy((float *)y_TD + t * D, total.data(), 4 * D);
    }
}

// All weights of a matrix, [rows, cols], as float32 or, rounded to nearest even, bfloat16.
void moefit_decode(int64_t level, const Matrix *m, void *out, int64_t bfloat16) {
#pragma omp parallel
    {
        std::vector<float> row(groups_of(m->cols) * GROUP);
#pragma omp for schedule(dynamic, SLAB)
        for (int64_t r = 0; r < m->rows; r++) {
            level_of(level).decode(*m, r, row.data());
            if (!bfloat16) {
                std::memcpy((float *)out + r * m->cols, row.data(), 4 * m->cols);
                continue;
            }
            level_of(level).narrow(row.data(), m->cols, (uint16_t *)out + r * m->cols);
        }
    }
}
}
