// C interface: consecutive decoder layers of a step in one call, as far as the experts that they choose are resident.
// Between two calls of a layer pass 100 microseconds and more in Python, whose memory the weights have evicted from the
// caches. Every operation is that of its own call, so results are the same.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "block.h"
#include "../matrix.h"
#include "../products.h"

extern "C" {
void moefit_experts(int64_t level, const Expert *experts, int64_t number, const int64_t *token_R, int64_t routed,
                    const void *x_TD, int64_t T, int64_t kind, float *h_RQ, int64_t Q, int64_t gated,
                    int64_t activation, float *y_RD);
void moefit_weighted_sum(const void *y_RD, int64_t y_kind, int64_t T, int64_t K, int64_t D, const void *weights_R,
                         int64_t weights_kind, int64_t kind, void *y_TD, float *energy_R);
void moefit_token(int64_t level, const Expert *const *experts, int64_t K, const void *x_D, int64_t kind,
                  const void *weights_K, int64_t weights_kind, int64_t gated, int64_t activation, void *y_D,
                  float *energy_K);

// `experts` has an address for each expert of the router; null: it is not resident.
struct DecoderLayer {
    const Block *block;
    const Router *router;
    const Expert *const *experts;
    int64_t gated, activation;
};

// Sizes and kinds that are the same in all layers.
struct LayerSizes {
    int64_t D, E, K, kind, logits_kind, weights_kind;
};

// What each layer makes, one layer after the other: outputs, logits, the choice, and each expert's sum over tokens of
// |input| * |weight|. `sum` and `normed` are of one layer, the last that was begun.
struct LayerResults {
    char *x_LTD, *logits_LTE, *weights_LTK;
    int64_t *ids_LTK;
    float *shares_LE;
    void *sum_TD, *normed_TD;
};
}

namespace {

int64_t bytes_of(int64_t kind) { return kind == F32 ? 4 : 2; }

bool all_resident(const DecoderLayer &layer, const int64_t *ids, int64_t number, int64_t E) {
    return std::all_of(ids, ids + number, [&](int64_t id) { return id >= 0 && id < E && layer.experts[id]; });
}

// The outputs of several tokens' experts, weighted and summed. Rows are grouped by expert, in ascending order.
void several_tokens(int64_t level, const DecoderLayer &layer, const LayerSizes &s, const void *x, int64_t tokens,
                    const int64_t *ids, const void *weights, void *y) {
    int64_t rows = tokens * s.K;
    std::vector<int64_t> first(s.E + 1), row_of(rows), token_of(rows);
    for (int64_t r = 0; r < rows; r++) first[ids[r] + 1]++;
    std::vector<Expert> chosen;
    for (int64_t e = 0; e < s.E; e++) {
        int64_t number = first[e + 1];
        first[e + 1] += first[e];
        if (!number) continue;
        chosen.push_back(*layer.experts[e]);
        chosen.back().first = first[e], chosen.back().rows = number;
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = first[ids[r]]++;
        row_of[r] = at, token_of[at] = r / s.K;
    }
    int64_t Q = groups_of(std::max(chosen[0].in.rows, chosen[0].down.cols)) * GROUP;
    std::unique_ptr<float[]> h_RQ(new float[rows * Q]), grouped_RD(new float[rows * s.D]), y_RD(new float[rows * s.D]);
    moefit_experts(level, chosen.data(), chosen.size(), token_of.data(), rows, x, tokens, s.kind, h_RQ.get(), Q,
                   layer.gated, layer.activation, grouped_RD.get());
    for (int64_t r = 0; r < rows; r++)
        std::memcpy(y_RD.get() + r * s.D, grouped_RD.get() + row_of[r] * s.D, 4 * s.D);
    moefit_weighted_sum(y_RD.get(), F32, tokens, s.K, s.D, weights, s.weights_kind, s.kind, y, nullptr);
}

void experts_of(int64_t level, const DecoderLayer &layer, const LayerSizes &s, const void *x, int64_t tokens,
                const int64_t *ids, const void *weights, void *y) {
    if (tokens > 1) return several_tokens(level, layer, s, x, tokens, ids, weights, y);
    std::vector<const Expert *> chosen(s.K);
    for (int64_t k = 0; k < s.K; k++) chosen[k] = layer.experts[ids[k]];
    moefit_token(level, chosen.data(), s.K, x, s.kind, weights, s.weights_kind, layer.gated, layer.activation, y, nullptr);
}

void add_shares(const Level &use, const LayerSizes &s, const char *x, int64_t tokens, const int64_t *ids,
                const void *weights, float *shares_E) {
    std::vector<float> values(s.D), weight(tokens * s.K);
    use.widen(weights, s.weights_kind, tokens * s.K, weight.data(), tokens * s.K);
    std::fill(shares_E, shares_E + s.E, 0.0f);
    for (int64_t t = 0; t < tokens; t++) {
        use.widen(x + t * s.D * bytes_of(s.kind), s.kind, s.D, values.data(), s.D);
        float squares[16] = {}, total = 0;
        for (int64_t d = 0; d + 16 <= s.D; d += 16)
            for (int64_t i = 0; i < 16; i++) squares[i] += values[d + i] * values[d + i];
        for (int64_t d = s.D / 16 * 16; d < s.D; d++) total += values[d] * values[d];
        for (float one : squares) total += one;
        for (int64_t k = t * s.K; k < (t + 1) * s.K; k++) shares_E[ids[k]] += std::sqrt(total) * std::fabs(weight[k]);
    }
}

}  // namespace

extern "C" {

// Compute layers one after the other; return how many are complete. The next one, if any, has chosen an expert that
// is not resident: its `sum`, `normed`, logits and choice are made, and its keys and values are written. segments: those
// of the first layer, then of the next.
int64_t moefit_layers(int64_t level, const DecoderLayer *layers, int64_t number, const LayerSizes *sizes,
                      const Segment *segments, int64_t requests, const void *x, int64_t tokens, const void *cos,
                      const void *sin, const LayerResults *results) {
    const LayerSizes &s = *sizes;
    const LayerResults &made = *results;
    int64_t size = tokens * s.D * bytes_of(s.kind);
    std::unique_ptr<char[]> y(new char[size]);
    for (int64_t l = 0; l < number; l++) {
        int64_t *ids = made.ids_LTK + l * tokens * s.K;
        char *logits = made.logits_LTE + l * tokens * s.E * bytes_of(s.logits_kind);
        char *weights = made.weights_LTK + l * tokens * s.K * bytes_of(s.weights_kind);
        Choice choice = {layers[l].router, logits, weights, ids};
        moefit_block(level, layers[l].block, segments + l * requests, requests, x, tokens, cos, sin, made.sum_TD,
                     made.normed_TD, &choice);
        if (!all_resident(layers[l], ids, tokens * s.K, s.E)) return l;
        experts_of(level, layers[l], s, made.normed_TD, tokens, ids, weights, y.get());
        add_shares(level_of(level), s, (const char *)made.normed_TD, tokens, ids, weights, made.shares_LE + l * s.E);
        x = made.x_LTD + l * size;
        add_values(made.sum_TD, y.get(), tokens * s.D, s.kind, made.x_LTD + l * size);
    }
    return number;
}
}
