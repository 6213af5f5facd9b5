// Products by the processor's tiles (AMX), of numbers that are two bfloat16 each, high and low: 16 bits of them,
// as good as float32 where sums are long. The product of two low parts is left out, being smaller than that.
#pragma once
#include <cstdint>

#include "matrix.h"

constexpr int64_t LANES = 128;  // rows of a matrix that go side by side: a panel is fetched once for all of them
constexpr int64_t DEEP = 32;    // columns that one product of tiles sums over
constexpr int64_t WIDE = 32;    // lanes, and columns of a panel, whose products are summed at once
constexpr int64_t TILE = 256;   // words: 16 rows of 16

// Whether processor, system and compiler have them; asks the system for them, for this process.
bool tiles_here();

// This thread's tiles are ours, from the one to the other.
void tiles_begin();
void tiles_end();

// Both factors lie in the order in which they are read: for each WIDE of their m or lanes, for each DEEP k, two
// tiles of high parts and two of low ones. Words hold the bfloat16 of an even k below that of the next.
inline int64_t place_of_pair(int64_t padded, int64_t pair, int64_t lane) {
    int64_t square = lane / WIDE * (padded / DEEP) + pair / 16;
    return square * 4 * TILE + lane % WIDE / 16 * TILE + pair % 16 * 16 + lane % 16;
}
constexpr int64_t LOW = 2 * TILE;  // words from a high part to its low one

// A panel [number, 64], of columns k behind each other; `split` takes as many words.
void split_panel(const float *panel, int64_t number, uint32_t *split);

// out[m][lane] += sum over the first `number` k of panel[k][m] * x[k][lane], of `padded` k that x has.
void add_tiles(const uint32_t *split, const uint32_t *x, int64_t padded, int64_t number, float *out);
