// Attention over keys and values of several requests, read directly from their cache.
//
// An output is summed in an order that depends only on positions in its request: keys in spans of SPAN
// positions from the request's first, spans one after the other. So results are bit-identical for any
// number of threads, any batch and any chunking of a prompt. quant/attention.py has the reference that
// tests compare with.
#pragma once
#include <cstdint>

constexpr int64_t SPAN = 512;  // keys that are summed before they are merged with the others
constexpr int64_t PART = 64;   // keys whose scores are stored at once
constexpr int64_t ROWS = 32;   // queries of one KV head that are processed together

// Strides are in elements. Widths are multiples of 16. `kind` is that of queries and outputs, `cache` that of
// keys and values: the same, or INT8 with a scale per token and KV head. The last `more_width` elements of keys may lie
// in an array of their own, which all KV heads share.
struct Attention {
    int64_t heads, groups, width, value_width, kind, cache;
    int64_t query_token, query_head, key_group, key_token, value_group, value_token;
    int64_t key_scale_group, value_scale_group;
    int64_t window;         // keys that a query attends to, including its own; 0: all preceding ones
    float scale, softcap;   // softcap 0: none
    const float *sinks;     // null, or a score per query head without a value
    int64_t more_width, more_token;  // 0: keys lie in one array
};

// `fresh` queries of one request in rows from `row` on; the first follows `past` keys.
struct Segment {
    const void *keys, *values;
    const float *key_scales, *value_scales;  // null unless keys and values are INT8
    int64_t past, fresh, row;
    const void *more;  // last elements of keys, null unless Attention::more_width
};

// Keys and values of one KV head of a request.
struct CacheHead {
    const void *keys, *values;
    const float *key_scales, *value_scales;
    const void *more;
};

// Queries of one KV head, and the position of each.
struct QueryRows {
    int64_t number;
    const float *query;  // [number, width]
    int64_t position[ROWS], head[ROWS];
};

// A row's running softmax: the largest score, the sum of exponentials and the sum of weighted values.
struct Seen {
    float largest[ROWS], sum[ROWS];
    float *value;  // [ROWS, value_width]
};
