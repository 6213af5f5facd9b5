// Call every kernel at the portable level with made-up inputs and print a digest of each output, so that processors
// can be compared. tests/quant/test_aarch64.py builds it for this machine and for aarch64.
//
// Inputs are computed with integers, and activations are those without calls of the C library's mathematics.
#include <cstdio>
#include <string>
#include <vector>

#include "attention.h"
#include "half.h"
#include "levels/rows.h"
#include "matrix.h"

struct Expert {
    Matrix in, down;
    int64_t first, rows;
};

struct CacheRows {
    const void *rows;
    int64_t heads, tokens, width, kind, row_head, row_token;
    const int64_t *places;
    int8_t *codes;
    int64_t code_head, code_token;
    float *scales;
    int64_t scale_head;
};

struct Heads {
    int64_t heads, size, x_batch, x_head, x_token, y_batch, y_head, y_token;
};

struct Rotation {
    Rotary form;
    int64_t batch, tokens, angle_batch, angle_token;
    Heads heads[2];
};

extern "C" {
int64_t moefit_levels();
void moefit_linear(int64_t, const Matrix *, const void *, int64_t, int64_t, const float *, void *);
void moefit_experts(int64_t, const Expert *, int64_t, const int64_t *, int64_t, const void *, int64_t, int64_t, float *,
                    int64_t, int64_t, int64_t, float *);
void moefit_weighted_sum(int64_t, const void *, int64_t, int64_t, int64_t, int64_t, const void *, int64_t, int64_t, void *,
                         float *);
void moefit_decode(int64_t, const Matrix *, void *, int64_t);
int64_t moefit_encode(int64_t, const Matrix *, int64_t, int64_t, const float *, uint8_t *, uint8_t *);
void moefit_compensate(int64_t, const Matrix *, int64_t, int64_t, const float *, const float *, const float *, int64_t,
                       int64_t, uint8_t *, uint8_t *);
void moefit_attention(int64_t, const Attention *, const Segment *, int64_t, const void *, void *);
void moefit_write_rows(int64_t, const CacheRows *);
void moefit_norm(int64_t, const Norm *, const void *, int64_t, void *);
void moefit_rotate(int64_t, const Rotation *, const void *, const void *, const void *, void *, const void *, void *);
}

namespace {

constexpr int64_t RELU = 3, LEVEL = 0;
const int64_t INTEGERS[] = {2, 3, 4, 5, 6, 8}, FLOATS[] = {F32, BF16, F16};

// A pseudo-random sequence of floats from -1 to 1.
class Random {
public:
    float next() {
        state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
        return float(int32_t(state_ >> 40) - (1 << 23)) * 0x1p-23f;
    }

    std::vector<float> floats(int64_t number) {
        std::vector<float> made(number);
        for (float &one : made) one = next();
        return made;
    }

private:
    uint64_t state_ = 1;
} random_numbers;

std::vector<uint16_t> bfloat16(const std::vector<float> &from) {
    std::vector<uint16_t> made(from.size());
    for (size_t i = 0; i < from.size(); i++) made[i] = to_bfloat16(from[i]);
    return made;
}

std::vector<uint16_t> float16(const std::vector<float> &from) {
    std::vector<uint16_t> made(from.size());
    for (size_t i = 0; i < from.size(); i++) made[i] = half_of(from[i]);
    return made;
}

// Print the 64-bit FNV-1a hash of some memory.
template <typename T>
void print(const std::string &name, const std::vector<T> &made) {
    uint64_t hash = 14695981039346656037ull;
    auto bytes = reinterpret_cast<const unsigned char *>(made.data());
    for (size_t i = 0; i < made.size() * sizeof(T); i++) hash = (hash ^ bytes[i]) * 1099511628211ull;
    std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

// A matrix of this kind with its memory.
struct Weights {
    std::vector<float> floats;
    std::vector<uint16_t> halves;
    std::vector<uint8_t> codes, meta;
    Matrix matrix;

    Weights(int64_t kind, int64_t rows, int64_t cols, bool fitted = false) : floats(random_numbers.floats(rows * cols)) {
        matrix = {reinterpret_cast<const uint8_t *>(floats.data()), nullptr, rows, cols, F32};
        if (kind == F32) return;
        if (kind == BF16 || kind == F16) {
            halves = bfloat16(floats);
            if (kind == F16)  // values of any sign near 1
                for (uint16_t &half : halves) half = uint16_t((half & 0x83ff) | 0x3800);
            matrix = {reinterpret_cast<const uint8_t *>(halves.data()), nullptr, rows, cols, kind};
            return;
        }
        Matrix made = {nullptr, nullptr, rows, cols, kind}, from = matrix;
        codes.resize(rows * code_bytes(made)), meta.resize(rows * meta_bytes(made));
        std::vector<float> moments(groups_of(cols) * GROUP, 1.0f);
        moefit_encode(LEVEL, &from, kind, fitted, fitted ? moments.data() : nullptr, codes.data(), meta.data());
        matrix = {codes.data(), meta.data(), rows, cols, kind};
    }
};

void products(int64_t kind) {
    constexpr int64_t ROWS_OUT = 41, COLS = 200, TOKENS_IN = 21;
    std::string name = "kind " + std::to_string(kind);
    Weights weights(kind, ROWS_OUT, COLS);
    if (weights.matrix.meta) {
        print(name + " codes", weights.codes), print(name + " meta", weights.meta);
        Weights fitted(kind, ROWS_OUT, COLS, true);
        print(name + " fitted codes", fitted.codes), print(name + " fitted meta", fitted.meta);
    }
    std::vector<float> x = random_numbers.floats(TOKENS_IN * COLS), bias = random_numbers.floats(ROWS_OUT);
    std::vector<float> y(TOKENS_IN * ROWS_OUT), dense(ROWS_OUT * COLS);
    moefit_linear(LEVEL, &weights.matrix, x.data(), TOKENS_IN, F32, bias.data(), y.data());
    print(name + " float32 linear", y);
    std::vector<uint16_t> x_half = bfloat16(x), y_half(y.size());
    moefit_linear(LEVEL, &weights.matrix, x_half.data(), TOKENS_IN, BF16, nullptr, y_half.data());
    print(name + " bfloat16 linear", y_half);
    std::vector<uint16_t> x_float16 = float16(x);
    moefit_linear(LEVEL, &weights.matrix, x_float16.data(), TOKENS_IN, F16, nullptr, y_half.data());
    print(name + " float16 linear", y_half);
    moefit_decode(LEVEL, &weights.matrix, dense.data(), 0);
    print(name + " decode", dense);
}

void experts(int64_t kind) {
    constexpr int64_t D = 130, F = 70, T = 9, NUMBER = 3, ROUTED = 18, Q = 192;
    std::vector<Weights> in, down;
    std::vector<Expert> all;
    for (int64_t e = 0; e < NUMBER; e++) in.emplace_back(kind, 2 * F, D), down.emplace_back(kind, D, F);
    for (int64_t e = 0; e < NUMBER; e++) all.push_back({in[e].matrix, down[e].matrix, e * 6, 6});
    std::vector<int64_t> token(ROUTED);
    for (int64_t r = 0; r < ROUTED; r++) token[r] = r % T;
    std::vector<uint16_t> x = bfloat16(random_numbers.floats(T * D));
    std::vector<float> h(ROUTED * Q), y(ROUTED * D), energy(ROUTED), weight = random_numbers.floats(ROUTED);
    moefit_experts(LEVEL, all.data(), NUMBER, token.data(), ROUTED, x.data(), T, BF16, h.data(), Q, 1, RELU, y.data());
    print("kind " + std::to_string(kind) + " experts", y);
    std::vector<uint16_t> sum(T * D);
    moefit_weighted_sum(LEVEL, y.data(), F32, T, 2, D, weight.data(), F32, BF16, sum.data(), energy.data());
    print("kind " + std::to_string(kind) + " weighted sum", sum);
    print("kind " + std::to_string(kind) + " energy", energy);
}

void attention(int64_t cache) {
    constexpr int64_t HEADS = 4, GROUPS = 2, WIDTH_OF_HEAD = 32, TOKENS_CACHED = 700, FRESH = 5;
    int64_t size = GROUPS * TOKENS_CACHED * WIDTH_OF_HEAD;
    std::vector<float> rows = random_numbers.floats(2 * size), query = random_numbers.floats(FRESH * HEADS * WIDTH_OF_HEAD);
    std::vector<uint16_t> rows_half = bfloat16(rows), query_half = bfloat16(query), out(query.size());
    std::vector<int8_t> codes(2 * size);
    std::vector<float> scales(2 * GROUPS * TOKENS_CACHED);
    std::vector<int64_t> places(TOKENS_CACHED);
    for (int64_t t = 0; t < TOKENS_CACHED; t++) places[t] = t;
    CacheRows write = {rows_half.data(), 2 * GROUPS, TOKENS_CACHED, WIDTH_OF_HEAD, BF16, TOKENS_CACHED * WIDTH_OF_HEAD,
                       WIDTH_OF_HEAD, places.data(), codes.data(), TOKENS_CACHED * WIDTH_OF_HEAD, WIDTH_OF_HEAD,
                       scales.data(), TOKENS_CACHED};
    moefit_write_rows(LEVEL, &write);
    print("cache codes", codes), print("cache scales", scales);
    Attention a = {HEADS, GROUPS, WIDTH_OF_HEAD, WIDTH_OF_HEAD, BF16, cache, HEADS * WIDTH_OF_HEAD, WIDTH_OF_HEAD,
                   TOKENS_CACHED * WIDTH_OF_HEAD, WIDTH_OF_HEAD, TOKENS_CACHED * WIDTH_OF_HEAD, WIDTH_OF_HEAD,
                   TOKENS_CACHED, TOKENS_CACHED, 0, 0.25f, 0, nullptr};
    Segment segment = {rows_half.data(), rows_half.data() + size, nullptr, nullptr, TOKENS_CACHED - FRESH, FRESH, 0};
    if (cache == INT8)
        segment = {codes.data(), codes.data() + size, scales.data(), scales.data() + GROUPS * TOKENS_CACHED,
                   TOKENS_CACHED - FRESH, FRESH, 0};
    moefit_attention(LEVEL, &a, &segment, 1, query_half.data(), out.data());
    print("attention, cache of kind " + std::to_string(cache), out);
}

void small_operations() {
    constexpr int64_t ROWS_IN = 7, D = 130, C = 22;
    std::vector<float> weight = random_numbers.floats(D), x = random_numbers.floats(ROWS_IN * D), y(x.size());
    std::vector<uint16_t> half = bfloat16(x), half_out(x.size());
    for (int64_t round_first = 0; round_first < 2; round_first++) {
        Norm norm = {weight.data(), D, F32, F32, round_first, 1e-5f, 1.0f};
        moefit_norm(LEVEL, &norm, x.data(), ROWS_IN, y.data());
        print("float32 norm " + std::to_string(round_first), y);
        norm.kind = BF16;
        moefit_norm(LEVEL, &norm, half.data(), ROWS_IN, half_out.data());
        print("bfloat16 norm " + std::to_string(round_first), half_out);
    }
    std::vector<float> angles = random_numbers.floats(2 * ROWS_IN * C), head(x.begin(), x.begin() + ROWS_IN * C);
    std::vector<float> rotated(head.size());
    Rotation rotation = {{C, F32, 0, 0, 0}, 1, ROWS_IN, ROWS_IN * C, C, {{1, C, 0, 0, C, 0, 0, C}, {}}};
    moefit_rotate(LEVEL, &rotation, angles.data(), angles.data() + ROWS_IN * C, head.data(), rotated.data(), nullptr,
                  nullptr);
    print("rotary embedding", rotated);
}

}  // namespace

int main() {
    std::printf("levels %lld\n", static_cast<long long>(moefit_levels()));
    for (int64_t kind : FLOATS) products(kind), experts(kind);
    for (int64_t kind : INTEGERS) products(kind), experts(kind);
    attention(BF16), attention(INT8);
    small_operations();
}
