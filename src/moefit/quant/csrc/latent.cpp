// C interface: latent attention (MLA) without expanding the keys and values of all cached tokens.
//
// A head's key is W_K latent, beside a rotated part that all heads share, and its value is W_V latent. So a query times
// W_K scores the latents themselves, and W_V is applied to their weighted sum: two products a query, instead of one for
// each cached token. Rows of W are decoded once for some tokens; all sums are float32 in an order that depends on nothing
// but the output.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "latent.h"
#include "pool.h"

namespace {

constexpr int64_t MOST = 64;    // tokens for which a row is decoded once
constexpr int64_t TOGETHER = 32;  // rows that are decoded before they are multiplied

// Call `f(head, first, number)` for each head and some tokens.
template <typename F>
void each_head(const LatentHeads &l, int64_t tokens, const F &f) {
    int64_t parts = (tokens + MOST - 1) / MOST;
    each(l.heads * parts, [&](int64_t item) {
        int64_t first = item % parts * MOST;
        f(item / parts, first, std::min(MOST, tokens - first));
    });
}

// Call `f(row, number, weights)` for some rows after the other, decoded to [number, latent].
template <typename F>
void each_rows(const Level &level, const LatentHeads &l, int64_t begin, int64_t rows, const F &f) {
    int64_t padded = groups_of(l.latent) * GROUP;
    static thread_local std::vector<float> weights;
    weights.resize((TOGETHER - 1) * l.latent + padded);
    for (int64_t row = 0; row < rows; row += TOGETHER) {
        int64_t number = std::min(TOGETHER, rows - row);
        // A row's padding lies where the next one follows.
        for (int64_t r = 0; r < number; r++) level.decode(l.matrix, begin + row + r, &weights[r * l.latent]);
        f(row, number, weights.data());
    }
}

}  // namespace

extern "C" {

// y[t][h] = query[t][h]'s first elements times the head's rows of W_K, then its last, rotated elements. query:
// [tokens, heads, keys + rotated], consecutive, of a kind; y: [tokens, heads, latent + rotated].
void moefit_latent_queries(int64_t level, const LatentHeads *heads, const void *query, int64_t kind, int64_t tokens, float *y) {
    const Level &use = level_of(level);
    const LatentHeads &l = *heads;
    int64_t width = l.keys + l.rotated, out = l.latent + l.rotated;
    each_head(l, tokens, [&](int64_t head, int64_t first, int64_t number) {
        std::vector<float> given(number * width);
        float *to = y + (first * l.heads + head) * out;
        for (int64_t t = 0; t < number; t++) {
            int64_t at = (first + t) * l.heads + head;
            use.widen((const char *)query + at * width * bytes_of(kind), kind, width, &given[t * width], width);
            std::fill_n(y + at * out, l.latent, 0.0f);
            std::copy_n(&given[t * width + l.keys], l.rotated, y + at * out + l.latent);
        }
        each_rows(use, l, head * (l.keys + l.values), l.keys, [&](int64_t row, int64_t rows, const float *weights) {
            use.add_rows({weights, rows, l.latent, &given[row], width, to, l.heads * out, number});
        });
    });
}

// y[t][h] = the head's rows of W_V times x[t][h]. x: [tokens, heads, latent], float32; y: [tokens, heads, values],
// of a kind.
void moefit_latent_values(int64_t level, const LatentHeads *heads, const float *x, int64_t kind, int64_t tokens, void *y) {
    const Level &use = level_of(level);
    const LatentHeads &l = *heads;
    each_head(l, tokens, [&](int64_t head, int64_t first, int64_t number) {
        std::vector<float> made(number * l.values);
        const float *from = x + (first * l.heads + head) * l.latent;
        int64_t begin = head * (l.keys + l.values) + l.keys;
        each_rows(use, l, begin, l.values, [&](int64_t row, int64_t rows, const float *weights) {
            use.dot_rows({weights, rows, l.latent, from, l.heads * l.latent, &made[row], l.values, number});
        });
        for (int64_t t = 0; t < number; t++) {
            int64_t at = ((first + t) * l.heads + head) * l.values;
            use.narrow(&made[t * l.values], kind, l.values, (char *)y + at * bytes_of(kind));
        }
    });
}
}
