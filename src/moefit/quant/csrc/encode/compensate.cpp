// C interface: encode a matrix by the second moments of its inputs (GPTQ). quant/gptq.py documents the
// method and is the reference that tests compare with.
//
// Rows are independent. LANES of them are processed in parallel, one per lane, through all columns and all
// sweeps by one thread: results do not depend on the number of threads, and there is no synchronisation.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "encode.h"
#include "../half.h"
#include "../matrix.h"
#include "../target.h"
#include "../tiles.h"

namespace {

struct Job {
    const Matrix *from;    // of floats
    int64_t first, cols;   // its columns that compensate each other; first is a multiple of 64
    const float *factor;    // [G, P, 64], a panel of columns for each group, with zeros for columns that
    const float *moments;  // do not exist: P is cols in whole groups
    const float *counts;   // [P]
    int64_t bits, sweeps;
    uint8_t *codes, *meta;  // of the whole matrix
    const uint32_t *split_factor, *split_moments;  // both in the layout of tiles, or null

    int64_t groups() const { return groups_of(cols); }
    int64_t padded() const { return groups() * GROUP; }
};

// Memory at the start of a cache line.
template <typename T>
class Many {
public:
    explicit Many(int64_t number) : at_(number ? new (std::align_val_t(64)) T[number]() : nullptr) {}
    ~Many() { operator delete[](at_, std::align_val_t(64)); }
    Many(const Many &) = delete;
    Many &operator=(const Many &) = delete;
    T *at(int64_t i) const { return at_ + i; }

private:
    T *at_;
};

// State of LANES rows in one thread: lanes are contiguous, columns consecutive.
struct Rows {
    explicit Rows(const Job &job)
        : off(job.padded() * LANES), code(job.padded() * LANES), scale(job.groups() * LANES),
          least(job.groups() * LANES), pairs(job.split_moments ? job.padded() * LANES : 0) {}

    Many<float> off;   // each weight minus its decoded value, 0 for padding columns; while columns
                       // are rounded, the error that later ones compensate, over the factor's diagonal
    Many<float> code;  // 0 for padding columns
    Many<float> scale, least;
    Many<uint32_t> pairs;  // `off` in the layout of tiles
};

typedef float Tile[GROUP * LANES];

}  // namespace

#define INLINED __attribute__((always_inline))

#define WIDTH 4
namespace plain_compensate {
#include "compensate.inc"
}
#undef WIDTH

#if defined(__x86_64__)
TARGET_BEGIN("avx2,fma,f16c")
#define WIDTH 8
namespace avx2_compensate {
#include "compensate.inc"
}
#undef WIDTH
TARGET_END

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define WIDTH 16
namespace avx512_compensate {
#include "compensate.inc"
}
#undef WIDTH
TARGET_END
#endif

extern "C" {

// Encodes columns first to first + cols - 1 of a matrix of finite floats. moments, factor, counts: as in
// quant/moments.py. Codes and meta are those of the whole matrix.
void moefit_compensate(int64_t level, const Matrix *from, int64_t first, int64_t cols, const float *factor,
                       const float *moments, const float *counts, int64_t bits, int64_t sweeps, uint8_t *codes,
                       uint8_t *meta) {
    Job job = {from, first, cols, factor, moments, counts, bits, sweeps, codes, meta, nullptr, nullptr};
    const GroupCoder &coder = group_coder(level);
    void (*encode)(const Job &, const GroupCoder &, int64_t, Rows &) = plain_compensate::encode;
#if defined(__x86_64__)
    if (level >= IS_AVX2) encode = avx2_compensate::encode;
    if (level >= IS_AVX512) encode = avx512_compensate::encode;
#endif
    bool tiles = level >= IS_AMX;
    int64_t groups = job.groups(), panel = job.padded() * GROUP;
    Many<uint32_t> split_factor(tiles ? groups * panel : 0), split_moments(tiles ? groups * panel : 0);
    if (tiles) job.split_factor = split_factor.at(0), job.split_moments = split_moments.at(0);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < (tiles ? groups : 0); g++) {
            split_panel(factor + g * panel, g * GROUP, split_factor.at(g * panel));
            split_panel(moments + g * panel, job.padded(), split_moments.at(g * panel));
        }
        Rows rows(job);
        if (tiles) tiles_begin();
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < from->rows; row += LANES) encode(job, coder, row, rows);
        if (tiles) tiles_end();
    }
}
}
