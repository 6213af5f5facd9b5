// Products of grouped integers with AVX-VNNI, for processors that have it without AVX-512. All else is as with
// AVX2.
#include "../target.h"

#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avxvnniintrin.h>)
#define VNNI  // the compiler knows it
#endif
#endif

#include "../matrix.h"

#ifdef VNNI
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

TARGET_BEGIN("avx2,fma,f16c,avxvnni")

namespace avx2_vnni {

typedef uint8_t VB __attribute__((vector_size(32)));
typedef int32_t RI __attribute__((vector_size(32)));
typedef float RV __attribute__((vector_size(32)));
constexpr int WIDEST = 4, UNROLL = 16;

static inline RV row_halves(const uint16_t *at) { return (RV)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }
static inline RV row_muladd(RV a, RV b, RV c) { return (RV)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

template <int64_t KIND>
static inline __attribute__((always_inline)) RI product(RI sum, VB codes, int32_t four) {
    return (RI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(four));
}

static inline __attribute__((always_inline)) VB table_values(VB codes) {
    const __m256i table = _mm256_broadcastsi128_si256(at_any<__m128i>(E2M1_VALUES));
    return (VB)_mm256_shuffle_epi8(table, (__m256i)codes);
}

#include "slabs.inc"

static void any_dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    if (!any_slab_dot(m, first, last, panel, y)) AVX2.dot(m, first, last, panel, y);
}

static int64_t any_token_bytes(const Matrix &m, const Input *x) {
    return has_digits(m) ? token_bytes(m, x) : AVX2.token_bytes(m, x);
}

static void any_pack(const Matrix &m, const Input *x, int64_t tokens, uint8_t *packed) {
    if (has_digits(m)) pack(m, x, tokens, packed);
    else AVX2.pack(m, x, tokens, packed);
}

}  // namespace avx2_vnni

TARGET_END

bool avx_vnni_here() {
    __builtin_cpu_init();
    unsigned a = 7, c = 1, b, d;  // CPUID 7.1: EAX bit 4
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return a >> 4 & 1;
}

const Level &avx2_vnni_level() {
    static const Level level = [] {
        Level made = AVX2;
        made.dot = avx2_vnni::any_dot, made.token_bytes = avx2_vnni::any_token_bytes, made.pack = avx2_vnni::any_pack;
        return made;
    }();
    return level;
}

#elif defined(__x86_64__)
bool avx_vnni_here() { return false; }
const Level &avx2_vnni_level() { return AVX2; }
#endif
