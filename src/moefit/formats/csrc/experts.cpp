// What Python calls: a linear layer, the experts of one MoE block, and a matrix decoded.
//
// Work is cut by output rows, and each output is summed by one thread in one order, so results don't
// depend on the number of threads. OpenMP's symbols are left to whoever has loaded a runtime (torch
// has): a second pool of threads would wait for the same processors.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "matrix.h"

namespace {

constexpr int64_t CHUNK = 32;  // output rows that one thread takes at a time
constexpr float SMALLEST = 1e-30f;  // of a group's largest activations: its reciprocal must be a float

const Level &level_of(int64_t level) {
#if defined(__x86_64__)
    if (level == 2) return AVX512;
    if (level == 1) return AVX2;
#endif
    (void)level;
    return PORTABLE;
}

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

// Gate (or input) and up as hidden units; in a bfloat16 model rounded where torch would round.
void hidden_units(float *h, const float *up, int64_t number, int64_t activation, bool bfloat16) {
    for (int64_t f = 0; f < number; f++) {
        float a = bfloat16 ? rounded(activate(rounded(h[f]), activation)) : activate(h[f], activation);
        float b = !up ? a : bfloat16 ? rounded(a * rounded(up[f])) : a * up[f];
        h[f] = b;
    }
}

// Activations in both forms that kernels take, `width` floats each.
class Inputs {
public:
    Inputs(int64_t number, int64_t width)
        : groups_(width / GROUP), high_(number * width), low_(number * width), scale_(number * groups_),
          sum_(number * groups_), inputs_(number) {}

    // May be one behind the last: an expert without rows.
    const Input *operator[](int64_t i) const { return inputs_.data() + i; }

    void set(int64_t i, const float *x) {
        int64_t at = i * groups_;
        inputs_[i] = {x, &high_[at * GROUP], &low_[at * GROUP], &scale_[at], &sum_[at]};
        for (int64_t g = 0; g < groups_; g++) set_group(x + g * GROUP, at + g);
    }

private:
    // A group with NaN or infinity makes NaN of every product; one too small to have a scale counts as zeros.
    void set_group(const float *x, int64_t at) {
        uint32_t largest_bits = 0;  // order as floats do, those that are no numbers last
        for (int64_t j = 0; j < GROUP; j++) {
            uint32_t word;
            std::memcpy(&word, x + j, 4);
            largest_bits = std::max(largest_bits, word & 0x7fffffff);
        }
        float largest;
        std::memcpy(&largest, &largest_bits, 4);
        if (!(largest >= SMALLEST && largest_bits < 0x7f800000)) {
            std::memset(&high_[at * GROUP], 0, GROUP), std::memset(&low_[at * GROUP], 0, GROUP);
            scale_[at] = sum_[at] = largest_bits < 0x7f800000 ? 0 : std::numeric_limits<float>::quiet_NaN();
            return;
        }
        float scale = largest / 16256, inverse = 16256 / largest;
        int32_t sum = 0;
        for (int64_t j = 0; j < GROUP; j++) {
            int32_t value = int32_t(std::nearbyint(x[j] * inverse)), high = (value + 64) >> 7;
            high_[at * GROUP + j] = int8_t(high), low_[at * GROUP + j] = int8_t(value - 128 * high);
            sum += value;
        }
        scale_[at] = scale, sum_[at] = scale * float(sum);
    }

    int64_t groups_;
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

// Raised whenever a signature or a structure here changes (formats/kernels.py has its twin): a library
// left over from before is then not used.
int64_t moefit_version() { return 2; }

// The best level that this processor has: 0 portable, 1 AVX2, 2 AVX-512 with VNNI.
int64_t moefit_best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vnni");
    return avx512 ? 2 : 1;
#else
    return 0;
#endif
}

// y_TO = x_TP W^T; x has P floats a token, padded with zeros to whole groups.
void moefit_linear(int64_t level, const Matrix *m, const float *x_TP, int64_t P, int64_t tokens,
                   float *y_TO) {
    Inputs inputs(tokens, P);
    std::vector<float *> y(tokens);
    for (int64_t t = 0; t < tokens; t++) y[t] = y_TO + t * m->rows;
#pragma omp parallel
    {
#pragma omp for
        for (int64_t t = 0; t < tokens; t++) inputs.set(t, x_TP + t * P);
#pragma omp for schedule(dynamic)
        for (int64_t c = 0; c < m->rows; c += CHUNK)
            dots(level_of(level), *m, c, std::min(c + CHUNK, m->rows), inputs[0], tokens, y.data());
    }
}

// Every routed row through its expert, unweighted: y_RD.
//
// x_TP: tokens, P floats each. token_R: the token of each routed row. h_RQ: scratch, where Q is in
// whole groups and at least the rows of `in`. y_RD: as many rows as are routed.
void moefit_experts(int64_t level, const Expert *experts, int64_t number, const int64_t *token_R,
                    const float *x_TP, int64_t T, int64_t P, float *h_RQ, int64_t Q, int64_t gated,
                    int64_t activation, int64_t bfloat16, float *y_RD) {
    if (!number) return;
    const Level &use = level_of(level);
    int64_t F = experts[0].down.cols, D = experts[0].down.rows;
    int64_t routed = experts[number - 1].first + experts[number - 1].rows;
    int64_t f_chunks = (F + CHUNK - 1) / CHUNK, d_chunks = (D + CHUNK - 1) / CHUNK;
    Inputs tokens(T, P), hidden(routed, groups_of(F) * GROUP);
    std::vector<Input> x(routed);
    std::vector<float *> h(routed), y(routed);
    for (int64_t r = 0; r < routed; r++) h[r] = h_RQ + r * Q, y[r] = y_RD + r * D;
#pragma omp parallel
    {
#pragma omp for
        for (int64_t t = 0; t < T; t++) tokens.set(t, x_TP + t * P);
#pragma omp single
        for (int64_t r = 0; r < routed; r++) x[r] = *tokens[token_R[r]];
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < number * f_chunks; item++) {
            const Expert &e = experts[item / f_chunks];
            int64_t f0 = item % f_chunks * CHUNK, f1 = std::min(f0 + CHUNK, F);
            const Input *mine = x.data() + e.first;
            float *const *to = h.data() + e.first;
            dots(use, e.in, f0, f1, mine, e.rows, to);
            if (gated) dots(use, e.in, F + f0, F + f1, mine, e.rows, to);
            for (int64_t r = e.first; r < e.first + e.rows; r++)
                hidden_units(h[r] + f0, gated ? h[r] + F + f0 : nullptr, f1 - f0, activation, bfloat16);
        }
#pragma omp for
        for (int64_t r = 0; r < routed; r++) {
            // The padding lies where the up projection was, which is used up now.
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

// All weights of a matrix, [rows, cols], as float32 or, rounded to nearest even, bfloat16.
void moefit_decode(int64_t level, const Matrix *m, void *out, int64_t bfloat16) {
#pragma omp parallel
    {
        std::vector<float> row(groups_of(m->cols) * GROUP);
#pragma omp for schedule(dynamic, 8)
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
