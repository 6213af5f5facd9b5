// Products with AMX: of bfloat16 matrices with bfloat16 tokens, and of grouped integers and a checkpoint's codes with
// many tokens. All else is as with AVX-512.
//
// A tile holds 16 rows of 64 bytes. Every output is one element of a tile of sums, which are added in the order
// of the inputs, so it does not depend on the other tokens or rows. Sums of integers are exact: results equal
// those of avx512.cpp bit for bit.
#include "../tiles.h"

#ifdef TILES
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../kinds.h"
#include "../matrix.h"
#include "../target.h"

TARGET_BEGIN("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

namespace tiled {

constexpr int64_t WIDTH = BLOCK;      // rows of a tile, tokens of a block
constexpr int64_t COPY = 4 * WIDTH;   // tokens above which rows are copied first, to be read with one step
constexpr int64_t STRIP = 2 * WIDTH;  // rows of the matrix whose products are computed together

struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Loads of tiles and of their configuration do not tell the compiler that they read memory, or how much of it.
inline void memory_is_read() { asm volatile("" ::: "memory"); }

// Configures tiles 0 to 3 for sums (two of rows by two of tokens), 4 and 5 for rows, 6 and 7 for tokens.
void configure(int64_t tokens, int64_t more) {
    static thread_local Configuration use;
    const int64_t wide[8] = {tokens, more, tokens, more, WIDTH, WIDTH, tokens, more};
    for (int i = 0; i < 8; i++) use.rows[i] = WIDTH, use.row_bytes[i] = uint16_t(4 * std::max<int64_t>(1, wide[i]));
    memory_is_read();
    _tile_loadconfig(&use);
}

// Configures tiles 0 to 3 for sums of all rows and tokens, 4 and 5 for tokens, 6 and 7 for rows, of half a group.
void configure_halves() {
    static thread_local Configuration use;
    for (int i = 0; i < 8; i++) use.rows[i] = i < 6 ? WIDTH : GROUP / 8, use.row_bytes[i] = 4 * WIDTH;
    use.row_bytes[4] = use.row_bytes[5] = GROUP / 2;
    memory_is_read();
    _tile_loadconfig(&use);
}

// 16 vectors of 16 words become those of their columns.
inline void transpose(__m512i *a) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int step = 1; step < 16; step *= 2) {
        __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
        __m512i even_from = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(16 - step));
        __m512i odd_from = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(step)), odd, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i & step) continue;
            __m512i x = a[i], y = a[i + step];
            a[i] = _mm512_permutex2var_epi32(x, even_from, y);
            a[i + step] = _mm512_permutex2var_epi32(x, odd_from, y);
        }
    }
}

// Tokens that a block of the panel has room for: the last block is no wider than it must be.
inline int64_t room(int64_t left) {
    if (left >= WIDTH) return WIDTH;
    int64_t size = 1;
    while (size < left) size *= 2;
    return size;
}

inline int64_t padded_cols(const Matrix &m) { return (m.cols + DEEP - 1) / DEEP * DEEP; }

// For each block, pairs of inputs: those of all its tokens, then the next pair.
void pack_pairs(const Matrix &m, const Input *x, int64_t tokens, uint8_t *packed) {
    uint32_t *to = (uint32_t *)packed;
    for (int64_t t = 0; t < tokens; t += WIDTH) {
        int64_t number = std::min(WIDTH, tokens - t), size = room(tokens - t);
        for (int64_t c = 0; c < padded_cols(m); c += DEEP, to += DEEP / 2 * size) {
            __mmask32 mask = m.cols - c >= DEEP ? 0xffffffff : (1u << (m.cols - c)) - 1;
            __m512i pairs[WIDTH] = {};
            for (int64_t i = 0; i < number; i++) pairs[i] = _mm512_maskz_loadu_epi16(mask, x[t + i].bfloat16 + c);
            if (size == 1) {
                _mm512_storeu_si512(to, pairs[0]);
                continue;
            }
            transpose(pairs);
            __mmask16 some = size == WIDTH ? 0xffff : (1u << size) - 1;
            for (int64_t i = 0; i < WIDTH; i++) _mm512_mask_storeu_epi32(to + i * size, some, pairs[i]);
        }
    }
}

// Sums of 16 rows with a block of tokens, to rows `row` to `row + number - 1` of the outputs.
inline void write_sums(const float *sums, int64_t size, int64_t tokens, int64_t row, int64_t number, float *const *y) {
    __mmask16 some = size == WIDTH ? 0xffff : (1u << size) - 1, rows = number == WIDTH ? 0xffff : (1u << number) - 1;
    __m512i a[WIDTH];
    for (int64_t i = 0; i < WIDTH; i++) a[i] = _mm512_maskz_loadu_epi32(some, sums + i * WIDTH);
    transpose(a);
    for (int64_t t = 0; t < tokens; t++) _mm512_mask_storeu_epi32(y[t] + row, rows, a[t]);
}

// A strip of rows: in place, or copied and padded with zeros.
struct Strip {
    const uint16_t *at;
    int64_t row_step, tile_step;  // elements from a row to the next, and from DEEP columns to the next
};

Strip strip_of(const Matrix &m, int64_t first, int64_t last, bool copy, std::vector<uint16_t> &room) {
    const uint16_t *from = (const uint16_t *)m.codes + first * m.cols;
    if (!copy && last - first == STRIP && m.cols % DEEP == 0) return {from, m.cols, DEEP};
    room.resize(STRIP * padded_cols(m));
    for (int64_t r = 0; r < STRIP; r++)
        for (int64_t c = 0; c < padded_cols(m); c += DEEP) {
            __mmask32 mask = first + r >= last ? 0 : m.cols - c >= DEEP ? 0xffffffff : (1u << (m.cols - c)) - 1;
            _mm512_storeu_si512(&room[STRIP * c + r * DEEP], _mm512_maskz_loadu_epi16(mask, from + r * m.cols + c));
        }
    return {room.data(), DEEP, STRIP * DEEP};
}

// A strip times one block of tokens, or two.
template <bool TWO>
void strip_products(const Strip &strip, int64_t cols, const uint8_t *packed, int64_t size, int64_t more, float (*sums)[256]) {
    int64_t step = 2 * strip.row_step, token = 4 * size, other = 4 * more;
    const uint8_t *second = packed + 2 * cols * size;
    memory_is_read();
    _tile_zero(0);
    _tile_zero(2);
    if (TWO) {
        _tile_zero(1);
        _tile_zero(3);
    }
    const uint16_t *a = strip.at;
    for (int64_t c = 0; c < cols; c += DEEP, a += strip.tile_step) {
        _tile_loadd(6, packed + 2 * c * size, token);
        _tile_loadd(4, a, step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + WIDTH * strip.row_step, step);
        _tile_dpbf16ps(2, 5, 6);
        if (!TWO) continue;
        _tile_loadd(7, second + 2 * c * more, other);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(2, sums[2], 64);
    if (TWO) {
        _tile_stored(1, sums[1], 64);
        _tile_stored(3, sums[3], 64);
    }
}

void native_dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    static thread_local std::vector<uint16_t> copied;
    alignas(64) float sums[4][256];
    int64_t cols = padded_cols(m), before = -1, before_more = -1;
    for (int64_t row = first; row < last; row += STRIP) {
        int64_t number = std::min(STRIP, last - row);
        Strip strip = strip_of(m, row, row + number, panel.tokens > COPY, copied);
        for (int64_t t = 0; t < panel.tokens; t += 2 * WIDTH) {
            int64_t left = panel.tokens - t, size = room(left), more = left > WIDTH ? room(left - WIDTH) : 0;
            if (size != before || more != before_more) configure(before = size, before_more = more);
            const uint8_t *packed = panel.packed + 2 * cols * t;
            if (more) strip_products<true>(strip, cols, packed, size, more, sums);
            else strip_products<false>(strip, cols, packed, size, more, sums);
            for (int64_t part = 0; part < 4; part++) {
                int64_t at = part / 2 * WIDTH, token = part % 2 * WIDTH;
                if (at < number && token < left)
                    write_sums(sums[part], part % 2 ? more : size, std::min(WIDTH, left - token), row + at,
                               std::min(WIDTH, number - at), y + t + token);
            }
        }
    }
    _tile_release();
}

typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint8_t VB __attribute__((vector_size(64)));

static inline VB table_values(VB codes) {
    const __m512i table = _mm512_broadcast_i32x4(at_any<__m128i>(E2M1_VALUES));
    return (VB)_mm512_shuffle_epi8(table, (__m512i)codes);
}

#include "codes.inc"

constexpr int64_t FEW = 6;  // tokens left over for which vectors are faster than a tile that is not full
constexpr int64_t GROUP_TILE = WIDTH * GROUP;

// Whether many tokens are multiplied in tiles. Codes of 8 bits less their zero points, where those are stored, have 9
// bits; k-quants with a scale for 16 inputs are as fast in vectors.
bool fits_tiles(const Matrix &m) {
    if (is_k_quant(m.kind)) return m.kind == Q4_K || m.kind == Q5_K;
    if (is_scaled(m.kind)) return codes_of(m.kind) != CODES_8 || !has_zeros(m.kind);
    return has_digits(m);
}

// Tokens that are multiplied in tiles.
int64_t in_tiles(const Matrix &m, int64_t tokens) {
    if (!fits_tiles(m)) return 0;
    return tokens % WIDTH < FEW ? tokens / WIDTH * WIDTH : tokens;
}

// For each block and group a tile of digits of 8 bits, a row per token.
void pack_bytes(const Matrix &m, const Input *x, int64_t tokens, uint8_t *packed) {
    for (int64_t t = 0; t < tokens; t += WIDTH)
        for (int64_t g = 0; g < groups_of(m.cols); g++)
            for (int64_t i = 0; i < WIDTH; i++, packed += GROUP) {
                if (t + i < tokens) std::memcpy(packed, x[t + i].digits + GROUP * g, GROUP);
                else std::memset(packed, 0, GROUP);
            }
}

// For each block and group a tile of high digits and one of low ones, a row per token.
void pack_digits(const Matrix &m, const Input *x, int64_t tokens, uint8_t *packed) {
    if (has_bytes(m)) return pack_bytes(m, x, tokens, packed);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t t = 0; t < tokens; t += WIDTH)
        for (int64_t g = 0; g < groups_of(m.cols); g++, packed += 2 * GROUP_TILE)
            for (int64_t i = 0; i < WIDTH; i++) {
                __m512i first = _mm512_setzero_si512(), second = first;
                if (t + i < tokens) {
                    const int8_t *from = x[t + i].digits + 2 * GROUP * g;
                    first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + GROUP);
                }
                _mm512_storeu_si512(packed + i * GROUP, _mm512_permutex2var_epi32(first, even, second));
                _mm512_storeu_si512(packed + GROUP_TILE + i * GROUP, _mm512_permutex2var_epi32(first, odd, second));
            }
}

// 16 rows times a block of tokens. Codes are a byte each: a tile per group.
template <int64_t KIND>
void block_products(const uint8_t *codes, const uint8_t *meta, int64_t groups, const Input *x, int64_t tokens,
                    const uint8_t *digits, float *const *y) {
    constexpr bool BYTES = takes_bytes(KIND);
    alignas(64) int32_t made[2][2][WIDTH * WIDTH];
    V sum[WIDTH] = {};
    memory_is_read();
    for (int64_t g = 0; g < groups; g++, codes += GROUP_TILE, digits += WIDTH * digit_bytes(BYTES)) {
        _tile_zero(0);
        _tile_loadd(6, codes, GROUP);
        _tile_loadd(4, digits, GROUP);
        _tile_dpbsud(0, 4, 6);
        int32_t *high = made[g % 2][0], *low = made[g % 2][1];
        _tile_stored(0, high, 64);
        if constexpr (!BYTES) {
            _tile_zero(1);
            _tile_loadd(5, digits + GROUP_TILE, GROUP);
            _tile_dpbsud(1, 5, 6);
            _tile_stored(1, low, 64);
        }
        V scale = (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)meta)), least;
        if constexpr (KIND == INT8) least = scale * -128.0f;
        else least = (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)meta + 1));
        meta += SLAB * (KIND == INT8 ? 2 : 4);
#pragma GCC unroll 16
        for (int64_t t = 0; t < WIDTH; t++) {
            const Input &token = x[t < tokens ? t : 0];
            VI word = at_any<VI>(high + t * WIDTH) << 7;
            if constexpr (!BYTES) word += at_any<VI>(low + t * WIDTH);
            __m512 both = (__m512)__builtin_convertvector(word, V);
            __m512 total = _mm512_fmadd_ps(both, (__m512)(scale * token.scale[g]), (__m512)sum[t]);
            sum[t] = (V)_mm512_fmadd_ps((__m512)least, _mm512_set1_ps(token.sum[g]), total);
        }
    }
    for (int64_t t = 0; t < tokens; t++) std::memcpy(y[t], &sum[t], sizeof(V));
}

// Call `products` with the codes of 16 rows, a byte each, which `unpack` returns, for each block of tokens.
template <typename Unpack, typename Products>
void each_block(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y, const Unpack &unpack,
                const Products &products) {
    static thread_local std::vector<uint8_t> padded, room;
    room.resize(groups_of(m.cols) * GROUP_TILE);
    for (int64_t row = first / SLAB * SLAB; row < last; row += SLAB) {
        SlabRows slab(m, row, padded);
        const uint8_t *codes = unpack(slab, room.data());
        int64_t begin = std::max(first, row), end = std::min(last, row + SLAB);
        for (int64_t t = 0; t < panel.tokens; t += WIDTH) {
            float made[WIDTH][SLAB], *to[WIDTH];
            int64_t number = std::min(WIDTH, panel.tokens - t);
            bool whole = end - begin == SLAB;
            for (int64_t i = 0; i < number; i++) to[i] = whole ? y[t + i] + row : made[i];
            Panel block = {panel.x + t, panel.packed + t * groups_of(m.cols) * digit_bytes(m), number};
            products(codes, slab.meta, block, to);
            for (int64_t i = 0; i < number && !whole; i++)
                std::memcpy(y[t + i] + begin, made[i] + begin - row, 4 * (end - begin));
        }
    }
}

template <int64_t KIND>
void grouped_dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    int64_t groups = groups_of(m.cols);
    configure(WIDTH, WIDTH);
    each_block(
        m, first, last, panel, y,
        [&](const SlabRows &slab, uint8_t *room) {
            if (KIND == INT8) return slab.codes;
            for (int64_t g = 0; g < groups; g++)
                for (int i = 0; i < 16; i++) {
                    VB code = four_codes<KIND>(slab.codes + g * SLAB * KIND * 8, i);
                    std::memcpy(room + g * GROUP_TILE + 64 * i, &code, sizeof code);
                }
            return (const uint8_t *)room;
        },
        [&](const uint8_t *codes, const uint8_t *meta, const Panel &block, float *const *to) {
            block_products<KIND>(codes, meta, groups, block.x, block.tokens, block.packed, to);
        });
    _tile_release();
}

#include "../scaled/amx.inc"

bool of_pairs(const Matrix &m, const Input *x) { return m.kind == BF16 && x->bfloat16; }

int64_t token_bytes(const Matrix &m, const Input *x) {
    return of_pairs(m, x) ? 2 * padded_cols(m) : AVX512.token_bytes(m, x);
}

void pack(const Matrix &m, const Input *x, int64_t tokens, uint8_t *packed) {
    if (of_pairs(m, x)) return pack_pairs(m, x, tokens, packed);
    if (!has_digits(m)) return AVX512.pack(m, x, tokens, packed);
    int64_t tiles = in_tiles(m, tokens);
    pack_digits(m, x, tiles, packed);
    if (tiles < tokens)
        AVX512.pack(m, x + tiles, tokens - tiles, packed + tiles * groups_of(m.cols) * digit_bytes(m));
}

void dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    if (of_pairs(m, panel.x)) return native_dot(m, first, last, panel, y);
    int64_t tiles = m.meta ? in_tiles(m, panel.tokens) : 0;
    Panel some = {panel.x, panel.packed, tiles};
    if (tiles) switch (m.kind) {
        case INT2: grouped_dot<INT2>(m, first, last, some, y); break;
        case INT3: grouped_dot<INT3>(m, first, last, some, y); break;
        case INT4: grouped_dot<INT4>(m, first, last, some, y); break;
        case INT5: grouped_dot<INT5>(m, first, last, some, y); break;
        case INT6: grouped_dot<INT6>(m, first, last, some, y); break;
        case INT8: grouped_dot<INT8>(m, first, last, some, y); break;
        default: any_scaled_dot(m, first, last, some, y);
    }
    if (tiles == panel.tokens) return;
    Panel rest = {panel.x + tiles, panel.packed + tiles * groups_of(m.cols) * digit_bytes(m), panel.tokens - tiles};
    AVX512.dot(m, first, last, rest, y + tiles);
}

}  // namespace tiled

TARGET_END

const Level &amx_level() {
    static const Level level = [] {
        Level made = AVX512;
        made.dot = tiled::dot, made.token_bytes = tiled::token_bytes, made.pack = tiled::pack;
        made.reads_bfloat16 = true;
        return made;
    }();
    return level;
}

#elif defined(__x86_64__)
const Level &amx_level() { return avx512_bf16_level(); }
#endif
