// C interface: a linear layer, the experts of one MoE block, decoding, and the weighted sum of outputs.
//
// Work is divided by output rows, and each output is summed by one thread in a fixed order, so results do
// not depend on the number of threads. Decoding uses OpenMP, whose symbols are resolved by the runtime that
// torch has loaded; kernels that every token calls use the pool of pool.h.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kinds.h"
#include "matrix.h"
#include "pool.h"
#include "products.h"
#include "levels/rounding.h"
#include "tiles.h"

namespace {

constexpr int64_t CHUNK = 32, LARGEST_CHUNK = 128;  // output rows that one thread takes at a time
constexpr int64_t FEW = 4;                          // tokens
constexpr int64_t SLICE = 1 << 19;  // inputs of the tokens that one product is of: they stay in a cache of 2 MB

// CLAMPED: gate and up are in turn in the rows of `in`, and both are clamped (gpt-oss).
enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED, IDENTITY, CLAMPED };

// Few rows where few tokens are multiplied, so that threads end at about the same time: a thread's items follow one
// another in memory. With many tokens an item takes long enough, and larger ones read the tokens less often.
int64_t chunk_of(int64_t rows, int64_t tokens) {
    if (tokens <= FEW) return CHUNK;
    return std::min(std::max(CHUNK, rows / 16 / CHUNK * CHUNK), LARGEST_CHUNK);
}

float activate(float x, int64_t activation) {
    switch (activation) {
        case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
        case GELU_TANH: return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        case RELU: return std::max(x, 0.0f);
        case RELU_SQUARED: return x < 0 ? 0.0f : x * x;
        default: return x;
    }
}

// Hidden units from gate (or input) and up, which may be overwritten; rounded where torch would round in a model of a kind.
void hidden_units(const Level &use, float *h, float *up, int64_t number, int64_t activation, int64_t kind) {
    if (activation == SILU) return use.silu(h, up, number, kind);
    use.round(h, kind, number);
    for (int64_t f = 0; f < number; f++) h[f] = activate(h[f], activation);
    use.round(h, kind, number);
    if (!up) return;
    use.round(up, kind, number);
    for (int64_t f = 0; f < number; f++) h[f] *= up[f];
    use.round(h, kind, number);
}

// Hidden units (up + 1) * gate * sigmoid(1.702 gate) of a gate up to 7 and an up within 7 of 0, from pairs of gate
// and up; rounded where torch would round in a model of a kind (transformers' GptOssExperts).
void clamped_units(const float *pairs, int64_t number, int64_t kind, float *h) {
    auto round = [&](float x) { return rounded(x, kind); };
    for (int64_t f = 0; f < number; f++) {
        float gate = round(pairs[2 * f]), up = round(pairs[2 * f + 1]);
        gate = gate > 7 ? 7 : gate, up = up > 7 ? 7 : up < -7 ? -7 : up;  // not a number stays so
        float sigmoid = round(1 / (1 + std::exp(-round(gate * 1.702f))));
        h[f] = round(round(up + 1) * round(gate * sigmoid));
    }
}

// Activations as integers of one width.
class Integers {
public:
    Integers(int64_t number, int64_t groups, bool bytes)
        : bytes_(bytes), groups_(groups), digits_(number * groups * digit_bytes(bytes)), scale_(number * groups),
          sum_(scale_.size()), quarters_(4 * scale_.size()) {}

    bool empty() const { return digits_.empty(); }

    // Convert floats padded with zeros to whole groups.
    void set(const Level &level, int64_t i, const float *x, Input &to) {
        int64_t at = i * groups_, step = digit_bytes(bytes_);
        to.digits = &digits_[at * step], to.scale = &scale_[at], to.sum = &sum_[at], to.quarters = &quarters_[4 * at];
        for (int64_t g = 0; g < groups_; g++, at++)
            level.integers(x + g * GROUP, bytes_, &digits_[at * step], &scale_[at], &sum_[at], &quarters_[4 * at]);
    }

private:
    bool bytes_;
    int64_t groups_;
    std::vector<int8_t> digits_;
    std::vector<float> scale_, sum_;
    std::vector<int32_t> quarters_;
};

// Activations in the forms that some matrices need, `cols` each.
class Inputs {
public:
    Inputs(const Level &level, int64_t number, int64_t cols, int64_t kind, bool words, bool bytes)
        : level_(level), cols_(cols), groups_(groups_of(cols)), kind_(kind), words_(words ? number : 0, groups_, false),
          bytes_(bytes ? number : 0, groups_, true), inputs_(number), with_bytes_(bytes ? number : 0) {}

    // From input i on, in the form for a matrix. May be one past the last, for an expert without rows.
    const Input *at(const Matrix &m, int64_t i) const { return (has_bytes(m) ? with_bytes_ : inputs_).data() + i; }

    // From floats padded with zeros to whole groups and, if the model's activations are bfloat16, the same values in
    // it. Both must stay valid.
    void set(int64_t i, const float *x, const uint16_t *bfloat16) {
        inputs_[i] = {x, bfloat16, nullptr, nullptr, nullptr, nullptr};
        if (!bytes_.empty()) bytes_.set(level_, i, x, with_bytes_[i] = inputs_[i]);
        if (!words_.empty()) words_.set(level_, i, x, inputs_[i]);
    }

    // From token i of x. `floats` has room for all tokens, or is empty if products read bfloat16 or digits.
    void set(int64_t i, const void *x, std::vector<float> &floats) {
        static thread_local std::vector<float> row;
        const char *at = (const char *)x + i * cols_ * bytes_of(kind_);
        const uint16_t *bfloat16 = kind_ == BF16 ? (const uint16_t *)at : nullptr;
        if (floats.empty() && words_.empty() && bytes_.empty()) {
            inputs_[i] = {nullptr, bfloat16, nullptr, nullptr, nullptr, nullptr};
            return;
        }
        if (floats.empty()) row.resize(groups_ * GROUP);
        float *mine = floats.empty() ? row.data() : &floats[i * groups_ * GROUP];
        level_.widen(at, kind_, cols_, mine, groups_ * GROUP);
        set(i, mine, bfloat16);
        if (!floats.empty()) return;
        inputs_[i].x = nullptr;
        if (!bytes_.empty()) with_bytes_[i].x = nullptr;
    }

    // From all tokens of x.
    void set_all(const void *x, std::vector<float> &floats) {
        int64_t number = inputs_.size();
        each((number + BLOCK - 1) / BLOCK, [&](int64_t n) {
            for (int64_t i = n * BLOCK; i < std::min((n + 1) * BLOCK, number); i++) set(i, x, floats);
        });
    }

private:
    const Level &level_;
    int64_t cols_, groups_, kind_;
    Integers words_, bytes_;
    std::vector<Input> inputs_, with_bytes_;
};

// The tokens of several products, each packed for its matrix.
class Panels {
public:
    explicit Panels(const Level &level) : level_(level) {}

    // Add the tokens of a product, whose inputs are set.
    void add(const Matrix &m, const Input *x, int64_t tokens) {
        int64_t bytes = tokens ? level_.token_bytes(m, x) : 0;
        panels_.push_back({x, nullptr, tokens});
        for (int64_t t = 0; t < tokens && bytes; t += BLOCK, size_ += (BLOCK * bytes + 63) / 64 * 64)
            blocks_.push_back({&m, x + t, std::min(BLOCK, tokens - t), size_, (int64_t)panels_.size() - 1});
    }

    // Allocate memory for all. Returns the number of blocks to pack.
    int64_t allocate() {
        packed_.reset(size_ ? (uint8_t *)std::aligned_alloc(64, size_) : nullptr);
        for (size_t i = blocks_.size(); i-- > 0;) panels_[blocks_[i].panel].packed = packed_.get() + blocks_[i].at;
        return blocks_.size();
    }

    void pack(int64_t i) {
        const Block &one = blocks_[i];
        level_.pack(*one.m, one.x, one.tokens, packed_.get() + one.at);
    }

    const Panel &operator[](int64_t i) const { return panels_[i]; }

private:
    struct Block {
        const Matrix *m;
        const Input *x;
        int64_t tokens, at, panel;
    };

    const Level &level_;
    std::vector<Panel> panels_;
    std::vector<Block> blocks_;
    int64_t size_ = 0;
    std::unique_ptr<uint8_t, decltype(&std::free)> packed_{nullptr, &std::free};
};

// Added in an order that depends on the number alone.
float sum_of_squares(const float *x, int64_t number) {
    constexpr int64_t LANES = 16;
    float squares[LANES] = {};
    int64_t whole = number / LANES * LANES;
    for (int64_t d = 0; d < whole; d += LANES)
        for (int64_t i = 0; i < LANES; i++) squares[i] += x[d + i] * x[d + i];
    for (int64_t i = 0; i < number - whole; i++) squares[i] += x[whole + i] * x[whole + i];
    return std::accumulate(squares, squares + LANES, 0.0f);
}

}  // namespace

void multiply(const Level &use, const Product *products, int64_t number, const void *x_TI, int64_t tokens, int64_t kind) {
    if (!tokens) return;
    int64_t cols = products->m->cols, slice = std::max(2 * BLOCK, SLICE / cols / (2 * BLOCK) * 2 * BLOCK);
    int64_t slices = (tokens + slice - 1) / slice;
    bool words = false, bytes = false, floats_needed = false;
    std::vector<int64_t> chunk(number), first(number + 1);  // rows of an item, and the number of items before a product's
    for (int64_t n = 0; n < number; n++) {
        const Matrix &m = *products[n].m;
        words |= has_words(m), bytes |= has_bytes(m), floats_needed |= !has_digits(m) && !(use.reads_bfloat16 && m.kind == BF16 && kind == BF16);
        chunk[n] = chunk_of(m.rows, tokens), first[n + 1] = first[n] + slices * ((m.rows + chunk[n] - 1) / chunk[n]);
    }
    Inputs inputs(use, tokens, cols, kind, words, bytes);
    std::vector<float> floats(floats_needed ? tokens * groups_of(cols) * GROUP : 0);
    Panels panels(use);
    auto write = tokens > 2 * BLOCK ? use.narrow_past : use.narrow;
    inputs.set_all(x_TI, floats);
    for (int64_t n = 0; n < number; n++)
        for (int64_t t = 0; t < tokens; t += slice) panels.add(*products[n].m, inputs.at(*products[n].m, t), std::min(slice, tokens - t));
    each(panels.allocate(), [&](int64_t i) { panels.pack(i); });
    each(first[number], [&](int64_t item) {
        static thread_local std::vector<float> made;
        static thread_local std::vector<float *> y;
        int64_t n = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
        const Product &product = products[n];
        int64_t rows = product.m->rows, chunks = (rows + chunk[n] - 1) / chunk[n], at = item - first[n];
        int64_t c = at % chunks * chunk[n], last = std::min(c + chunk[n], rows), part = at / chunks;
        const Panel &panel = panels[n * slices + part];
        made.resize(panel.tokens * chunk[n]), y.resize(panel.tokens);
        for (int64_t t = 0; t < panel.tokens; t++) y[t] = &made[t * chunk[n]] - c;
        use.dot(*product.m, c, last, panel, y.data());
        for (int64_t t = 0; t < panel.tokens; t++) {
            float *from = &made[t * chunk[n]];
            int64_t to = (part * slice + t) * rows + c;
            for (int64_t r = c; r < last && product.bias; r++) from[r - c] += product.bias[r];
            write(from, kind, last - c, (char *)product.y_TO + to * bytes_of(kind));
        }
    });
}

extern "C" {

// Increased with every change of a signature or structure, together with VERSION in quant/cpu_kernels.py:
// a library of older sources is then not used.
int64_t moefit_version() { return 24; }

#if defined(__x86_64__)
// Whether there is an instruction for float16; uses CPUID because older compilers do not know its name.
static bool half_floats_here() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The levels that this processor has: bit n is set for LevelNumber n.
int64_t moefit_levels() {
    int64_t found = 1 << IS_PORTABLE;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && half_floats_here())) return found;
    found |= 1 << IS_AVX2;
    if (avx_vnni_here()) found |= 1 << IS_AVX2_VNNI;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vnni")))
        return found;
    found |= 1 << IS_AVX512;
    if (__builtin_cpu_supports("avx512bf16")) found |= 1 << IS_AVX512_BF16;
    if (__builtin_cpu_supports("avx512bf16") && tiles_here()) found |= 1 << IS_AMX;
#endif
    return found;
}

// y_TO = x_TI W^T + bias, tokens and results of a kind; bias is null or float32.
void moefit_linear(int64_t level, const Matrix *m, const void *x_TI, int64_t tokens, int64_t kind, const float *bias,
                   void *y_TO) {
    Product product = {m, bias, y_TO};
    multiply(level_of(level), &product, 1, x_TI, tokens, kind);
}

// Outputs first to last - 1 of a product of some tokens, plus a bias: y[t][first], ...
static void dot_and_add(const Level &use, const Matrix &m, int64_t first, int64_t last, const Panel &panel,
                        const void *bias, int64_t kind, float *const *y) {
    use.dot(m, first, last, panel, y);
    if (!bias) return;
    static thread_local std::vector<float> values;
    values.resize(last - first);
    use.widen((const char *)bias + first * bytes_of(kind), kind, last - first, values.data(), last - first);
    for (int64_t t = 0; t < panel.tokens; t++)
        for (int64_t r = first; r < last; r++) y[t][r] += values[r - first];
}

// Hidden units first to last - 1 of an expert whose gates and ups are in turn.
static void clamped_hidden(const Level &use, const Expert &e, int64_t first, int64_t last, const Panel &panel, int64_t kind,
                           float *const *h) {
    static thread_local std::vector<float> made;
    static thread_local std::vector<float *> y;
    int64_t width = 2 * (last - first);
    made.resize(panel.tokens * width), y.resize(panel.tokens);
    for (int64_t t = 0; t < panel.tokens; t++) y[t] = &made[t * width] - 2 * first;
    dot_and_add(use, e.in, 2 * first, 2 * last, panel, e.in_bias, e.bias_kind, y.data());
    for (int64_t t = 0; t < panel.tokens; t++)
        clamped_units(&made[t * width], last - first, kind, h[t] + first);
}

// Every routed row through its expert, unweighted: y_RD, as many rows as are routed; rows of no
// expert are not written.
//
// x_TD: of a kind, to which hidden units are rounded. token_R: the token of each routed row;
// null, the first. h_RQ: scratch, where Q is in whole groups and at least the rows of `in`.
void moefit_experts(int64_t level, const Expert *experts, int64_t number, const int64_t *token_R,
                    int64_t routed, const void *x_TD, int64_t T, int64_t kind, float *h_RQ, int64_t Q,
                    int64_t gated, int64_t activation, float *y_RD) {
    if (!number) return;
    const Level &use = level_of(level);
    int64_t F = experts[0].down.cols, D = experts[0].down.rows;
    int64_t I = activation == CLAMPED ? F : experts[0].in.rows;  // rows of `in`, or pairs of them
    int64_t i_chunk = chunk_of(number * I, routed / number), d_chunk = chunk_of(number * D, routed / number);
    int64_t i_chunks = (I + i_chunk - 1) / i_chunk, d_chunks = (D + d_chunk - 1) / d_chunk;
    bool words = std::any_of(experts, experts + number, [](const Expert &e) { return has_words(e.in) || has_words(e.down); });
    bool bytes = std::any_of(experts, experts + number, [](const Expert &e) { return has_bytes(e.in) || has_bytes(e.down); });
    Inputs tokens(use, T, experts[0].in.cols, kind, words, bytes), hidden(use, routed, F, kind, words, bytes);
    bool pairs = use.reads_bfloat16 && kind == BF16 &&
                 std::all_of(experts, experts + number, [](const Expert &e) { return e.in.kind == BF16; });
    std::vector<float> floats(pairs ? 0 : T * groups_of(experts[0].in.cols) * GROUP);
    std::vector<uint16_t> halves(kind == BF16 ? routed * F : 0);
    Panels panels(use), hidden_panels(use);
    std::vector<Input> x(routed);
    std::vector<float *> h(routed), y(routed);
    for (int64_t r = 0; r < routed; r++) h[r] = h_RQ + r * Q, y[r] = y_RD + r * D;
    tokens.set_all(x_TD, floats);
    for (int64_t n = 0; n < number; n++) {
        const Expert &e = experts[n];
        for (int64_t r = e.first; r < e.first + e.rows; r++) x[r] = *tokens.at(e.in, token_R ? token_R[r] : 0);
        panels.add(e.in, x.data() + e.first, e.rows);
    }
    each(panels.allocate(), [&](int64_t i) { panels.pack(i); });
    each(number * i_chunks, [&](int64_t item) {
        const Expert &e = experts[item / i_chunks];
        if (!e.rows) return;
        int64_t i0 = item % i_chunks * i_chunk, i1 = std::min(i0 + i_chunk, I);
        const Panel &panel = panels[item / i_chunks];
        float *const *to = h.data() + e.first;
        if (activation == CLAMPED) clamped_hidden(use, e, i0, i1, panel, kind, to);
        else dot_and_add(use, e.in, i0, i1, panel, e.in_bias, e.bias_kind, to);
    });
    each(routed, [&](int64_t r) {
        if (activation != CLAMPED) hidden_units(use, h[r], gated ? h[r] + F : nullptr, F, activation, kind);
        // The padding overwrites the up projection, which is no longer needed.
        std::fill(h[r] + F, h[r] + groups_of(F) * GROUP, 0.0f);
        if (kind == BF16) use.narrow(h[r], BF16, F, &halves[r * F]);
        hidden.set(r, h[r], kind == BF16 ? &halves[r * F] : nullptr);
    });
    for (int64_t n = 0; n < number; n++) hidden_panels.add(experts[n].down, hidden.at(experts[n].down, experts[n].first), experts[n].rows);
    each(hidden_panels.allocate(), [&](int64_t i) { hidden_panels.pack(i); });
    each(number * d_chunks, [&](int64_t item) {
        const Expert &e = experts[item / d_chunks];
        int64_t d0 = item % d_chunks * d_chunk, d1 = std::min(d0 + d_chunk, D);
        if (!e.rows) return;
        dot_and_add(use, e.down, d0, d1, hidden_panels[item / d_chunks], e.down_bias, e.bias_kind, y.data() + e.first);
    });
}

// Sum of each token's outputs, in order: y_TD = sum of weight * y over K, rounded wherever torch would.
//
// kind: of the tokens, thus of y_TD; y_RD, T * K rows of y_kind, counts as rounded to it. Where weights are of the tokens'
// kind, products are rounded to it. energy_R: null, or each weighted output's squares, summed.
void moefit_weighted_sum(int64_t level, const void *y_RD, int64_t y_kind, int64_t T, int64_t K, int64_t D,
                         const void *weights_R, int64_t weights_kind, int64_t kind, void *y_TD, float *energy_R) {
    constexpr int64_t LANES = 16, PARTS = 4;
    const Level &use = level_of(level);
    std::vector<float> weight(T * K);
    use.widen(weights_R, weights_kind, T * K, weight.data(), T * K);
    // Columns are independent but for the squares.
    int64_t part = energy_R ? D : std::max((D / PARTS + LANES - 1) / LANES * LANES, LANES), parts = (D + part - 1) / part;
    each(T * parts, [&](int64_t item) {
        int64_t t = item / parts, begin = item % parts * part, width = std::min(part, D - begin);
        static thread_local std::vector<float> total, output;
        total.assign(width, 0.0f), output.resize(width);
        for (int64_t r = t * K; r < (t + 1) * K; r++) {
            use.widen((const char *)y_RD + (r * D + begin) * bytes_of(y_kind), y_kind, width, output.data(), width);
            if (y_kind != kind) use.round(output.data(), kind, width);
            float factor = weight[r];  // in a register: outputs could be where it is
            for (float &one : output) one *= factor;
            if (weights_kind == kind) use.round(output.data(), kind, width);
            for (int64_t d = 0; d < width; d++) total[d] += output[d];
            if (energy_R) energy_R[r] = sum_of_squares(output.data(), width);
        }
        use.narrow(total.data(), kind, width, (char *)y_TD + (t * D + begin) * bytes_of(kind));
    });
}

// One token's output: the weighted sum of its K experts, as moefit_experts and moefit_weighted_sum would compute
// it. `first` and `rows` of the experts are not read; an expert may be given twice.
void moefit_token(int64_t level, const Expert *const *experts, int64_t K, const void *x_D, int64_t kind,
                  const void *weights_K, int64_t weights_kind, int64_t gated, int64_t activation, void *y_D,
                  float *energy_K) {
    std::vector<Expert> chosen(K);
    for (int64_t k = 0; k < K; k++) chosen[k] = *experts[k], chosen[k].first = k, chosen[k].rows = 1;
    int64_t D = chosen[0].down.rows;
    int64_t Q = groups_of(std::max(chosen[0].in.rows, chosen[0].down.cols)) * GROUP;
    std::unique_ptr<float[]> h_KQ(new float[K * Q]), y_KD(new float[K * D]);
    moefit_experts(level, chosen.data(), K, nullptr, K, x_D, 1, kind, h_KQ.get(), Q, gated, activation, y_KD.get());
    moefit_weighted_sum(level, y_KD.get(), F32, 1, K, D, weights_K, weights_kind, kind, y_D, energy_K);
}

// All weights of a matrix, [rows, cols], rounded to a kind of activations.
void moefit_decode(int64_t level, const Matrix *m, void *out, int64_t kind) {
    each((m->rows + SLAB - 1) / SLAB, [&](int64_t slab) {
        std::vector<float> row(groups_of(m->cols) * GROUP);
        for (int64_t r = slab * SLAB; r < std::min(m->rows, (slab + 1) * SLAB); r++) {
            level_of(level).decode(*m, r, row.data());
            level_of(level).narrow(row.data(), kind, m->cols, (char *)out + r * m->cols * bytes_of(kind));
        }
    });
}
}
