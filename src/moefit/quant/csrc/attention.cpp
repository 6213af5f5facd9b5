// C interface: attention of all queries of a batch.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "matrix.h"
#include "pool.h"
#include "levels/rounding.h"

namespace {

// A tile: some queries of one request that share a KV head.
struct Tile {
    const Segment *segment;
    int64_t group, first, tokens;  // query tokens first to first + tokens - 1 of the segment

    // The range of keys that any of the queries attends to.
    int64_t begin(const Attention &a) const {
        return a.window ? std::max<int64_t>(0, segment->past + first + 1 - a.window) : 0;
    }
    int64_t end() const { return segment->past + first + tokens; }
    int64_t spans(const Attention &a) const { return (end() - 1) / SPAN - begin(a) / SPAN + 1; }

    CacheHead cache(const Attention &a) const {
        int64_t size = bytes_of(a.cache);
        return {(const char *)segment->keys + group * a.key_group * size,
                (const char *)segment->values + group * a.value_group * size,
                segment->key_scales ? segment->key_scales + group * a.key_scale_group : nullptr,
                segment->value_scales ? segment->value_scales + group * a.value_scale_group : nullptr,
                segment->more};
    }
};

// A tile's queries and their running softmax over keys.
class Work {
public:
    Work(const Attention &a) : query_(ROWS * a.width), value_(ROWS * a.value_width), joined_(ROWS * a.value_width) {
        rows_.query = query_.data();
        span_.value = value_.data();
        all_.value = joined_.data();
    }

    void begin(const Level &level, const Attention &a, const Tile &tile, const void *query) {
        int64_t size = bytes_of(a.kind), share = a.heads / a.groups;
        rows_.number = tile.tokens * share;
        for (int64_t r = 0; r < rows_.number; r++) {
            int64_t token = tile.first + r / share, head = tile.group * share + r % share;
            int64_t at = (tile.segment->row + token) * a.query_token + head * a.query_head;
            level.widen((const char *)query + at * size, a.kind, a.width, &query_[r * a.width], a.width);
            rows_.position[r] = tile.segment->past + token, rows_.head[r] = head;
            all_.largest[r] = a.sinks ? a.sinks[head] : -INFINITY;
            all_.sum[r] = a.sinks ? 1 : 0;
        }
        std::fill(joined_.begin(), joined_.end(), 0.0f);
    }

    // Process the tile's keys in one span.
    const Seen &see(const Level &level, const Attention &a, const Tile &tile, int64_t span) {
        int64_t first = std::max(span * SPAN, tile.begin(a) / PART * PART), last = std::min((span + 1) * SPAN, tile.end());
        std::fill(value_.begin(), value_.end(), 0.0f);
        std::fill(span_.largest, span_.largest + ROWS, -INFINITY);
        std::fill(span_.sum, span_.sum + ROWS, 0.0f);
        level.attend(a, tile.cache(a), first, last, rows_, span_);
        return span_;
    }

    // Merge the running softmax of a span into that of the preceding spans.
    void join(const Attention &a, const float *largest, const float *sum, const float *value) {
        for (int64_t r = 0; r < rows_.number; r++) {
            if (largest[r] == -INFINITY) continue;
            float top = std::max(all_.largest[r], largest[r]);
            float before = std::exp(all_.largest[r] - top), now = std::exp(largest[r] - top);
            all_.largest[r] = top, all_.sum[r] = all_.sum[r] * before + sum[r] * now;
            float *to = all_.value + r * a.value_width;
            const float *from = value + r * a.value_width;
            for (int64_t c = 0; c < a.value_width; c++) to[c] = to[c] * before + from[c] * now;
        }
    }

    // Write the result to the rows of out, [tokens, heads, value_width].
    void finish(const Level &level, const Attention &a, const Tile &tile, void *out) {
        int64_t share = a.heads / a.groups;
        for (int64_t r = 0; r < rows_.number; r++) {
            float *value = all_.value + r * a.value_width, inverse = 1 / all_.sum[r];
            for (int64_t c = 0; c < a.value_width; c++) value[c] *= inverse;
            int64_t at = ((tile.segment->row + tile.first + r / share) * a.heads + rows_.head[r]) * a.value_width;
            level.narrow(value, a.kind, a.value_width, (char *)out + at * bytes_of(a.kind));
        }
    }

    int64_t rows() const { return rows_.number; }

private:
    std::vector<float> query_, value_, joined_;
    QueryRows rows_;
    Seen span_, all_;
};

std::vector<Tile> tiles_of(const Attention &a, const Segment *segments, int64_t number) {
    int64_t tokens = std::max<int64_t>(1, ROWS / (a.heads / a.groups));
    std::vector<Tile> tiles;
    for (const Segment *one = segments; one < segments + number; one++)
        for (int64_t first = 0; first < one->fresh; first += tokens)
            for (int64_t group = 0; group < a.groups; group++)
                tiles.push_back({one, group, first, std::min(tokens, one->fresh - first)});
    return tiles;
}

// One thread per tile.
void by_tiles(const Level &level, const Attention &a, const std::vector<Tile> &tiles, const void *query, void *out) {
    each(tiles.size(), [&](int64_t i) {
        Work work(a);
        const Tile &tile = tiles[i];
        work.begin(level, a, tile, query);
        for (int64_t span = tile.begin(a) / SPAN, n = tile.spans(a); n > 0; n--, span++) {
            const Seen &seen = work.see(level, a, tile, span);
            work.join(a, seen.largest, seen.sum, seen.value);
        }
        work.finish(level, a, tile, out);
    });
}

// One thread per span of a tile, if there are few tiles.
void by_spans(const Level &level, const Attention &a, const std::vector<Tile> &tiles, const void *query, void *out) {
    struct Item {
        const Tile *tile;
        int64_t span;
    };
    std::vector<Item> items;
    for (const Tile &tile : tiles)
        for (int64_t n = 0; n < tile.spans(a); n++) items.push_back({&tile, tile.begin(a) / SPAN + n});
    int64_t width = a.value_width + 2;
    std::vector<float> partial(items.size() * ROWS * width);
    each(items.size(), [&](int64_t i) {
        Work work(a);
        work.begin(level, a, *items[i].tile, query);
        const Seen &seen = work.see(level, a, *items[i].tile, items[i].span);
        float *to = &partial[i * ROWS * width];
        std::memcpy(to, seen.largest, sizeof seen.largest);
        std::memcpy(to + ROWS, seen.sum, sizeof seen.sum);
        std::memcpy(to + 2 * ROWS, seen.value, 4 * work.rows() * a.value_width);
    });
    Work work(a);
    size_t i = 0;
    for (const Tile &tile : tiles) {
        work.begin(level, a, tile, query);
        for (; i < items.size() && items[i].tile == &tile; i++) {
            const float *from = &partial[i * ROWS * width];
            work.join(a, from, from + ROWS, from + 2 * ROWS);
        }
        work.finish(level, a, tile, out);
    }
}

constexpr size_t FEW = 8;  // tiles; with more, all threads are busy

}  // namespace

extern "C" {

// query: rows of tokens and heads, strides in `a`; out: [tokens, heads, value_width].
void moefit_attention(int64_t level, const Attention *a, const Segment *segments, int64_t number, const void *query,
                      void *out) {
    const Level &use = level_of(level);
    std::vector<Tile> tiles = tiles_of(*a, segments, number);
    if (tiles.size() < FEW) by_spans(use, *a, tiles, query, out);
    else by_tiles(use, *a, tiles, query, out);
}

// Keys or values of new tokens, and where in an INT8 cache they belong. Strides are in elements.
struct CacheRows {
    const void *rows;  // [heads, tokens, width]
    int64_t heads, tokens, width, kind, row_head, row_token;
    const int64_t *places;  // of each token in the cache
    int8_t *codes;
    int64_t code_head, code_token;
    float *scales;
    int64_t scale_head;
};

void moefit_write_rows(int64_t level, const CacheRows *r) {
    const Level &use = level_of(level);
    int64_t size = bytes_of(r->kind);
    int64_t rows = r->heads * r->tokens, at_once = 64;
    each((rows + at_once - 1) / at_once, [&](int64_t part) {
        for (int64_t row = part * at_once; row < std::min(rows, (part + 1) * at_once); row++) {
            int64_t head = row / r->tokens, token = row % r->tokens, place = r->places[token];
            const char *from = (const char *)r->rows + (head * r->row_head + token * r->row_token) * size;
            int8_t *codes = r->codes + head * r->code_head + place * r->code_token;
            r->scales[head * r->scale_head + place] = use.quantize(from, r->kind, r->width, codes);
        }
    });
}
}
