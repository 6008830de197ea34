// Cosines of all prefixes of all layers' rows, and their adjoint: what the losses beside InfoNCE are made of.
//
//   C[l,k,i,j] = <a[l,i,:d_k], b[l,j,:d_k]> ia_k[i] ib_k[j]          the products telescope, see math.h
//   X_c        = sum_{k>=c} G_k ia_k ib_k,   G = dloss/dC
//   da[:, chunk c] = X_c b[:, chunk c] - ra_c a[:, chunk c],   ra_c = sum_{k>=c} ia_k^2 rowsum(G_k C_k)
//   db likewise with X_c^T, ib and colsum
//
// All of it in double: rows of a real batch are nearly parallel in the early layers, where cosines agree in most of
// their digits and the two terms of the gradient cancel. Blocks of kTile rows of either kind meet, so that what a
// thread needs beside the results does not grow with the batch.
#include <ATen/Parallel.h>

#include <algorithm>

#include "../math.h"
#include "../params.h"
#include "buffer.h"
#include "gemm.h"
#include "kernels.h"
#include "rows.h"

namespace m2d::cpu {
namespace {

constexpr int64_t kTile = 64;

// Calls body(layer, first, last) for blocks of each layer's rows, in parallel.
template <class Body>
void for_row_blocks(int64_t layers, int64_t rows, const Body& body) {
  const int64_t blocks = ceil_div(rows, kTile);
  at::parallel_for(0, layers * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kTile;
      body(i / blocks, first, std::min(rows, first + kTile));
    }
  });
}

// Rows of one side, and of each of their prefixes the inverse norm and its square, or 0 where the norm is clamped.
template <class T>
class Side {
 public:
  Side(const CosineParams<T>& p, const Rows<const T>& rows)
      : p_(p), rows_(rows), inverse_(p.num_layers * p.num_dims * rows.count), radial_(size()) {
    for_row_blocks(p.num_layers, rows.count, [&](int64_t l, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) compute_norms(l, i);
    });
  }

  int64_t count() const { return rows_.count; }
  const T* row(int64_t l, int64_t i) const {
    return rows_.data + l * rows_.layer_stride + i * p_.dim;
  }
  // (count,) of one prefix.
  const double* inverse(int64_t l, int64_t k) const { return inverse_.get() + place(l, k); }
  const double* radial(int64_t l, int64_t k) const { return radial_.get() + place(l, k); }

  // Rows [first, last) in double, up to the last prefix, `stride` apart.
  void copy(int64_t l, int64_t first, int64_t last, int64_t stride, double* out) const {
    for (int64_t i = first; i < last; ++i)
      scale(row(l, i), 1.0, width(), out + (i - first) * stride);
  }
  // The same transposed.
  void copy_columns(int64_t l, int64_t first, int64_t last, int64_t stride, double* out) const {
    for (int64_t i = first; i < last; ++i) {
      const T* x = row(l, i);
      for (int64_t d = 0; d < width(); ++d)
        out[d * stride + (i - first)] = static_cast<double>(x[d]);
    }
  }
  int64_t width() const { return p_.dims[p_.num_dims - 1]; }

 private:
  int64_t size() const { return p_.num_layers * p_.num_dims * rows_.count; }
  int64_t place(int64_t l, int64_t k) const { return (l * p_.num_dims + k) * rows_.count; }

  void compute_norms(int64_t l, int64_t i) {
    double squared = 0;
    for (int64_t k = 0; k < p_.num_dims; ++k) {
      const int64_t begin = chunk_begin(p_, k);
      squared += sum_of_squares(row(l, i) + begin, p_.dims[k] - begin);
      const double inverse = clamped_inverse_norm(squared);
      inverse_.get()[place(l, k) + i] = inverse;
      radial_.get()[place(l, k) + i] = is_clamped(inverse) ? 0.0 : inverse * inverse;
    }
  }

  const CosineParams<T>& p_;
  const Rows<const T> rows_;
  const Buffer<double> inverse_, radial_;  // (L, K, count)
};

// x += g factor factors, and the sum of g c.
M2D_MULTIVERSION double weigh_along(const double* __restrict g, const double* __restrict c,
                                    double factor, const double* __restrict factors, int64_t n,
                                    double* __restrict x) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    x[j] += g[j] * factor * factors[j];
    sum += g[j] * c[j];
  }
  return sum;
}

// x += g factor factors, sums += g c.
M2D_MULTIVERSION void weigh_across(const double* __restrict g, const double* __restrict c,
                                   double factor, const double* __restrict factors, int64_t n,
                                   double* __restrict x, double* __restrict sums) {
  for (int64_t j = 0; j < n; ++j) {
    x[j] += g[j] * factor * factors[j];
    sums[j] += g[j] * c[j];
  }
}

M2D_MULTIVERSION void multiply(const double* __restrict x, double factor,
                               const double* __restrict factors, int64_t n,
                               double* __restrict out) {
  for (int64_t j = 0; j < n; ++j) out[j] = factor * factors[j] * x[j];
}

// out = along x + across y
template <class T>
M2D_MULTIVERSION void mix(const T* __restrict x, double along, const double* __restrict y,
                          double across, int64_t n, T* __restrict out) {
  for (int64_t d = 0; d < n; ++d)
    out[d] = static_cast<T>(across * y[d] + along * static_cast<double>(x[d]));
}

// The adjoint of one side's rows. `kTransposed`: they are the second index of the cosines.
template <class T, bool kTransposed>
class Adjoint {
 public:
  Adjoint(const CosineParams<T>& p, const Side<T>& rows, const Side<T>& others,
          const CosineGrads<T>& grads, const Rows<T>& out)
      : p_(p), rows_(rows), others_(others), grads_(grads), out_(out) {}

  void run() const {
    for_row_blocks(p_.num_layers, rows_.count(),
                   [&](int64_t l, int64_t first, int64_t last) { block(l, first, last); });
  }

 private:
  void block(int64_t l, int64_t first, int64_t last) const {
    const int64_t width = rows_.width();
    const Buffer<double> others(kTile * width + kGemmPanel);
    const Buffer<double> x(kTile * kTile);
    const Buffer<double> products((last - first) * width);
    const Buffer<double> along(p_.num_dims * kTile);
    std::fill_n(along.get(), p_.num_dims * kTile, 0.0);
    std::fill_n(products.get(), (last - first) * width, 0.0);
    for (int64_t o = 0; o < others_.count(); o += kTile) {
      const int64_t end = std::min(others_.count(), o + kTile);
      others_.copy(l, o, end, width, others.get());
      std::fill_n(x.get(), kTile * kTile, 0.0);
      for (int64_t k = p_.num_dims - 1; k >= 0; --k) {
        weigh(l, k, first, last, o, end, x.get(), along.get() + k * kTile);
        const int64_t begin = chunk_begin(p_, k);
        gemm<double>({last - first, p_.dims[k] - begin, end - o, x.get(), kTransposed ? 1 : kTile,
                      kTransposed ? kTile : 1, others.get() + begin, width, products.get() + begin,
                      width, true});
      }
    }
    for (int64_t i = first; i < last; ++i)
      store(l, i, products.get() + (i - first) * width, along.get() + (i - first));
  }

  // Adds G_k ia_k ib_k of a block to x, whose rows are the first index of the cosines, and G_k C_k to the rows' sums.
  void weigh(int64_t l, int64_t k, int64_t first, int64_t last, int64_t o, int64_t end, double* x,
             double* sums) const {
    const double* inverse = rows_.inverse(l, k);
    const double* inverse_other = others_.inverse(l, k);
    if constexpr (kTransposed) {
      for (int64_t j = o; j < end; ++j) {
        const int64_t at = ((l * p_.num_dims + k) * others_.count() + j) * rows_.count() + first;
        weigh_across(grads_.grad + at, grads_.cosines + at, inverse_other[j], inverse + first,
                     last - first, x + (j - o) * kTile, sums);
      }
    } else {
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = ((l * p_.num_dims + k) * rows_.count() + i) * others_.count() + o;
        sums[i - first] += weigh_along(grads_.grad + at, grads_.cosines + at, inverse[i],
                                       inverse_other + o, end - o, x + (i - first) * kTile);
      }
    }
  }

  void store(int64_t l, int64_t i, const double* products, const double* along) const {
    T* out = out_.data + l * out_.layer_stride + i * p_.dim;
    double radial = 0;
    std::fill(out + rows_.width(), out + p_.dim, T(0));
    for (int64_t k = p_.num_dims - 1; k >= 0; --k) {
      radial += rows_.radial(l, k)[i] * along[k * kTile];
      const int64_t begin = chunk_begin(p_, k);
      mix(rows_.row(l, i) + begin, -radial, products + begin, 1.0, p_.dims[k] - begin, out + begin);
    }
  }

  const CosineParams<T>& p_;
  const Side<T>&rows_, &others_;
  const CosineGrads<T>& grads_;
  const Rows<T>& out_;
};

template <class T>
void block_cosines(const CosineParams<T>& p, double* cosines) {
  const Side<T> a(p, p.a), b(p, p.b);
  const int64_t width = a.width();
  for_row_blocks(p.num_layers, a.count(), [&](int64_t l, int64_t first, int64_t last) {
    const Buffer<double> rows((last - first) * width);
    const Buffer<double> columns(width * kTile + kGemmPanel);
    const Buffer<double> u(kTile * kTile);
    a.copy(l, first, last, width, rows.get());
    std::fill_n(columns.get(), width * kTile + kGemmPanel, 0.0);
    for (int64_t o = 0; o < b.count(); o += kTile) {
      const int64_t end = std::min(b.count(), o + kTile);
      b.copy_columns(l, o, end, kTile, columns.get());
      for (int64_t k = 0; k < p.num_dims; ++k) {
        const int64_t begin = chunk_begin(p, k);
        gemm<double>({last - first, end - o, p.dims[k] - begin, rows.get() + begin, width, 1,
                      columns.get() + begin * kTile, kTile, u.get(), kTile, k > 0});
        for (int64_t i = first; i < last; ++i) {
          multiply(u.get() + (i - first) * kTile, a.inverse(l, k)[i], b.inverse(l, k) + o, end - o,
                   cosines + ((l * p.num_dims + k) * a.count() + i) * b.count() + o);
        }
      }
    }
  });
}

template <class T>
void pair_cosines(const CosineParams<T>& p, double* cosines) {
  const Side<T> a(p, p.a), b(p, p.b);
  for_row_blocks(p.num_layers, a.count(), [&](int64_t l, int64_t first, int64_t last) {
    const Buffer<double> row(p.dim);
    for (int64_t i = first; i < last; ++i) {
      a.copy(l, i, i + 1, p.dim, row.get());
      double product = 0;
      for (int64_t k = 0; k < p.num_dims; ++k) {
        const int64_t begin = chunk_begin(p, k);
        product += dot(row.get() + begin, b.row(l, i) + begin, p.dims[k] - begin);
        cosines[(l * p.num_dims + k) * a.count() + i] =
            product * a.inverse(l, k)[i] * b.inverse(l, k)[i];
      }
    }
  });
}

template <class T>
void pair_adjoint(const CosineParams<T>& p, const Side<T>& rows, const Side<T>& others,
                  const CosineGrads<T>& grads, const Rows<T>& out) {
  for_row_blocks(p.num_layers, rows.count(), [&](int64_t l, int64_t first, int64_t last) {
    const Buffer<double> other(p.dim);
    for (int64_t i = first; i < last; ++i) {
      T* grad = out.data + l * out.layer_stride + i * p.dim;
      others.copy(l, i, i + 1, p.dim, other.get());
      std::fill(grad + rows.width(), grad + p.dim, T(0));
      double across = 0, radial = 0;
      for (int64_t k = p.num_dims - 1; k >= 0; --k) {
        const int64_t at = (l * p.num_dims + k) * rows.count() + i;
        across += grads.grad[at] * rows.inverse(l, k)[i] * others.inverse(l, k)[i];
        radial += grads.grad[at] * grads.cosines[at] * rows.radial(l, k)[i];
        const int64_t begin = chunk_begin(p, k);
        mix(rows.row(l, i) + begin, -radial, other.get() + begin, across, p.dims[k] - begin,
            grad + begin);
      }
    }
  });
}

}  // namespace

template <class T>
void nested_cosines(const CosineParams<T>& p, double* cosines) {
  p.pairs ? pair_cosines(p, cosines) : block_cosines(p, cosines);
}

template <class T>
void nested_cosines_backward(const CosineParams<T>& p, const CosineGrads<T>& grads) {
  const Side<T> a(p, p.a), b(p, p.b);
  if (p.pairs) {
    if (grads.a.data != nullptr) pair_adjoint(p, a, b, grads, grads.a);
    if (grads.b.data != nullptr) pair_adjoint(p, b, a, grads, grads.b);
    return;
  }
  if (grads.a.data != nullptr) Adjoint<T, false>(p, a, b, grads, grads.a).run();
  if (grads.b.data != nullptr) Adjoint<T, true>(p, b, a, grads, grads.b).run();
}

#define M2D_INSTANTIATE(T)                                       \
  template void nested_cosines(const CosineParams<T>&, double*); \
  template void nested_cosines_backward(const CosineParams<T>&, const CosineGrads<T>&);
M2D_INSTANTIATE(float)
M2D_INSTANTIATE(double)
#undef M2D_INSTANTIATE

}  // namespace m2d::cpu
