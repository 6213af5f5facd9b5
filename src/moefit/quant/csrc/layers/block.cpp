// C interface: the attention block of a decoder layer, from its input to that of its feed-forward block, and the
// router that reads it, in one call. A token that decodes takes some ten operations here of 10 to 100 microseconds each, and as much time
// between them if each is called by itself. Every operation is that of its own call, so results are the same.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "../attention.h"
#include "block.h"
#include "../matrix.h"
#include "../products.h"

extern "C" {
void moefit_norm(int64_t level, const Norm *n, const void *x, int64_t rows, void *y);
void moefit_attention(int64_t level, const Attention *a, const Segment *segments, int64_t number, const void *query,
                      void *out);

void moefit_router(int64_t level, const Router *router, const void *x, int64_t kind, int64_t tokens, void *logits_TE,
                   void *weights_TK, int64_t *ids_TK);
}

namespace {

// Consecutive results of one call.
class Scratch {
public:
    explicit Scratch(int64_t bytes) : memory_((char *)std::aligned_alloc(64, (bytes + 64 * COUNT) / 64 * 64), &std::free) {}

    char *take(int64_t bytes) {
        char *mine = memory_.get() + used_;
        used_ += (bytes + 63) / 64 * 64;
        return mine;
    }

    static constexpr int64_t COUNT = 8;  // results at most

private:
    std::unique_ptr<char, decltype(&std::free)> memory_;
    int64_t used_ = 0;
};

// Heads of one token, rotated.
void rotate(const Level &use, const Block &b, const char *cos, const char *sin, const char *x, int64_t heads, char *y,
            int64_t y_head) {
    int64_t width = b.attention.width, size = bytes_of(b.rotary.kind);
    for (int64_t h = 0; h < heads; h++, x += width * size, y += y_head) {
        use.rotate(b.rotary, cos, sin, x, y);
        std::memcpy(y + b.rotary.width * size, x + b.rotary.width * size, (width - b.rotary.width) * size);
    }
}

// Put the heads of one token's keys or values into an INT8 cache.
void quantize(const Level &use, int64_t kind, const char *x, int64_t heads, int64_t width, int8_t *codes,
              int64_t head_codes, float *scales, int64_t head_scales) {
    for (int64_t h = 0; h < heads; h++)
        scales[h * head_scales] = use.quantize(x + h * width * bytes_of(kind), kind, width, codes + h * head_codes);
}

// Put one token's keys, rotated, and values into their place of the cache. `room` has room for the keys.
void write(const Level &use, const Block &b, const Segment &to, int64_t place, const char *cos, const char *sin,
           const char *keys, const char *values, char *room) {
    const Attention &a = b.attention;
    int64_t kind = b.before.kind, size = bytes_of(kind);
    if (a.cache == INT8) {
        rotate(use, b, cos, sin, keys, a.groups, room, a.width * size);
        quantize(use, kind, room, a.groups, a.width, (int8_t *)to.keys + place * a.key_token, a.key_group,
                 (float *)to.key_scales + place, a.key_scale_group);
        quantize(use, kind, values, a.groups, a.value_width, (int8_t *)to.values + place * a.value_token, a.value_group,
                 (float *)to.value_scales + place, a.value_scale_group);
        return;
    }
    rotate(use, b, cos, sin, keys, a.groups, (char *)to.keys + place * a.key_token * size, a.key_group * size);
    for (int64_t g = 0; g < a.groups; g++)
        std::memcpy((char *)to.values + (place * a.value_token + g * a.value_group) * size,
                    values + g * a.value_width * size, a.value_width * size);
}

// What the output layer reads, where heads attend to their keys and values.
void attend_heads(int64_t level, const Block &b, const BlockInputs &in, char *attended) {
    const Level &use = level_of(level);
    const Attention &a = b.attention;
    int64_t kind = b.before.kind, size = bytes_of(kind), tokens = in.tokens;
    int64_t Q = a.heads * a.width, K = a.groups * a.width, V = a.groups * a.value_width;
    Scratch scratch(tokens * size * (2 * Q + K + V) + K * size);
    char *q = scratch.take(tokens * Q * size), *k = scratch.take(tokens * K * size), *v = scratch.take(tokens * V * size);
    char *rotated = scratch.take(tokens * Q * size), *key = scratch.take(K * size);

    Product products[3] = {{&b.query.matrix, b.query.bias, q}, {&b.key.matrix, b.key.bias, k}, {&b.value.matrix, b.value.bias, v}};
    multiply(use, products, 3, in.normed, tokens, kind);
    if (b.of_queries.width) moefit_norm(level, &b.of_queries, q, tokens * Q / b.of_queries.width, q);
    if (b.of_keys.width) moefit_norm(level, &b.of_keys, k, tokens * K / b.of_keys.width, k);

    for (const Segment *one = in.segments; one < in.segments + in.number; one++)
        for (int64_t i = 0; i < one->fresh; i++) {
            int64_t token = one->row + i, angle = token * b.angles * angle_bytes(b.rotary);
            const char *c = in.cos + angle, *s = in.sin + angle;
            rotate(use, b, c, s, q + token * Q * size, a.heads, rotated + token * Q * size, a.width * size);
            write(use, b, *one, one->past + i, c, s, k + token * K * size, v + token * V * size, key);
        }
    moefit_attention(level, &a, in.segments, in.number, rotated, attended);
}

}  // namespace

void add_values(const Level &use, const void *a, const void *b, int64_t number, int64_t kind, void *sum) {
    constexpr int64_t PART = 1024;  // elements that stay in the nearest cache
    float one[PART], other[PART];
    for (int64_t first = 0; first < number; first += PART) {
        int64_t width = std::min(PART, number - first), at = first * bytes_of(kind);
        use.widen((const char *)a + at, kind, width, one, width);
        use.widen((const char *)b + at, kind, width, other, width);
        for (int64_t i = 0; i < width; i++) one[i] += other[i];
        use.narrow(one, kind, width, (char *)sum + at);
    }
}

extern "C" {

// x, sum and normed: [tokens, width], of one kind. sum = x + attention of norm(x), and normed = norm of the
// sum. Segments describe the caches, which get the keys and values of these tokens. cos and sin: [tokens, ...].
// choice: null, or the router that reads `normed`.
void moefit_block(int64_t level, const Block *block, const Segment *segments, int64_t number, const void *x,
                  int64_t tokens, const void *cos, const void *sin, void *sum, void *normed, const Choice *choice) {
    const Block &b = *block;
    int64_t kind = b.before.kind, size = bytes_of(kind), D = b.before.width, O = b.output.matrix.cols;
    Scratch scratch(tokens * size * (D + O));
    char *n = scratch.take(tokens * D * size), *attended = scratch.take(tokens * O * size);
    moefit_norm(level, &b.before, x, tokens, n);
    BlockInputs inputs = {segments, number, tokens, n, (const char *)cos, (const char *)sin};
    if (b.latents) attend_latents(level, b, inputs, attended);
    else attend_heads(level, b, inputs, attended);
    Product output = {&b.output.matrix, b.output.bias, n};
    multiply(level_of(level), &output, 1, attended, tokens, kind);
    add_values(level_of(level), x, n, tokens * D, kind, sum);
    moefit_norm(level, &b.after, sum, tokens, normed);
    if (choice)
        moefit_router(level, choice->router, normed, kind, tokens, choice->logits_TE, choice->weights_TK, choice->ids_TK);
}
}
