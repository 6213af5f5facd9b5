// Dispatch on a matrix's kind.
#pragma once
#define FOR_KIND(kind, call)                                                                       \
    switch (kind) {                                                                                \
        case F32: call(F32); break;                                                                \
        case BF16: call(BF16); break;                                                              \
        case F16: call(F16); break;                                                                \
        case FP8: call(FP8); break;                                                                \
        case INT2: call(INT2); break;                                                              \
        case INT3: call(INT3); break;                                                              \
        case INT4: call(INT4); break;                                                              \
        case INT5: call(INT5); break;                                                              \
        case INT6: call(INT6); break;                                                              \
        case INT8: call(INT8); break;                                                              \
    }
