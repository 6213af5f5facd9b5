// Latent attention (latent.cpp) of a layer's attention block, from the norm of its input to what its output layer reads.
//
// A segment's keys are its latents and its values the rotated parts of keys; attention reads both as keys, and latents as
// values. Every operation is that of its own call, so results are the same.
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "block.h"

extern "C" {
void moefit_norm(int64_t level, const Norm *n, const void *x, int64_t rows, void *y);
void moefit_attention(int64_t level, const Attention *a, const Segment *segments, int64_t number, const void *query,
                      void *out);
}

namespace {

// Queries [tokens, heads, keys + rotated], and latents beside rotated parts of keys [tokens, latent + rotated].
void project(int64_t level, const Block &b, const BlockInputs &in, char *queries, char *keys) {
    const Level &use = level_of(level);
    const Linear &first = b.latents->query_in;
    int64_t kind = b.before.kind, width = first.matrix.rows;
    std::unique_ptr<char[]> inner(new char[in.tokens * width * bytes_of(kind)]);
    Product key = {&b.key.matrix, b.key.bias, keys}, query = {&b.query.matrix, b.query.bias, queries};
    Product both[2] = {key, width ? Product{&first.matrix, first.bias, inner.get()} : query};
    multiply(use, both, 2, in.normed, in.tokens, kind);
    if (!width) return;
    moefit_norm(level, &b.of_queries, inner.get(), in.tokens, inner.get());
    multiply(use, &query, 1, inner.get(), in.tokens, kind);
}

// Rotate the last elements of one token's queries in place.
void rotate_queries(const Level &use, const Block &b, const char *cos, const char *sin, char *queries) {
    const LatentHeads &l = b.latents->heads;
    int64_t size = bytes_of(b.before.kind), width = (l.keys + l.rotated) * size;
    std::vector<char> made(l.rotated * size);
    for (int64_t h = 0; h < l.heads; h++) {
        char *part = queries + h * width + l.keys * size;
        use.rotate(b.rotary, cos, sin, part, made.data());
        std::memcpy(part, made.data(), made.size());
    }
}

// Rotate the queries of all tokens, and put the norm of latents and the rotated parts of keys into their caches.
void place(const Block &b, const Level &use, const BlockInputs &in, char *queries, const char *keys) {
    const LatentHeads &l = b.latents->heads;
    const Attention &a = b.attention;
    int64_t size = bytes_of(b.before.kind), made = (l.latent + l.rotated) * size;
    for (const Segment *one = in.segments; one < in.segments + in.number; one++)
        for (int64_t i = 0; i < one->fresh; i++) {
            int64_t token = one->row + i, at = one->past + i, angle = token * b.angles * angle_bytes(b.rotary);
            const char *c = in.cos + angle, *s = in.sin + angle, *key = keys + token * made;
            rotate_queries(use, b, c, s, queries + token * l.heads * (l.keys + l.rotated) * size);
            use.norm(b.of_keys, key, (char *)one->keys + at * a.key_token * size);
            use.rotate(b.rotary, c, s, key + l.latent * size, (char *)one->values + at * a.more_token * size);
        }
}

}  // namespace

void attend_latents(int64_t level, const Block &b, const BlockInputs &in, char *attended) {
    const LatentHeads &l = b.latents->heads;
    int64_t kind = b.before.kind, size = bytes_of(kind), rows = in.tokens * l.heads, wide = l.latent + l.rotated;
    std::unique_ptr<char[]> queries(new char[rows * (l.keys + l.rotated) * size]), keys(new char[in.tokens * wide * size]);
    std::unique_ptr<float[]> widened(new float[rows * wide]), summed(new float[rows * l.latent]);
    project(level, b, in, queries.get(), keys.get());
    place(b, level_of(level), in, queries.get(), keys.get());
    std::vector<Segment> segments(in.segments, in.segments + in.number);
    for (Segment &one : segments) one.more = one.values, one.values = one.keys;
    moefit_latent_queries(level, &l, queries.get(), kind, in.tokens, widened.get());
    moefit_attention(level, &b.attention, segments.data(), in.number, widened.get(), summed.get());
    moefit_latent_values(level, &l, summed.get(), kind, in.tokens, attended);
}
