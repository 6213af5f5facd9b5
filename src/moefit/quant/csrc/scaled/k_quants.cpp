// Filling a matrix of k-quants from the blocks of a file, and decoding it.
#include "k_quants.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../half.h"
#include "../matrix.h"

namespace {

constexpr int64_t BLOCK_COLS = K_GROUPS * GROUP;

// Where the parts of a block are in a file: codes' lower and upper bits, numbers and d, m. Codes of 2 and 3 bits have their 2
// lower bits where Q6_K has the 2 upper ones.
struct Layout {
    int64_t bytes, nibbles, twos, ones, numbers, d, m;
};

constexpr Layout layout_of(int64_t kind) {
    switch (kind) {
        case Q2_K: return {84, 0, 16, 0, 0, 80, 82};
        case Q3_K: return {110, 0, 32, 0, 96, 108, 0};
        case Q4_K: return {144, 16, 0, 0, 4, 0, 2};
        case Q5_K: return {176, 48, 0, 16, 4, 0, 2};
        default: return {210, 0, 128, 0, 192, 208, 0};
    }
}

// Q6_K: lower 4 bits of group g, of which two share bytes; as a plane, byte i has weight i and, above it, i + 32.
void put_nibbles(const uint8_t *from, int64_t g, uint8_t *plane) {
    from += 64 * (g / 2);
    for (int i = 0; i < 32; i++) {
        int low = from[i], high = from[i + 32];
        plane[i] = uint8_t(g % 2 ? low >> 4 | (high & 240) : (low & 15) | high << 4);
    }
}

// Two bits of group g: four parts of 32 weights share bytes; as a plane, byte i has weights i, i + 16, i + 32, i + 48.
void put_twos(const uint8_t *from, int64_t g, uint8_t *plane) {
    from += 32 * (g / 2);
    for (int i = 0; i < 16; i++) {
        int a = from[i] >> 4 * (g % 2), b = from[i + 16] >> 4 * (g % 2);
        plane[i] = uint8_t((a & 3) | (b & 3) << 2 | (a & 12) << 2 | (b & 12) << 4);
    }
}

// One bit of group g: eight parts of 32 weights share bytes; as a plane, byte i has weights i, i + 8, i + 16, ...
void put_ones(const uint8_t *from, int64_t g, uint8_t *plane) {
    std::memset(plane, 0, 8);
    for (int i = 0; i < 32; i++) {
        int two = from[i] >> 2 * g & 3;
        plane[i % 8] |= uint8_t((two & 1) << i / 8 | (two >> 1) << (4 + i / 8));
    }
}

// A block's codes as those of grouped integers.
void put_codes(int64_t kind, const uint8_t *block, uint8_t *codes) {
    const Layout at = layout_of(kind);
    for (int64_t g = 0; g < K_GROUPS; g++, codes += 8 * bits_of_k(kind)) {
        uint8_t *plane = codes;
        if (kind == Q4_K || kind == Q5_K) std::memcpy(plane, block + at.nibbles + 32 * g, 32), plane += 32;
        if (kind == Q6_K) put_nibbles(block + at.nibbles, g, plane), plane += 32;
        if (kind == Q2_K || kind == Q3_K || kind == Q6_K) put_twos(block + at.twos, g, plane), plane += 16;
        if (kind == Q3_K || kind == Q5_K) put_ones(block + at.ones, g, plane);
    }
}

// The 16 numbers of 6 bits, group by group: scales of Q3_K, or two scales and two minima.
void six_bits(int64_t kind, const uint8_t *from, uint8_t *to) {
    for (int i = 0; i < 16 && kind == Q3_K; i++)
        to[i] = uint8_t((from[i % 8] >> 4 * (i / 8) & 15) | (from[8 + i % 4] >> 2 * (i / 4) & 3) << 4);
    for (int i = 0; i < 8 && kind != Q3_K; i++) {
        uint8_t *pair = to + 4 * (i / 2) + i % 2;
        pair[0] = i < 4 ? from[i] & 63 : (from[i + 4] & 15) | (from[i - 4] >> 6) << 4;
        pair[2] = i < 4 ? from[i + 4] & 63 : from[i + 4] >> 4 | (from[i] >> 6) << 4;
    }
}

// A block's words of metadata.
void put_words(int64_t kind, const uint8_t *block, uint16_t *words) {
    const Layout at = layout_of(kind);
    *words++ = at_any<uint16_t>(block + at.d);
    if (has_minima(kind)) *words++ = at_any<uint16_t>(block + at.m);
    if (has_byte_numbers(kind)) {
        std::memcpy(words, block + at.numbers, 16);
        return;
    }
    uint8_t number[16];
    six_bits(kind, block + at.numbers, number);
    words[4] = words[5] = 0;
    for (int g = 0; g < K_GROUPS; g++) {
        uint32_t all = 0;
        for (int i = 0; i < 4; i++) all |= uint32_t(number[4 * g + i]) << 6 * i;
        words[g] = uint16_t(all), words[4 + g / 2] |= uint16_t(all >> 16 << 8 * (g % 2));
    }
}

template <int64_t KIND>
void decode(const Matrix &m, int64_t row, float *out) {
    const int64_t blocks = meta_groups(m);
    std::vector<uint8_t> codes(code_bytes(m)), meta(meta_bytes(m));
    copy_row(m, row, codes.data(), meta.data());
    for (int64_t g = 0; g < groups_of(m.cols); g++, out += GROUP) {
        auto word = [&](int64_t n) { return int32_t(at_any<uint16_t>(&meta[2 * (n * blocks + g / K_GROUPS)])); };
        int32_t scale[4], least[4];
        k_numbers<KIND>(word, g % K_GROUPS, scale, least);
        const float d = from_half(uint16_t(word(0))), m = has_minima(KIND) ? from_half(uint16_t(word(1))) : 0;
        const uint8_t *plane = &codes[8 * bits_of_k(KIND) * g];
        for (int i = 0; i < GROUP; i++) {
            int32_t code = 0, part = i / (32 / parts_of_half(KIND)), at = 0;
            if (bits_of_k(KIND) >= 4) code = plane[i % 32] >> 4 * (i / 32) & 15, at = 32;
            if (bits_of_k(KIND) % 4 >= 2) code |= (plane[at + i % 16] >> 2 * (i / 16) & 3) << (at ? 4 : 0), at += 16;
            if (bits_of_k(KIND) % 2) code |= (plane[at + i % 8] >> i / 8 & 1) << (bits_of_k(KIND) - 1);
            out[i] = d * float(scale[part]) * float(code - zero_of_k(KIND));
            if (has_minima(KIND)) out[i] -= m * float(least[part]);
        }
    }
}

}  // namespace

void decode_k(const Matrix &m, int64_t row, float *out) {
    switch (m.kind) {
        case Q2_K: return decode<Q2_K>(m, row, out);
        case Q3_K: return decode<Q3_K>(m, row, out);
        case Q4_K: return decode<Q4_K>(m, row, out);
        case Q5_K: return decode<Q5_K>(m, row, out);
        case Q6_K: return decode<Q6_K>(m, row, out);
    }
}

void fill_k(const Matrix &m, int64_t first, int64_t number, const uint8_t *blocks, int64_t bytes) {
    const int64_t count = meta_groups(m), size = code_bytes(m), more = meta_bytes(m), words = words_of_k(m.kind);
    const int64_t step = layout_of(m.kind).bytes;
    uint8_t *to_codes = (uint8_t *)m.codes, *to_meta = (uint8_t *)m.meta;
    std::vector<uint8_t> codes(size), meta(more);
    uint16_t made[16];
    for (int64_t r = first; r < first + number; r++, blocks += bytes) {
        for (int64_t b = 0; b < count; b++) {
            put_codes(m.kind, blocks + step * b, &codes[size / count * b]);
            put_words(m.kind, blocks + step * b, made);
            for (int64_t n = 0; n < words; n++) std::memcpy(&meta[2 * (n * count + b)], made + n, 2);
        }
        if (r >= rows_in_slabs(m)) {
            std::memcpy(to_codes + r * size, codes.data(), size), std::memcpy(to_meta + r * more, meta.data(), more);
            continue;
        }
        int64_t base = r / SLAB * SLAB;
        put_row(r - base, count, size, more, codes.data(), meta.data(), to_codes + base * size, to_meta + base * more);
    }
}
