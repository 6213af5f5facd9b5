// Weight matrices as they are stored in slots, inputs, and the operations of each instruction set level.
//
// Rows are output units. A row of a grouped format is G = ceil(cols / 64) groups of 64 weights. A group
// takes bits * 8 bytes of `codes`; `meta` has the row's G scales as halves, then, below 8 bits, its G
// minima. 16 rows form a slab, in which codes are interleaved by words of 4 bytes, and metadata by group: 16
// scales, then 16 minima. Rows after the last slab are consecutive. quant/grouped_int.py implements the same
// layout in torch and is the reference that tests compare with. Codes of a checkpoint with scales of its own
// (scaled/kinds.h, quant/scaled/matrix.py; scaled/k_quants.h, quant/scaled/k_quants.py) lie in slabs in the same way.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"
#include "levels/latent.h"
#include "levels/rows.h"
#include "scaled/k_quants.h"
#include "scaled/kinds.h"

enum Kind : int64_t { F32 = 0, BF16 = 1, F16 = 16, FP8 = 17, INT2 = 2, INT3, INT4, INT5, INT6, INT8 = 8 };  // others: scaled/kinds.h, scaled/k_quants.h

// FP8 is E4M3, a byte for each weight in consecutive rows; `meta` has a float for each row and FP8_GROUP of its inputs:
// 256 times the scale, because a code's bits, moved, are a half of 1 / 256 of its value.
struct Matrix {
    const uint8_t *codes;
    const uint8_t *meta;
    int64_t rows, cols, kind;
};

// One token's activations, padded with zeros to whole groups. For integer products also as integers 128 * high +
// low with a scale per group: of 15 bits, or of 8 without low parts for weights of so few bits that the error of
// activations is small beside that of their own rounding (has_bytes).
struct Input {
    const float *x;
    const uint16_t *bfloat16;  // the same values, not padded; null if the model's activations are of another kind
    const int8_t *digits;      // 4 high parts, their 4 low parts, the next 4 high parts, ...; or high parts alone; or null
    const float *scale;        // of the group's integers
    const float *sum;          // of the group's values as the integers represent them
    const int32_t *quarters;   // sums of the integers of 16 inputs, four for the group
};

constexpr int64_t GROUP = 64;
constexpr int64_t FP8_GROUP = 128;  // inputs
constexpr int64_t SLAB = 16;   // rows that are interleaved
constexpr int64_t TOKENS = 8;  // whose sums are in registers at once
constexpr int64_t BLOCK = 16;  // tokens that are packed together
constexpr float SMALLEST = 1e-30f;  // largest activation of a group below which it is 0: the reciprocal must be finite

// A value, such as a vector, from memory of any alignment.
template <typename T>
static inline __attribute__((always_inline)) T at_any(const void *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Sum of the integers of a group's first or last 32 inputs.
inline int32_t half_sum(const Input &x, int64_t g, int64_t half) {
    const int32_t *two = x.quarters + 4 * g + 2 * half;
    return two[0] + two[1];
}

inline int64_t groups_of(int64_t cols) { return (cols + GROUP - 1) / GROUP; }

inline uint16_t to_bfloat16(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    uint32_t nearest = (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // ties to even
    return uint16_t(x == x ? nearest : word >> 16 | 0x40);          // NaN, which rounding could overflow
}

// Whether products are of integers.
inline bool has_digits(const Matrix &m) { return m.meta && m.kind != FP8; }

// Whether activations of products with a kind of grouped integers have 8 bits.
constexpr bool takes_bytes(int64_t kind) { return kind <= INT4; }
inline bool has_bytes(const Matrix &m) { return has_digits(m) && !is_scaled(m.kind) && takes_bytes(m.kind); }

// Bytes of a group of a token's digits.
constexpr int64_t digit_bytes(bool bytes) { return bytes ? GROUP : 2 * GROUP; }
inline bool has_words(const Matrix &m) { return has_digits(m) && !has_bytes(m); }
inline int64_t digit_bytes(const Matrix &m) { return digit_bytes(has_bytes(m)); }

// Bytes of an element: a float of any kind, or a code of an INT8 cache.
constexpr int64_t bytes_of(int64_t kind) { return kind == F32 ? 4 : kind == FP8 || kind == INT8 ? 1 : 2; }

inline float fp8_scale(const Matrix &m, int64_t row, int64_t column) {
    int64_t number = (m.cols + FP8_GROUP - 1) / FP8_GROUP;
    return at_any<float>(m.meta + 4 * (row * number + column / FP8_GROUP));
}

// Bits of a code of a grouped format; groups of metadata of a row, and their values of 2 bytes.
inline int64_t bits_of(int64_t kind) {
    return is_k_quant(kind) ? bits_of_k(kind) : is_scaled(kind) ? bits_of_codes(kind) : kind;
}
inline int64_t meta_groups(const Matrix &m) { return is_k_quant(m.kind) ? groups_of(m.cols) / K_GROUPS : groups_of(m.cols); }
inline int64_t parts_of(int64_t kind) {
    return is_k_quant(kind) ? words_of_k(kind) : is_scaled(kind) ? parts_of_scales(kind) : kind == INT8 ? 1 : 2;
}

// Bytes of a row of a grouped format.
inline int64_t code_bytes(const Matrix &m) { return groups_of(m.cols) * bits_of(m.kind) * 8; }
inline int64_t meta_bytes(const Matrix &m) { return meta_groups(m) * parts_of(m.kind) * 2; }
inline int64_t rows_in_slabs(const Matrix &m) { return m.rows / SLAB * SLAB; }

// Copy one row's codes and meta to consecutive memory.
inline void copy_row(const Matrix &m, int64_t row, uint8_t *codes, uint8_t *meta) {
    int64_t size = code_bytes(m), more = meta_bytes(m);
    if (row >= rows_in_slabs(m)) {
        std::memcpy(codes, m.codes + row * size, size);
        std::memcpy(meta, m.meta + row * more, more);
        return;
    }
    int64_t base = row / SLAB * SLAB, lane = row % SLAB, groups = meta_groups(m), parts = parts_of(m.kind);
    const uint8_t *from = m.codes + base * size + 4 * lane, *from_meta = m.meta + base * more + 2 * lane;
    for (int64_t word = 0; word < size / 4; word++) std::memcpy(codes + 4 * word, from + 4 * SLAB * word, 4);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t part = 0; part < parts; part++)
            std::memcpy(meta + 2 * (part * groups + g), from_meta + 2 * SLAB * (g * parts + part), 2);
}

// Write one row to a slab; the inverse of `copy_row`. groups: of metadata.
inline void put_row(int64_t lane, int64_t groups, int64_t size, int64_t more, const uint8_t *codes,
                    const uint8_t *meta, uint8_t *slab_codes, uint8_t *slab_meta) {
    int64_t parts = more / 2 / groups;
    for (int64_t word = 0; word < size / 4; word++)
        std::memcpy(slab_codes + 4 * (SLAB * word + lane), codes + 4 * word, 4);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t part = 0; part < parts; part++)
            std::memcpy(slab_meta + 2 * (SLAB * (g * parts + part) + lane), meta + 2 * (part * groups + g), 2);
}

// Write the rows after the last slab, from `row` on, to a slab whose other rows are not changed.
inline void fill_slab(const Matrix &m, int64_t row, uint8_t *codes, uint8_t *meta) {
    int64_t size = code_bytes(m), more = meta_bytes(m);
    for (int64_t r = row; r < m.rows; r++)
        put_row(r - row, meta_groups(m), size, more, m.codes + r * size, m.meta + r * more, codes, meta);
}

// Tokens of one product: each by itself, and together in the order in which `dot` reads them.
struct Panel {
    const Input *x;
    const uint8_t *packed;
    int64_t tokens;
};

struct Level {
    // y[t][row] = weights[row] . x[t] for rows first to last - 1.
    void (*dot)(const Matrix &, int64_t first, int64_t last, const Panel &, float *const *y);
    // Bytes of each token in Panel::packed for a product with this matrix; 0 if it reads inputs one by one.
    int64_t (*token_bytes)(const Matrix &, const Input *x);
    // Write Panel::packed, which has room for whole BLOCKs. Any number of blocks may be packed by themselves.
    void (*pack)(const Matrix &, const Input *x, int64_t tokens, uint8_t *packed);
    // One row's weights as float, padding included.
    void (*decode)(const Matrix &, int64_t row, float *out);
    // Convert floats to a kind of activations: float32, or rounded to nearest even, bfloat16 or float16, in which what is
    // too large becomes infinity.
    void (*narrow)(const float *, int64_t kind, int64_t number, void *to);
    // The same without leaving the results in a cache, where that is faster for strided rows.
    void (*narrow_past)(const float *, int64_t kind, int64_t number, void *to);
    // Convert activations to floats, padded with zeros to `width`.
    void (*widen)(const void *, int64_t kind, int64_t number, float *to, int64_t width);
    // Round floats in place to the values of a kind of activations.
    void (*round)(float *, int64_t kind, int64_t number);
    // Convert a group of activations to the integers of `Input`, without low parts if `bytes`.
    void (*integers)(const float *x, bool bytes, int8_t *digits, float *scale, float *sum, int32_t *quarters);
    // Add keys first to last - 1 of one span to the running softmax of these rows (attention.h).
    void (*attend)(const Attention &, const CacheHead &, int64_t first, int64_t last, const QueryRows &, Seen &);
    // Round one row of keys or values to INT8 and return its scale.
    float (*quantize)(const void *row, int64_t kind, int64_t width, int8_t *codes);
    // One row (levels/rows.h).
    void (*norm)(const Norm &, const void *x, void *y);
    // The rotated elements of one head.
    void (*rotate)(const Rotary &, const void *cos, const void *sin, const void *x, void *y);
    // gate = silu(gate) * up, or without up if it is null; rounded where torch would round in a model of a kind.
    void (*silu)(float *gate, const float *up, int64_t number, int64_t kind);
    // y[t] += the rows, each times an element of x[t]; y[t][r] = the row r . x[t] (levels/latent.h).
    void (*add_rows)(const RowProduct &);
    void (*dot_rows)(const RowProduct &);
    // Whether products of two bfloat16 read Input::bfloat16 and not Input::x.
    bool reads_bfloat16 = false;
};

extern const Level PORTABLE;
#if defined(__x86_64__)
extern const Level AVX2;
extern const Level AVX512;  // with VNNI
const Level &avx2_vnni_level();
const Level &avx512_bf16_level();
const Level &amx_level();

bool avx_vnni_here();
#endif

// In the order of LEVELS in quant/cpu_kernels.py.
enum LevelNumber : int64_t { IS_PORTABLE, IS_AVX2, IS_AVX2_VNNI, IS_AVX512, IS_AVX512_BF16, IS_AMX };

inline const Level &level_of(int64_t level) {
#if defined(__x86_64__)
    switch (level) {
        case IS_AVX2: return AVX2;
        case IS_AVX2_VNNI: return avx2_vnni_level();
        case IS_AVX512: return AVX512;
        case IS_AVX512_BF16: return avx512_bf16_level();
        case IS_AMX: return amx_level();
    }
#endif
    (void)level;
    return PORTABLE;
}
