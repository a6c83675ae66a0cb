// Sums, norms, softmax and cumsum of rows, their gradients, and index_add.
#pragma once

#include "common.h"

namespace {

constexpr int SUM_LANES = 32;

// Lane j sums columns j, j + 32, j + 64, ...; then lane j += lane j + 16, + 8, + 4, + 2, + 1.
// Zeros before or after the values change no bit: they rotate the values over the lanes, and the tree adds the same
// pairs after any rotation, because lane j always meets lane j + width (mod 2 * width).
struct LaneSum {
  double lane[SUM_LANES] = {};

  template <class A>
  void add(const A* x, int64 n) {  // n is a multiple of 32 except in the last call
    int64 i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
      for (int j = 0; j < SUM_LANES; j++) lane[j] += double(x[i + j]);
    for (int j = 0; i + j < n; j++) lane[j] += double(x[i + j]);
  }

  double total() {
    for (int width = SUM_LANES / 2; width; width /= 2)
      for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
  }
};

// The maximum, or NaN if there is a NaN. No order of the comparisons changes the result.
struct LaneMax {
  double lane[SUM_LANES];

  LaneMax() { std::fill(lane, lane + SUM_LANES, -INF); }

  static double larger(double x, double y) { return x > y || x != x ? x : y; }

  template <class A>
  void add(const A* x, int64 n) {
    int64 i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
      for (int j = 0; j < SUM_LANES; j++) lane[j] = larger(x[i + j], lane[j]);
    for (int j = 0; i + j < n; j++) lane[j] = larger(x[i + j], lane[j]);
  }

  double total() {
    for (int width = SUM_LANES / 2; width; width /= 2)
      for (int j = 0; j < width; j++) lane[j] = larger(lane[j + width], lane[j]);
    return lane[0];
  }
};

// Calls f(x, n, start) for each chunk, with the columns [start, start + n) as doubles in x.
template <class F>
void each_chunk(const Row& row, F f) {
  alignas(64) double x[CHUNK];
  for (int64 start = 0; start < row.n; start += CHUNK) {
    int64 n = std::min(CHUNK, row.n - start);
    load(row, start, n, x);
    f(x, n, start);
  }
}

// The sum of f(x) over the columns, in lanes.
template <class F>
double sum_of(const Row& row, F f) {
  LaneSum sum;
  each_chunk(row, [&](double* x, int64 n, int64) {
    for (int64 i = 0; i < n; i++) x[i] = f(x[i]);
    sum.add(x, n);
  });
  return sum.total();
}

double mean_of(const Row& row) {
  return sum_of(row, [](double x) { return x; }) / double(row.n);
}

double squared_deviations(const Row& row, double mean) {
  return sum_of(row, [=](double x) { return (x - mean) * (x - mean); });
}

double max_of(const Row& row) {
  LaneMax max;
  each_chunk(row, [&](double* x, int64 n, int64) { max.add(x, n); });
  return max.total();
}

// Columns of -inf before and after the others add exact zeros, which change no bit.
double sum_of_exp(const Row& row, double max) {
  return sum_of(row, [=](double x) { return exp_(x - max); });
}

double logsumexp_of(const Row& row) {
  double max = max_of(row);
  return std::isinf(max) ? max : max + std::log(sum_of_exp(row, max));
}

template <class F>
void each_row(const Tensor<2>& x, double cost, int threads, F f) {
  int64 rows = x.size[0], step = std::max<int64>(1, 8 * CHUNK / std::max<int64>(1, x.size[1]));
  parallel((rows + step - 1) / step, double(rows) * double(x.size[1]) * cost, threads, [&](int64 task) {
    for (int64 r = task * step; r < std::min(rows, (task + 1) * step); r++) f(r, row_of(x, r));
  });
}

template <class F>
void reduce_rows(const Tensor<2>& x, const Tensor<1>& out, double cost, int threads, F f) {
  each_row(x, cost, threads, [&](int64 r, const Row& row) {
    double value = f(row);
    store(out.data, out.dtype, r, &value, 1);
  });
}

void multiply_add(const Tensor<1>* weight, const Tensor<1>* bias, int64 start, int64 n, double* x) {
  alignas(64) double factor[CHUNK];
  if (weight) {
    load(row_of(*weight), start, n, factor);
    for (int64 i = 0; i < n; i++) x[i] *= factor[i];
  }
  if (bias) {
    load(row_of(*bias), start, n, factor);
    for (int64 i = 0; i < n; i++) x[i] += factor[i];
  }
}

}  // namespace

EXPORT const char* row_sum(const Tensor<2>* x, const Tensor<1>* out, int threads) {
  reduce_rows(*x, *out, 1, threads, [](const Row& row) { return sum_of(row, [](double v) { return v; }); });
  return nullptr;
}

EXPORT const char* row_mean(const Tensor<2>* x, const Tensor<1>* out, int threads) {
  reduce_rows(*x, *out, 1, threads, mean_of);
  return nullptr;
}

EXPORT const char* row_norm(const Tensor<2>* x, double p, const Tensor<1>* out, int threads) {
  if (p != 1 && p != 2) return "row_norm knows p = 1 and p = 2.";
  reduce_rows(*x, *out, 1, threads, [=](const Row& row) {
    return p == 1 ? sum_of(row, [](double v) { return std::fabs(v); })
                  : std::sqrt(sum_of(row, [](double v) { return v * v; }));
  });
  return nullptr;
}

EXPORT const char* row_var_mean(const Tensor<2>* x, double correction, const Tensor<1>* var, const Tensor<1>* mean,
                                int threads) {
  each_row(*x, 2, threads, [&](int64 r, const Row& row) {
    double m = mean_of(row), v = squared_deviations(row, m) / std::max(double(row.n) - correction, 0.0);
    store(var->data, var->dtype, r, &v, 1);
    store(mean->data, mean->dtype, r, &m, 1);
  });
  return nullptr;
}

EXPORT const char* row_logsumexp(const Tensor<2>* x, const Tensor<1>* out, int threads) {
  reduce_rows(*x, *out, 8, threads, logsumexp_of);
  return nullptr;
}

EXPORT const char* row_softmax(const Tensor<2>* x, bool log, const Tensor<2>* out, int threads) {
  each_row(*x, 16, threads, [&](int64 r, const Row& row) {
    double max = max_of(row), sum = sum_of_exp(row, max), log_sum = log ? std::log(sum) : 0;
    each_chunk(row, [&](double* v, int64 n, int64 start) {
      if (log) {
        for (int64 i = 0; i < n; i++) v[i] = (v[i] - max) - log_sum;
      } else {
        for (int64 i = 0; i < n; i++) v[i] = exp_(v[i] - max) / sum;
      }
      store(out->data, out->dtype, r * row.n + start, v, n);
    });
  });
  return nullptr;
}

EXPORT const char* row_cumsum(const Tensor<2>* x, const Tensor<2>* out, int threads) {
  each_row(*x, 2, threads, [&](int64 r, const Row& row) {
    double sum = 0;
    each_chunk(row, [&](double* v, int64 n, int64 start) {
      for (int64 i = 0; i < n; i++) v[i] = sum += v[i];
      store(out->data, out->dtype, r * row.n + start, v, n);
    });
  });
  return nullptr;
}

EXPORT const char* row_layer_norm(const Tensor<2>* x, const Tensor<1>* weight, const Tensor<1>* bias, double eps,
                                  const Tensor<2>* y, const Tensor<1>* mean, const Tensor<1>* rstd, int threads) {
  if ((weight && weight->size[0] != x->size[1]) || (bias && bias->size[0] != x->size[1]))
    return "row_layer_norm needs a weight and a bias of one value for each column.";
  each_row(*x, 4, threads, [&](int64 r, const Row& row) {
    double m = mean_of(row), inverse = 1.0 / std::sqrt(squared_deviations(row, m) / double(row.n) + eps);
    each_chunk(row, [&](double* v, int64 n, int64 start) {
      for (int64 i = 0; i < n; i++) v[i] = (v[i] - m) * inverse;
      multiply_add(weight, bias, start, n, v);
      store(y->data, y->dtype, r * row.n + start, v, n);
    });
    store(mean->data, mean->dtype, r, &m, 1);
    store(rstd->data, rstd->dtype, r, &inverse, 1);
  });
  return nullptr;
}

EXPORT const char* row_rms_norm(const Tensor<2>* x, const Tensor<1>* weight, double eps, const Tensor<2>* y,
                                const Tensor<1>* rstd, int threads) {
  if (weight && weight->size[0] != x->size[1]) return "row_rms_norm needs a weight of one value for each column.";
  each_row(*x, 3, threads, [&](int64 r, const Row& row) {
    double squares = sum_of(row, [](double v) { return v * v; });
    double inverse = 1.0 / std::sqrt(squares / double(row.n) + eps);
    each_chunk(row, [&](double* v, int64 n, int64 start) {
      for (int64 i = 0; i < n; i++) v[i] *= inverse;
      multiply_add(weight, nullptr, start, n, v);
      store(y->data, y->dtype, r * row.n + start, v, n);
    });
    store(rstd->data, rstd->dtype, r, &inverse, 1);
  });
  return nullptr;
}

EXPORT const char* row_softmax_backward(const Tensor<2>* grad, const Tensor<2>* y, bool log, const Tensor<2>* out,
                                        int threads) {
  if (grad->size[0] != y->size[0] || grad->size[1] != y->size[1])
    return "row_softmax_backward needs grad and y of one shape.";
  each_row(*grad, 16, threads, [&](int64 r, const Row& row) {
    Row result = row_of(*y, r);
    alignas(64) double other[CHUNK];
    LaneSum sum;
    each_chunk(row, [&](double* g, int64 n, int64 start) {
      if (!log) {
        load(result, start, n, other);
        for (int64 i = 0; i < n; i++) g[i] *= other[i];
      }
      sum.add(g, n);
    });
    double total = sum.total();
    each_chunk(row, [&](double* g, int64 n, int64 start) {
      load(result, start, n, other);
      if (log) {
        for (int64 i = 0; i < n; i++) g[i] -= exp_(other[i]) * total;
      } else {
        for (int64 i = 0; i < n; i++) g[i] = (g[i] - total) * other[i];
      }
      store(out->data, out->dtype, r * row.n + start, g, n);
    });
  });
  return nullptr;
}

namespace {

struct Norm {
  const Tensor<2>*grad, *x;
  const Tensor<1>*mean, *rstd, *weight;  // mean and weight may be null

  double mean_of_row(int64 r) const { return mean ? number(*mean, r) : 0.0; }
  double rstd_of_row(int64 r) const { return number(*rstd, r); }

  static double number(const Tensor<1>& x, int64 i) {
    double value;
    load(row_of(x), i, 1, &value);
    return value;
  }

  // z = (x - mean) * rstd of columns [start, start + n) of row r.
  void normalised(int64 r, int64 start, int64 n, double* z) const {
    load(row_of(*x, r), start, n, z);
    double m = mean_of_row(r), inverse = rstd_of_row(r);
    if (mean)
      for (int64 i = 0; i < n; i++) z[i] -= m;
    for (int64 i = 0; i < n; i++) z[i] *= inverse;
  }
};

}  // namespace

EXPORT const char* row_norm_backward(const Tensor<2>* grad, const Tensor<2>* x, const Tensor<1>* mean,
                                     const Tensor<1>* rstd, const Tensor<1>* weight, const Tensor<2>* out, int threads) {
  if (grad->size[0] != x->size[0] || grad->size[1] != x->size[1] || rstd->size[0] != x->size[0] ||
      (mean && mean->size[0] != x->size[0]) || (weight && weight->size[0] != x->size[1]))
    return "row_norm_backward needs grad and x of one shape, a mean and rstd for each row, a weight for each column.";
  Norm norm{grad, x, mean, rstd, weight};
  each_row(*grad, 8, threads, [&](int64 r, const Row& row) {
    alignas(64) double z[CHUNK];
    LaneSum of_g, of_gz;
    each_chunk(row, [&](double* g, int64 n, int64 start) {
      multiply_add(weight, nullptr, start, n, g);
      norm.normalised(r, start, n, z);
      if (mean) of_g.add(g, n);
      for (int64 i = 0; i < n; i++) z[i] *= g[i];
      of_gz.add(z, n);
    });
    double inverse = norm.rstd_of_row(r), g_mean = of_g.total() / double(row.n), gz_mean = of_gz.total() / double(row.n);
    each_chunk(row, [&](double* g, int64 n, int64 start) {
      multiply_add(weight, nullptr, start, n, g);
      norm.normalised(r, start, n, z);
      for (int64 i = 0; i < n; i++) g[i] = (g[i] - g_mean - z[i] * gz_mean) * inverse;
      store(out->data, out->dtype, r * row.n + start, g, n);
    });
  });
  return nullptr;
}

// Over the rows, ascending, one chain for each column.
EXPORT const char* norm_backward_parameters(const Tensor<2>* grad, const Tensor<2>* x, const Tensor<1>* mean,
                                            const Tensor<1>* rstd, const Tensor<1>* of_weight, const Tensor<1>* of_bias,
                                            int threads) {
  constexpr int64 COLUMNS = 256;
  int64 rows = x->size[0], cols = x->size[1];
  if (grad->size[0] != rows || grad->size[1] != cols || rstd->size[0] != rows || (mean && mean->size[0] != rows))
    return "norm_backward_parameters needs grad and x of one shape, and a mean and rstd for each row.";
  Norm norm{grad, x, mean, rstd, nullptr};
  parallel((cols + COLUMNS - 1) / COLUMNS, double(rows) * double(cols) * 2, threads, [&](int64 task) {
    int64 start = task * COLUMNS, width = std::min(COLUMNS, cols - start);
    alignas(64) double g[COLUMNS], z[COLUMNS], weight_sum[COLUMNS] = {}, bias_sum[COLUMNS] = {};
    for (int64 r = 0; r < rows; r++) {
      load(row_of(*grad, r), start, width, g);
      if (of_weight) {
        norm.normalised(r, start, width, z);
        for (int64 c = 0; c < width; c++) weight_sum[c] += g[c] * z[c];
      }
      if (of_bias)
        for (int64 c = 0; c < width; c++) bias_sum[c] += g[c];
    }
    if (of_weight) store(of_weight->data, of_weight->dtype, start, weight_sum, width);
    if (of_bias) store(of_bias->data, of_bias->dtype, start, bias_sum, width);
  });
  return nullptr;
}

EXPORT const char* index_add(const Tensor<2>* self, const Tensor<1>* index, const Tensor<2>* source, double alpha,
                             const Tensor<2>* out, int threads) {
  constexpr int64 COLUMNS = 64;
  int64 rows = self->size[0], cols = self->size[1], n = index->size[0];
  const int64* target = reinterpret_cast<const int64*>(index->data);
  if (source->size[0] != n || source->size[1] != cols || source->dtype != self->dtype)
    return "index_add needs self of shape [R, C], index of shape [n], and source of shape [n, C] and self's dtype.";
  for (int64 i = 0; i < n; i++)
    if (target[i * index->stride[0]] < 0 || target[i * index->stride[0]] >= rows)
      return "index_add needs every index in [0, R), the rows of self.";
  parallel((cols + COLUMNS - 1) / COLUMNS, double(rows + n) * double(cols), threads, [&](int64 task) {
    int64 start = task * COLUMNS, width = std::min(COLUMNS, cols - start);
    std::unique_ptr<double[]> sum(new double[rows * width]);
    for (int64 r = 0; r < rows; r++) load(row_of(*self, r), start, width, &sum[r * width]);
    for (int64 i = 0; i < n; i++) {
      alignas(64) double added[COLUMNS];
      double* row = &sum[target[i * index->stride[0]] * width];
      load(row_of(*source, i), start, width, added);
      for (int64 c = 0; c < width; c++) row[c] += alpha * added[c];
    }
    for (int64 r = 0; r < rows; r++) store(out->data, out->dtype, r * cols + start, &sum[r * width], width);
  });
  return nullptr;
}
