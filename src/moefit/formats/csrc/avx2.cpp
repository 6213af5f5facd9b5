// The same loops as portable.cpp, for processors with AVX2 and FMA.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kinds.h"
#include "matrix.h"
#include "target.h"

#if defined(__x86_64__)
TARGET_BEGIN("avx2,fma,f16c")

namespace avx2 {
#include "plain.inc"
#include "inputs.inc"
}

TARGET_END

const Level AVX2 = {avx2::any_dot, avx2::any_decode, avx2::narrow, avx2::widen, avx2::integers};
#endif
