// Functions of one number.
#pragma once

#include "common.h"

namespace {

// For float32 and below: erfc(z) = t P(2t - 1) e^(-z^2) with t = 3 / (3 + z), z >= 0; relative error 3e-11. P was
// fitted at the Chebyshev nodes.
INLINE double erfc_(double x) {
  double z = std::fabs(x), t = 3.0 / (3.0 + z), s = 2.0 * t - 1.0;
  double p = 5.308803288917317e-07;
  p = std::fma(p, s, 7.959119591627887e-07);
  p = std::fma(p, s, -5.292408507744221e-06);
  p = std::fma(p, s, -9.13866014117692e-06);
  p = std::fma(p, s, 3.546772332574711e-05);
  p = std::fma(p, s, 9.156113348738448e-05);
  p = std::fma(p, s, -0.00018261633495116105);
  p = std::fma(p, s, -0.001011081454426149);
  p = std::fma(p, s, -0.0004041705889358986);
  p = std::fma(p, s, 0.00894235585187059);
  p = std::fma(p, s, 0.03984259000467199);
  p = std::fma(p, s, 0.10348909237850937);
  p = std::fma(p, s, 0.1967427856237489);
  p = std::fma(p, s, 0.29446481758811205);
  p = std::fma(p, s, 0.3580023023627799);
  double tail = t * p * exp_(-z * z);
  return x < 0 ? 2.0 - tail : tail;
}

using Params = const double*;
using Loop = void (*)(double*, int64, Params);

template <double (*F)(double, Params)>
void loop(double* x, int64 n, Params p) {
  for (int64 i = 0; i < n; i++) x[i] = F(x[i], p);
}

INLINE double fast_exp(double x, Params) { return exp_(x); }
INLINE double fast_sigmoid(double x, Params) { return 1.0 / (1.0 + exp_(-x)); }
INLINE double fast_silu(double x, Params) { return x / (1.0 + exp_(-x)); }
INLINE double fast_gelu(double x, Params) { return 0.5 * x * erfc_(x * -0x1.6a09e667f3bcdp-1); }

// 0.5 x (1 + tanh(u)) as x / (1 + e^(-2u)), which loses nothing to cancellation.
INLINE double fast_gelu_tanh(double x, Params) {
  double u = 0x1.9884533d43651p-1 * (x + 0.044715 * x * x * x);  // sqrt(2 / pi)
  return x / (1.0 + exp_(-2.0 * u));
}

INLINE double fast_tanh(double x, Params) {
  double e = exp_(2.0 * (std::fabs(x) > 20.0 ? 20.0 : std::fabs(x)));
  double large = std::copysign((e - 1.0) / (e + 1.0), x), small = x * (1.0 - x * x * (1.0 / 3.0));
  double y = std::fabs(x) < 0x1p-10 ? small : large;
  return x != x ? x : y;
}

// tanh(log(1 + e)) = (e^2 + 2e) / (e^2 + 2e + 2), e = e^x
INLINE double fast_mish(double x, Params) {
  double e = exp_(x > 40.0 ? 40.0 : x), square = e * (e + 2.0);
  return x * (square / (square + 2.0));
}

INLINE double rsqrt(double x, Params) { return 1.0 / std::sqrt(x); }

NOINLINE double exact_exp(double x, Params) { return std::exp(x); }
NOINLINE double exact_sigmoid(double x, Params) { return 1.0 / (1.0 + std::exp(-x)); }
NOINLINE double exact_silu(double x, Params) { return x / (1.0 + std::exp(-x)); }
NOINLINE double exact_gelu(double x, Params) { return 0.5 * x * std::erfc(x * -0x1.6a09e667f3bcdp-1); }
NOINLINE double exact_gelu_tanh(double x, Params) {
  double u = 0x1.9884533d43651p-1 * (x + 0.044715 * x * x * x);
  return x / (1.0 + std::exp(-2.0 * u));
}
NOINLINE double exact_tanh(double x, Params) { return std::tanh(x); }
NOINLINE double exact_mish(double x, Params) {
  double e = std::exp(x > 40.0 ? 40.0 : x), square = e * (e + 2.0);
  return x * (square / (square + 2.0));
}
NOINLINE double exact_erf(double x, Params) { return std::erf(x); }
NOINLINE double exact_expm1(double x, Params) { return std::expm1(x); }
NOINLINE double exact_log(double x, Params) { return std::log(x); }
NOINLINE double exact_log1p(double x, Params) { return std::log1p(x); }
NOINLINE double exact_sin(double x, Params) { return std::sin(x); }
NOINLINE double exact_cos(double x, Params) { return std::cos(x); }
NOINLINE double exact_pow(double x, Params p) { return std::pow(x, p[0]); }
INLINE double square(double x, Params) { return x * x; }
INLINE double cube(double x, Params) { return x * x * x; }
INLINE double root(double x, Params) { return std::sqrt(x); }
INLINE double reciprocal(double x, Params) { return 1.0 / x; }
INLINE double reciprocal_square(double x, Params) { return 1.0 / (x * x); }
NOINLINE double exact_softplus(double x, Params p) {
  double scaled = x * p[0];
  return scaled > p[1] ? x : std::log1p(std::exp(scaled)) / p[0];
}
NOINLINE double exact_log_sigmoid(double x, Params) {
  return (x < 0 ? x : 0.0) - std::log1p(std::exp(-std::fabs(x)));
}
NOINLINE double exact_elu(double x, Params p) {  // alpha, scale, input_scale
  return x <= 0 ? std::expm1(x * p[2]) * (p[0] * p[1]) : x * p[1];
}

// The exponents that torch computes by products, quotients and roots. A root is not std::pow's: that differs at -0 and -inf.
NOINLINE void pow_loop(double* x, int64 n, Params p) {
  Loop one = p[0] == 2      ? loop<square>
             : p[0] == 3    ? loop<cube>
             : p[0] == 0.5  ? loop<root>
             : p[0] == -0.5 ? loop<rsqrt>
             : p[0] == -1   ? loop<reciprocal>
             : p[0] == -2   ? loop<reciprocal_square>
                            : loop<exact_pow>;
  one(x, n, p);
}

// float64 takes the exact forms, because the fast ones have too few digits for it. All other dtypes are computed in
// double by the fast forms, and rounded once.
const struct Pointwise {
  const char* name;
  Loop fast, exact;
} POINTWISE[] = {
    {"silu", loop<fast_silu>, loop<exact_silu>},
    {"sigmoid", loop<fast_sigmoid>, loop<exact_sigmoid>},
    {"gelu", loop<fast_gelu>, loop<exact_gelu>},
    {"gelu_tanh", loop<fast_gelu_tanh>, loop<exact_gelu_tanh>},
    {"tanh", loop<fast_tanh>, loop<exact_tanh>},
    {"exp", loop<fast_exp>, loop<exact_exp>},
    {"mish", loop<fast_mish>, loop<exact_mish>},
    {"rsqrt", loop<rsqrt>, loop<rsqrt>},
    {"softplus", loop<exact_softplus>, loop<exact_softplus>},
    {"log_sigmoid", loop<exact_log_sigmoid>, loop<exact_log_sigmoid>},
    {"elu", loop<exact_elu>, loop<exact_elu>},
    {"pow", pow_loop, pow_loop},
    {"erf", loop<exact_erf>, loop<exact_erf>},
    {"expm1", loop<exact_expm1>, loop<exact_expm1>},
    {"log", loop<exact_log>, loop<exact_log>},
    {"log1p", loop<exact_log1p>, loop<exact_log1p>},
    {"sin", loop<exact_sin>, loop<exact_sin>},
    {"cos", loop<exact_cos>, loop<exact_cos>},
};

}  // namespace

// Over n contiguous elements. x and out may be the same.
EXPORT const char* pointwise(const char* kind, const double* params, int64 dtype, char* x, char* out, int64 n,
                             int threads) {
  const Pointwise* op = std::find_if(std::begin(POINTWISE), std::end(POINTWISE),
                                     [&](const Pointwise& entry) { return !std::strcmp(entry.name, kind); });
  if (op == std::end(POINTWISE)) return "pointwise does not know this kind.";
  Loop apply = dtype == FLOAT64 ? op->exact : op->fast;
  parallel((n + CHUNK - 1) / CHUNK, double(n) * 8, threads, [&](int64 task) {
    alignas(64) double values[CHUNK];
    int64 start = task * CHUNK, width = std::min(CHUNK, n - start);
    load({x, dtype, 0, 1, n}, start, width, values);
    apply(values, width, params);
    store(out, dtype, start, values, width);
  });
  return nullptr;
}
