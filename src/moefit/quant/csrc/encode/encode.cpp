// C interface: encode rows of weights as codes, scales and minima.
//
// Each row is encoded by one thread, and products and sums are not fused, so results depend neither on the
// number of threads nor on the instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "encode.h"
#include "../matrix.h"
#include "../target.h"

#include "../levels/rounding.h"
#include "../half.h"

namespace {

struct Job {
    const Matrix *from;  // of floats
    int64_t bits;
    uint8_t *codes, *meta;
    const float *moments;  // weights of the columns' errors, in whole groups; or null
    bool fitted;
};

}  // namespace

namespace {

// Interleave 16 consecutive rows into a slab.
void to_slab(const Matrix &m, int64_t row, uint8_t *codes, uint8_t *meta) {
    int64_t size = code_bytes(m), more = meta_bytes(m);
    std::vector<uint8_t> from_codes(codes + row * size, codes + (row + SLAB) * size);
    std::vector<uint8_t> from_meta(meta + row * more, meta + (row + SLAB) * more);
    for (int64_t lane = 0; lane < SLAB; lane++)
        put_row(lane, groups_of(m.cols), size, more, &from_codes[lane * size], &from_meta[lane * more],
                codes + row * size, meta + row * more);
}

}  // namespace

// Also for lambdas, which use registers.
#define INLINED __attribute__((always_inline))

#define WIDTH 4
namespace plain_encode {
#include "encode.inc"
}
#undef WIDTH

#if defined(__x86_64__)
TARGET_BEGIN("avx2,f16c")
#define WIDTH 8
namespace avx2_encode {
#include "encode.inc"
}
#undef WIDTH
TARGET_END

TARGET_BEGIN("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define WIDTH 16
namespace avx512_encode {
#include "encode.inc"
}
#undef WIDTH
TARGET_END
#endif

const GroupCoder &group_coder(int64_t level) {
#if defined(__x86_64__)
    if (level >= IS_AVX512) return avx512_encode::CODER;
    if (level >= IS_AVX2) return avx2_encode::CODER;
#endif
    (void)level;
    return plain_encode::CODER;
}

extern "C" {

// Encodes rows of floats; moments: weights of the columns' errors, or null. Returns the index of a weight
// that cannot be encoded, the first of the first row that has one, or -1; the output is then undefined.
int64_t moefit_encode(int64_t level, const Matrix *from, int64_t bits, int64_t fitted, const float *moments,
                      uint8_t *codes, uint8_t *meta) {
    Job job = {from, bits, codes, meta, moments, fitted != 0};
    int64_t (*encode)(const Job &, int64_t) = plain_encode::any_row;
#if defined(__x86_64__)
    if (level >= IS_AVX2) encode = avx2_encode::any_row;
    if (level >= IS_AVX512) encode = avx512_encode::any_row;
#endif
    (void)level;
    int64_t bad = from->rows * from->cols;
#pragma omp parallel for schedule(dynamic, 4) reduction(min : bad)
    for (int64_t row = 0; row < from->rows; row++) {
        int64_t col = encode(job, row);
        if (col < from->cols) bad = std::min(bad, row * from->cols + col);
    }
    Matrix made = {codes, meta, from->rows, from->cols, bits};
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < rows_in_slabs(made); row += SLAB) to_slab(made, row, codes, meta);
    return bad < from->rows * from->cols ? bad : -1;
}
}
