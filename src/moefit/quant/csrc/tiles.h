// Products with AMX tiles of numbers split into two bfloat16, high and low, with 16 bits of precision together,
// which equals float32 for long sums. The product of two low parts is omitted because it is smaller.
#pragma once
#include <cstdint>

#include "matrix.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define TILES  // the compiler knows them
#endif
#endif

constexpr int64_t LANES = 128;  // rows of a matrix that are processed together: a panel is loaded once for all of them
constexpr int64_t DEEP = 32;    // columns that one product of tiles sums over
constexpr int64_t WIDE = 32;    // lanes, and columns of a panel, whose products are summed at once
constexpr int64_t TILE = 256;   // words: 16 rows of 16

// Whether processor, system and compiler support tiles; requests them for this process.
bool tiles_here();

// Configure and release the tiles of this thread.
void tiles_begin();
void tiles_end();

// Both factors are stored in the order in which they are read: for each WIDE of their m or lanes, for each DEEP k, two
// tiles of high parts and two of low ones. Words hold the bfloat16 of an even k below that of the next.
inline int64_t place_of_pair(int64_t padded, int64_t pair, int64_t lane) {
    int64_t square = lane / WIDE * (padded / DEEP) + pair / 16;
    return square * 4 * TILE + lane % WIDE / 16 * TILE + pair % 16 * 16 + lane % 16;
}
constexpr int64_t LOW = 2 * TILE;  // words from a high part to its low one

// A panel [number, 64], of consecutive columns k; `split` has as many words.
void split_panel(const float *panel, int64_t number, uint32_t *split);

// out[m][lane] += sum over the first `number` k of panel[k][m] * x[k][lane], of `padded` k that x has.
void add_tiles(const uint32_t *split, const uint32_t *x, int64_t padded, int64_t number, float *out);
