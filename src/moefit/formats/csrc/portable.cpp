// Any processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kinds.h"
#include "matrix.h"

namespace plain {
#include "plain.inc"
#include "inputs.inc"
}

const Level PORTABLE = {plain::any_dot, plain::any_decode, plain::narrow, plain::widen, plain::integers};
