// Included after the standard headers by sources whose results are the same on every processor: no product is fused
// with the sum that it is added to unless the code says so.
#pragma once
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif
