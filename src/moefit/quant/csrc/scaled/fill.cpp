// C interface: filling a matrix of a checkpoint's codes, and decoding it.
#include "kinds.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../half.h"
#include "../matrix.h"

namespace {

// Codes as checkpoints have them, two in a byte, become a group's: byte i has weight i and, above it, weight i + 32.
void pack_nibbles(const uint8_t *pairs, uint8_t *codes) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) {
        low[i] = uint8_t((pairs[i] & 15) | pairs[i + 16] << 4);
        high[i] = uint8_t(pairs[i] >> 4 | (pairs[i + 16] & 240));
    }
    for (int i = 0; i < 16; i++) codes[2 * i] = low[i], codes[2 * i + 1] = high[i];
}

// A row's codes, of `bytes` bytes, in the order of a row that is not in a slab; padded with `padding`.
void put_codes(const uint8_t *from, int64_t bytes, int64_t groups, int64_t bits, uint8_t padding, uint8_t *codes) {
    int64_t size = 8 * bits;
    uint8_t last[GROUP];
    for (int64_t g = 0; g < groups; g++, from += size, codes += size, bytes -= size) {
        const uint8_t *group = from;
        if (bytes < size) {
            std::memset(last, padding, sizeof last);
            std::memcpy(last, from, std::max<int64_t>(bytes, 0));
            group = last;
        }
        if (bits == 8) std::memcpy(codes, group, size);
        else pack_nibbles(group, codes);
    }
}

float scale_of(int64_t kind, uint16_t value, int64_t half) {
    uint32_t word = uint32_t(value) << 16;
    if (scales_of(kind) == SCALES_F16) return from_half(value);
    if (scales_of(kind) == SCALES_E8M0) word = std::max(uint32_t(value >> 8 * half & 255) << 23, 1u << 22);
    float scale;
    std::memcpy(&scale, &word, 4);
    return scale;
}

}  // namespace

void decode_scaled(const Matrix &m, int64_t row, float *out) {
    int64_t groups = groups_of(m.cols), bits = bits_of(m.kind);
    std::vector<uint8_t> codes(code_bytes(m)), meta(meta_bytes(m));
    copy_row(m, row, codes.data(), meta.data());
    auto part = [&](int64_t number, int64_t g) { return at_any<uint16_t>(&meta[2 * (number * groups + g)]); };
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < GROUP; i++, out++) {
            int64_t half = i / 32, two = has_two(m.kind) ? half : 0, first = scales_of(m.kind) == SCALES_E8M0 ? 0 : two;
            int32_t zero = zero_of_codes(codes_of(m.kind));
            int32_t code = bits == 8 ? codes[g * GROUP + i] : codes[g * 32 + i % 32] >> 4 * half & 15;
            float scale = scale_of(m.kind, part(first, g), two);
            if (has_zeros(m.kind)) zero = part(scales_per_group(m.kind), g) >> 8 * half & 255;
            if (codes_of(m.kind) == CODES_E2M1) code = E2M1_VALUES[code], scale *= 0.5f;
            *out = scale * float(code - zero);
        }
}

extern "C" {

// Fill rows of a matrix in slabs.
//
// first, number: which rows. codes: theirs as checkpoints have them, with the first input in the lowest bits of the
// first byte, `bytes` bytes a row; `flip` is added to each byte without carry (128 makes signed codes unsigned).
// meta: theirs as in a matrix without slabs. Of k-quants, `codes` are the blocks of a file, and the others are not used.
void moefit_fill(const Matrix *m, int64_t first, int64_t number, const uint8_t *codes, int64_t bytes, int64_t flip,
                 const uint8_t *meta) {
    if (is_k_quant(m->kind)) return fill_k(*m, first, number, codes, bytes);
    int64_t groups = groups_of(m->cols), size = code_bytes(*m), more = meta_bytes(*m), bits = bits_of(m->kind);
    uint8_t *to_codes = (uint8_t *)m->codes, *to_meta = (uint8_t *)m->meta;
    std::vector<uint8_t> row(size), flipped(flip ? bytes : 0);
    for (int64_t r = first; r < first + number; r++, codes += bytes, meta += more) {
        const uint8_t *from = codes;
        for (int64_t i = 0; i < bytes && flip; i++) flipped[i] = uint8_t(codes[i] ^ flip), from = flipped.data();
        bool in_slab = r < rows_in_slabs(*m);
        put_codes(from, bytes, groups, bits, uint8_t(flip), in_slab ? row.data() : to_codes + r * size);
        if (!in_slab) {
            std::memcpy(to_meta + r * more, meta, more);
            continue;
        }
        int64_t base = r / SLAB * SLAB;
        put_row(r - base, groups, size, more, row.data(), meta, to_codes + base * size, to_meta + base * more);
    }
}
}
