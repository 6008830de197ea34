// A row's end: what its cells left, its KL, and the Jacobian of Normalize, in one pass over its gradient.
#pragma once

#include "embeddings.h"

namespace m2d::cpu {

// What the cells of a layer leave for the gradient of one row; see math.h.
template <class Product>
struct CellTerms {
  const Product* products;  // (D,) sum_j X_c delta_j, for the used prefixes
  const double* weighted;   // sum G gamma i_k, both of the other side; element k at [k * stride]
  const double* cosines;    // sum G C
  int64_t stride;
};

template <class T>
class RowGradient {
 public:
  explicit RowGradient(const Embeddings<T>& embeddings)
      : e_(embeddings),
        p_(embeddings.params()),
        wants_grad_(p_.pooled_grad.data != nullptr),
        has_kl_(std::any_of(p_.kl_weights, p_.kl_weights + p_.num_layers,
                            [](double v) { return v != 0; })),
        teacher_(has_kl_ ? p_.num_texts * p_.dim : 0),
        teacher_lse_(has_kl_ ? p_.num_texts : 0),
        kl_(has_kl_ ? p_.num_layers * p_.num_texts : 0) {}

  bool wants_grad() const { return wants_grad_; }
  bool has_kl() const { return has_kl_; }

  // Before any row is finished: q = softmax(E[L-1] / tau) and its log-sum-exp, of texts [first, last).
  void compute_teacher(int64_t first, int64_t last) const {
    const Side<T> s = e_.texts(p_.num_layers - 1);
    const Buffer<double> p(p_.dim);
    for (int64_t n = first; n < last; ++n) {
      const MaxSum z = softmax(s, n, p.get());
      scale(p.get(), 1.0 / z.sum, p_.dim, teacher_.get() + n * p_.dim);
      teacher_lse_.get()[n] = z.max + std::log(z.sum);
    }
  }

  // Doubles that `finish` works in.
  int64_t scratch_size() const { return 2 * p_.dim; }

  // Row i of a side, in the cells of its layer or, where `cells` is nullptr, in none.
  template <class Product>
  void finish(const Side<T>& s, int64_t i, const CellTerms<Product>* cells, double* scratch) const {
    if (wants_grad_) collect_cells(s, i, cells, scratch);
    if (e_.is_pooled(s) && p_.kl_weights[s.layer] != 0) add_kl(s, i, scratch, scratch + p_.dim);
    if (wants_grad_) store(s, i, scratch);
  }

  // The KL of each text of a layer (N,).
  const double* kl(int64_t l) const { return kl_.get() + l * p_.num_texts; }

 private:
  // Factor from P to E.
  double factor(const Side<T>& s, int64_t i) const {
    return p_.normalize ? e_.full_inverse(s, i) : 1.0;
  }

  struct MaxSum {
    double max, sum;
  };

  // p = exp(E / tau - max), unnormalised.
  MaxSum softmax(const Side<T>& s, int64_t i, double* p) const {
    const double scaled = factor(s, i) / p_.kl_temperature;
    const double max = max_scaled(e_.row(s, i), scaled, p_.dim);
    return {max, softmax_numerators(e_.row(s, i), scaled, max, p_.dim, p)};
  }

  // dE = (X delta + alpha c - rho u) / f, chunk by chunk; see math.h.
  template <class Product>
  void collect_cells(const Side<T>& s, int64_t i, const CellTerms<Product>* cells,
                     double* grad) const {
    const int64_t used = cells == nullptr ? 0 : e_.used_dims(s.layer);
    const int64_t reached = used == 0 ? 0 : p_.dims[used - 1];
    std::fill(grad + reached, grad + p_.dim, 0.0);
    const double full = e_.full_inverse(s, i);
    double alpha = 0;
    double rho = 0;
    for (int64_t k = used - 1; k >= 0; --k) {
      if (e_.weight(s.layer, k) != 0) {
        alpha += e_.prefix_inverse(s, k)[i] * cells->weighted[k * cells->stride];
        rho += e_.prefix_gradient(s, k)[i] * cells->cosines[k * cells->stride];
      }
      const int64_t begin = e_.chunk_begin(k);
      combine(cells->products + begin, alpha, e_.center(s.layer) + begin, rho * full,
              e_.row(s, i) + begin, p_.normalize ? 1.0 : full, e_.chunk_size(k), grad + begin);
    }
  }

  // KL of one row, and dE += V / (N tau) (softmax(E / tau) - q).
  void add_kl(const Side<T>& s, int64_t i, double* grad, double* p) const {
    const int64_t n = s.first + i;
    const Side<T> teacher = e_.texts(p_.num_layers - 1);
    const T* q = teacher_.get() + n * p_.dim;
    const MaxSum z = softmax(s, i, p);
    const double gap = expected_gap(q, e_.row(teacher, n), factor(teacher, n) / p_.kl_temperature,
                                    e_.row(s, i), factor(s, i) / p_.kl_temperature, p_.dim);
    kl_.get()[s.layer * p_.num_texts + n] =
        kl_divergence(gap, teacher_lse_.get()[n], z.max + std::log(z.sum));
    if (wants_grad_) {
      const double coefficient =
          p_.kl_weights[s.layer] / (static_cast<double>(p_.num_texts) * p_.kl_temperature);
      add_kl_gradient(p, 1.0 / z.sum, q, coefficient, p_.dim, grad);
    }
  }

  // dP = (dE - <u, dE> u) / max(|P|, eps); where the norm is clamped E = P / eps, and only the factor remains.
  void store(const Side<T>& s, int64_t i, const double* grad) const {
    const T* x = e_.row(s, i);
    const double inverse = factor(s, i);
    const double along =
        p_.normalize && !is_clamped(inverse) ? inverse * inverse * dot(grad, x, p_.dim) : 0.0;
    store_gradient(grad, x, along, inverse, p_.dim, e_.grad_row(s, i));
  }

  const Embeddings<T>& e_;
  const LossParams<T>& p_;
  const bool wants_grad_;
  const bool has_kl_;
  const Buffer<T> teacher_;           // q (N, D)
  const Buffer<double> teacher_lse_;  // (N,)
  const Buffer<double> kl_;           // (L, N)
};

}  // namespace m2d::cpu
