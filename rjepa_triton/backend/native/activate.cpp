// Replaces `count` contiguous numbers by their tanh (function 0), sigmoid (1) or exp (2). Tests measure the accuracy of
// these through it.

#include "vectors.h"

template <class real> static void activate(real *values, long count, long function) {
    constexpr long W = Lanes<real>::width;
    for (long i = 0; i < count; i += W) {
        const auto value = load(values + i, count - i);
        store(values + i, function == 0 ? tanh_of(value) : function == 1 ? sigmoid_of(value) : exp_of(value), count - i);
    }
}

extern "C" void activate_float(float *values, long count, long function) { activate(values, count, function); }
extern "C" void activate_double(double *values, long count, long function) { activate(values, count, function); }
