// C interface: consecutive decoder layers of a step in one call. Where a router chooses experts that are not resident,
// the call ends; the caller loads them while another call computes the others, and continues with a third one.
// Between two calls of a layer pass 100 microseconds and more in Python, whose memory the weights have evicted from the
// caches. Every operation is that of its own call, so results are the same.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "block.h"
#include "shared.h"
#include "../matrix.h"
#include "../products.h"

extern "C" {
void moefit_experts(int64_t level, const Expert *experts, int64_t number, const int64_t *token_R, int64_t routed,
                    const void *x_TD, int64_t T, int64_t kind, float *h_RQ, int64_t Q, int64_t gated,
                    int64_t activation, float *y_RD);
void moefit_weighted_sum(int64_t level, const void *y_RD, int64_t y_kind, int64_t T, int64_t K, int64_t D, const void *weights_R,
                         int64_t weights_kind, int64_t kind, void *y_TD, float *energy_R);
void moefit_token(int64_t level, const Expert *const *experts, int64_t K, const void *x_D, int64_t kind,
                  const void *weights_K, int64_t weights_kind, int64_t gated, int64_t activation, void *y_D,
                  float *energy_K);
void moefit_add_shared(int64_t level, const SharedExpert *shared, const void *x, int64_t tokens, int64_t kind, void *y);

// `experts` has an address for each expert of the router; null: it is not resident. `shared`: null, or an expert whose
// output is added to theirs. Without a router, `shared` is the whole feed-forward block.
struct DecoderLayer {
    const Block *block;
    const Router *router;
    const Expert *const *experts;
    const SharedExpert *shared;
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

// Part of the experts' outputs of one layer, unweighted: those of the experts that are marked in done_E. shared_TD is
// the output of its shared expert if has_shared is not 0.
struct SomeRows {
    char *done_E;
    float *y_RD;
    void *shared_TD;
    int64_t *has_shared;
};
}

namespace {

bool all_resident(const DecoderLayer &layer, const int64_t *ids, int64_t number, int64_t E) {
    return std::all_of(ids, ids + number, [&](int64_t id) { return id >= 0 && id < E && layer.experts[id]; });
}

// Write the outputs of the chosen experts that are in `of`, unweighted, into their rows of y_RD.
void write_rows(int64_t level, const DecoderLayer &layer, const LayerSizes &s, const void *x, int64_t tokens,
                const int64_t *ids, const std::vector<char> &of, float *y_RD) {
    int64_t rows = 0;
    std::vector<int64_t> first(s.E + 1), row_at(tokens * s.K), token_at(tokens * s.K);
    for (int64_t r = 0; r < tokens * s.K; r++)
        if (of[ids[r]]) first[ids[r] + 1]++, rows++;
    std::vector<Expert> chosen;
    for (int64_t e = 0; e < s.E; e++) {  // rows are grouped by expert, in ascending order
        int64_t number = first[e + 1];
        first[e + 1] += first[e];
        if (!number) continue;
        chosen.push_back(*layer.experts[e]);
        chosen.back().first = first[e], chosen.back().rows = number;
    }
    if (!rows) return;
    for (int64_t r = 0; r < tokens * s.K; r++) {
        if (!of[ids[r]]) continue;
        int64_t at = first[ids[r]]++;
        row_at[at] = r, token_at[at] = r / s.K;
    }
    int64_t Q = groups_of(std::max(chosen[0].in.rows, chosen[0].down.cols)) * GROUP;
    std::unique_ptr<float[]> h_RQ(new float[rows * Q]), grouped_RD(new float[rows * s.D]);
    moefit_experts(level, chosen.data(), chosen.size(), token_at.data(), rows, x, tokens, s.kind, h_RQ.get(), Q,
                   layer.gated, layer.activation, grouped_RD.get());
    for (int64_t r = 0; r < rows; r++) std::memcpy(y_RD + row_at[r] * s.D, grouped_RD.get() + r * s.D, 4 * s.D);
}

void sum_rows(int64_t level, const LayerSizes &s, const float *y_RD, int64_t tokens, const void *weights, void *y) {
    moefit_weighted_sum(level, y_RD, F32, tokens, s.K, s.D, weights, s.weights_kind, s.kind, y, nullptr);
}

void experts_of(int64_t level, const DecoderLayer &layer, const LayerSizes &s, const void *x, int64_t tokens,
                const int64_t *ids, const void *weights, void *y) {
    if (tokens > 1) {
        std::unique_ptr<float[]> y_RD(new float[tokens * s.K * s.D]);
        write_rows(level, layer, s, x, tokens, ids, std::vector<char>(s.E, 1), y_RD.get());
        return sum_rows(level, s, y_RD.get(), tokens, weights, y);
    }
    std::vector<const Expert *> chosen(s.K);
    for (int64_t k = 0; k < s.K; k++) chosen[k] = layer.experts[ids[k]];
    moefit_token(level, chosen.data(), s.K, x, s.kind, weights, s.weights_kind, layer.gated, layer.activation, y, nullptr);
}

// Compute the resident experts whose rows are not there yet.
void add_rows(int64_t level, const DecoderLayer &layer, const LayerSizes &s, const void *x, int64_t tokens,
              const int64_t *ids, const SomeRows &rows) {
    std::vector<char> of(s.E);
    for (int64_t e = 0; e < s.E; e++) of[e] = layer.experts[e] && !rows.done_E[e], rows.done_E[e] |= of[e];
    write_rows(level, layer, s, x, tokens, ids, of, rows.y_RD);
}

// Compute the shared expert if its output is not there yet.
void add_shared_rows(int64_t level, const DecoderLayer &layer, const LayerSizes &s, const void *x, int64_t tokens,
                     const SomeRows &rows) {
    if (*rows.has_shared || !layer.shared) return;
    shared_output(level_of(level), *layer.shared, x, tokens, s.kind, rows.shared_TD);
    *rows.has_shared = 1;
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

// Compute layers `first` to `number` - 1; return the number of complete ones among all. The next one, if any, has chosen
// an expert that is not resident: its `sum`, `normed`, logits and choice are made, and its keys and values are written.
// It is `first` of a later call, then with `rows`, which may have outputs of its experts, or none; all of its choice is
// resident by then. segments: those of layer 0, then of the next. x: the input of layer 0.
int64_t moefit_layers(int64_t level, const DecoderLayer *layers, int64_t first, int64_t number, const LayerSizes *sizes,
                      const Segment *segments, int64_t requests, const void *x, int64_t tokens, const void *cos,
                      const void *sin, const LayerResults *results, const SomeRows *rows) {
    const Level &use = level_of(level);
    const LayerSizes &s = *sizes;
    const LayerResults &made = *results;
    int64_t size = tokens * s.D * bytes_of(s.kind);
    std::unique_ptr<char[]> y(new char[size]);
    for (int64_t l = first; l < number; l++, rows = nullptr) {
        int64_t *ids = made.ids_LTK + l * tokens * s.K;
        char *logits = made.logits_LTE + l * tokens * s.E * bytes_of(s.logits_kind);
        char *weights = made.weights_LTK + l * tokens * s.K * bytes_of(s.weights_kind);
        Choice choice = {layers[l].router, logits, weights, ids};
        if (!rows)
            moefit_block(level, layers[l].block, segments + l * requests, requests, l ? made.x_LTD + (l - 1) * size : x,
                         tokens, cos, sin, made.sum_TD, made.normed_TD, layers[l].router ? &choice : nullptr);
        if (!layers[l].router) {
            shared_output(use, *layers[l].shared, made.normed_TD, tokens, s.kind, y.get());
            add_values(use, made.sum_TD, y.get(), tokens * s.D, s.kind, made.x_LTD + l * size);
            continue;
        }
        if (!all_resident(layers[l], ids, tokens * s.K, s.E)) return l;
        if (rows) {
            add_rows(level, layers[l], s, made.normed_TD, tokens, ids, *rows);
            sum_rows(level, s, rows->y_RD, tokens, weights, y.get());
            add_shared_rows(level, layers[l], s, made.normed_TD, tokens, *rows);
            if (layers[l].shared) add_values(use, y.get(), rows->shared_TD, tokens * s.D, s.kind, y.get());
        } else {
            experts_of(level, layers[l], s, made.normed_TD, tokens, ids, weights, y.get());
            if (layers[l].shared) moefit_add_shared(level, layers[l].shared, made.normed_TD, tokens, s.kind, y.get());
        }
        add_shares(use, s, (const char *)made.normed_TD, tokens, ids, weights, made.shares_LE + l * s.E);
        add_values(use, made.sum_TD, y.get(), tokens * s.D, s.kind, made.x_LTD + l * size);
    }
    return number;
}

// Compute the resident experts that layer l has chosen and its shared expert, after a call that ended there.
void moefit_resident_rows(int64_t level, const DecoderLayer *layers, int64_t l, const LayerSizes *sizes, int64_t tokens,
                          const LayerResults *results, const SomeRows *rows) {
    const void *x = results->normed_TD;
    add_rows(level, layers[l], *sizes, x, tokens, results->ids_LTK + l * tokens * sizes->K, *rows);
    add_shared_rows(level, layers[l], *sizes, x, tokens, *rows);
}
}
