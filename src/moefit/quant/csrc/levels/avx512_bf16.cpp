// Products of bfloat16 matrices with bfloat16 tokens by AVX-512-BF16, which adds two products at a time to a
// float32 sum. All else is as with AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "../matrix.h"
#include "../target.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")

namespace {

constexpr int64_t PAIRS = 32;  // inputs that one instruction multiplies

inline __m512bh inputs(const uint16_t *at, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, at); }

// ROWS rows times T tokens. Each output has a sum of its own, so it does not depend on the others.
template <int ROWS, int T>
void products(const Matrix &m, int64_t row, const Input *x, float *const *y) {
    const uint16_t *w = (const uint16_t *)m.codes + row * m.cols;
    __m512 sum[ROWS][T];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t c = 0; c < m.cols; c += PAIRS) {
        __mmask32 mask = m.cols - c >= PAIRS ? 0xffffffff : (1u << (m.cols - c)) - 1;
        __m512bh token[T];
        for (int t = 0; t < T; t++) token[t] = inputs(x[t].bfloat16 + c, mask);
        for (int r = 0; r < ROWS; r++) {
            _mm_prefetch((const char *)(w + (r + ROWS) * m.cols + c), _MM_HINT_T0);
            __m512bh weights = inputs(w + r * m.cols + c, mask);
            for (int t = 0; t < T; t++) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], weights, token[t]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) y[t][row + r] = _mm512_reduce_add_ps(sum[r][t]);
}

template <int T>
void rows_times(const Matrix &m, int64_t first, int64_t last, const Input *x, float *const *y) {
    int64_t row = first;
    // One row at a time is one stream to read, which Zen 4 reads nearly twice as fast as four.
    for (; T > 1 && row + 4 <= last; row += 4) products<4, T>(m, row, x, y);
    for (; row < last; row++) products<1, T>(m, row, x, y);
}

void dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    if (m.kind != BF16 || !panel.x->bfloat16) return AVX512.dot(m, first, last, panel, y);
    const Input *x = panel.x;
    int64_t t = 0;
    for (; t + 4 <= panel.tokens; t += 4) rows_times<4>(m, first, last, x + t, y + t);
    for (; t + 2 <= panel.tokens; t += 2) rows_times<2>(m, first, last, x + t, y + t);
    for (; t < panel.tokens; t++) rows_times<1>(m, first, last, x + t, y + t);
}

int64_t token_bytes(const Matrix &m, const Input *x) {
    return m.kind == BF16 && x->bfloat16 ? 0 : AVX512.token_bytes(m, x);
}

}  // namespace

TARGET_END

const Level &avx512_bf16_level() {
    static const Level level = [] {
        Level made = AVX512;
        made.dot = dot, made.token_bytes = token_bytes, made.reads_bfloat16 = true;
        return made;
    }();
    return level;
}
#endif
