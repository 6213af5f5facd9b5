// The same loops as portable.cpp, for processors with AVX2 and FMA.
#include <algorithm>
#include <cstring>

#include "kinds.h"
#include "matrix.h"
#include "target.h"

#if defined(__x86_64__)
TARGET_BEGIN("avx2,fma,f16c")

namespace avx2 {
#include "plain.inc"
}

TARGET_END

const Level AVX2 = {avx2::any_dot, avx2::any_decode, avx2::narrow};
#endif
