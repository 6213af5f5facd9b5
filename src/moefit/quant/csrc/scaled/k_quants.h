// Matrices in llama.cpp's k-quants: a weight is d * scale * (code - zero) or, with minima, d * scale * code - m * minimum.
//
// d and m are halves that 256 weights of a row, a block, share; scales and minima are small integers that a part of 16
// or 32 shares. Codes lie as those of grouped integers of as many bits, and `meta` has, for a block instead of a group:
// d, m if there are minima, and the parts' numbers in the bits that they take in a file. Q3_K, Q4_K and Q5_K have
// four numbers of 6 bits for each group of 64: 16 of these bits are a word of the group, and 8 are half of a word of
// two groups. Q2_K and Q6_K have a byte for each part. Columns are whole blocks.
#pragma once
#include <cstdint>

enum KQuant : int64_t { Q2_K = 130, Q3_K, Q4_K, Q5_K, Q6_K };  // as in quant/scaled/k_quants.py: 128 + bits

constexpr int64_t K_GROUPS = 4;  // of a block

constexpr bool is_k_quant(int64_t kind) { return kind & 128; }
constexpr int64_t bits_of_k(int64_t kind) { return kind & 7; }
constexpr bool has_minima(int64_t kind) { return kind == Q2_K || kind == Q4_K || kind == Q5_K; }
constexpr bool has_byte_numbers(int64_t kind) { return kind == Q2_K || kind == Q6_K; }
constexpr int32_t zero_of_k(int64_t kind) { return kind == Q3_K ? 4 : kind == Q6_K ? 32 : 0; }

// Parts of half a group, and words of 2 bytes of metadata per block.
constexpr int64_t parts_of_half(int64_t kind) { return kind == Q4_K || kind == Q5_K ? 1 : 2; }
constexpr int64_t words_of_k(int64_t kind) { return 1 + has_minima(kind) + (has_byte_numbers(kind) ? 8 : 6); }

// Scales, and minima if there are any, of the parts of a block's group g, from word(n), the block's words of one row or
// of a vector of rows.
template <int64_t KIND, typename I, typename Word>
static inline __attribute__((always_inline)) void k_numbers(Word word, int64_t g, I *scale, I *least) {
    constexpr int64_t FIRST = 1 + has_minima(KIND);
    I four[4];
    if constexpr (has_byte_numbers(KIND)) {
        const I two[2] = {word(FIRST + 2 * g), word(FIRST + 2 * g + 1)};
        for (int i = 0; i < 4; i++) four[i] = two[i / 2] >> 8 * (i % 2) & 255;
    } else {
        const I all = word(FIRST + g) | (word(FIRST + 4 + g / 2) >> 8 * (g % 2) & 255) << 16;
        for (int i = 0; i < 4; i++) four[i] = all >> 6 * i & 63;
    }
    for (int i = 0; i < 2 * parts_of_half(KIND); i++) {
        if constexpr (KIND == Q2_K) scale[i] = four[i] & 15, least[i] = four[i] >> 4;
        else if constexpr (KIND == Q3_K) scale[i] = four[i] - 32;
        else if constexpr (KIND == Q6_K) scale[i] = (four[i] ^ 128) - 128;
        else scale[i] = four[i], least[i] = four[i + 2];
    }
}

struct Matrix;

// One row's weights as float.
void decode_k(const Matrix &, int64_t row, float *out);
// Fill rows from blocks as a file has them, `bytes` bytes a row.
void fill_k(const Matrix &, int64_t first, int64_t number, const uint8_t *blocks, int64_t bytes);
