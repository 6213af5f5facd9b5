// Any processor.
#include <algorithm>
#include <cstring>

#include "kinds.h"
#include "matrix.h"

namespace plain {
#include "plain.inc"
}

const Level PORTABLE = {plain::any_dot, plain::any_decode, plain::narrow};
