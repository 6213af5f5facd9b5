// Codes that a checkpoint stores, with its own scales: a weight is scale * (value of code - zero).
//
// Codes of 4 bits lie as those of INT4, of 8 bits as those of INT8. A group of 64 has one value of 2 bytes for each
// scale, or for two scales that are powers of two (E8M0, a byte each), and one for two zero points, a byte each, if
// they are stored. With two scales or zero points, the first is that of the first 32 weights.
#pragma once
#include <cstdint>

enum Codes : int64_t { CODES_E2M1, CODES_4, CODES_8 };
enum Scales : int64_t { SCALES_E8M0, SCALES_F16, SCALES_BF16 };

// As in quant/scaled/matrix.py: 64 + codes + 4 * scales + 16 * (whether a group has two scales) + 32 * (whether it has zeros).
constexpr bool is_scaled(int64_t kind) { return kind & 64; }
constexpr int64_t codes_of(int64_t kind) { return kind & 3; }
constexpr int64_t scales_of(int64_t kind) { return kind >> 2 & 3; }
constexpr int64_t has_two(int64_t kind) { return kind >> 4 & 1; }
constexpr int64_t has_zeros(int64_t kind) { return kind >> 5 & 1; }

constexpr int64_t bits_of_codes(int64_t kind) { return codes_of(kind) == CODES_8 ? 8 : 4; }
constexpr int64_t scales_per_group(int64_t kind) { return scales_of(kind) == SCALES_E8M0 ? 1 : 1 + has_two(kind); }
constexpr int64_t parts_of_scales(int64_t kind) { return scales_per_group(kind) + has_zeros(kind); }

// The zero point where none is stored. E2M1 has values of half steps: twice the value, plus 12, is a byte.
constexpr int32_t E2M1_ZERO = 12;
constexpr int32_t zero_of_codes(int64_t codes) { return codes == CODES_E2M1 ? E2M1_ZERO : codes == CODES_4 ? 8 : 128; }
constexpr uint8_t E2M1_VALUES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Matrix;

// One row's weights as float, padding included.
void decode_scaled(const Matrix &, int64_t row, float *out);
