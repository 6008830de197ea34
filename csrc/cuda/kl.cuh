// KL of the rows of earlier layers, the students, from those of the final layer, their teacher: z = E / tau.
#pragma once

#include "loss_args.cuh"

namespace m2d::cuda {

// Two rows of one text, as logits.
template <class Real>
struct StudentLogits {
  EmbeddingRow<Real> row, teacher;
  Real inverse_temperature;

  M2D_DEVICE Real taught(int d) const { return teacher(d) * inverse_temperature; }
  M2D_DEVICE Real own(int d) const { return row(d) * inverse_temperature; }
};

template <class Real>
M2D_DEVICE StudentLogits<Real> student_logits(const LossArgs<Real>& p, int layer, int text) {
  return {embedding_row(p.shape, p.pooled, p.centers, layer, text),
          embedding_row(p.shape, p.pooled, p.centers, p.shape.num_layers - 1, text),
          1 / static_cast<Real>(p.shape.kl_temperature)};
}

// softmax(z) - q of one element, from log q and log(softmax(z) / q). Where the two are close, their difference is
// formed from that of the logits.
template <class Real>
M2D_DEVICE Real probability_difference(Real log_q, Real log_ratio) {
  const float q = expf(static_cast<float>(log_q));
  return static_cast<Real>(fabsf(static_cast<float>(log_ratio)) < 0.5f
                               ? q * expm1f(static_cast<float>(log_ratio))
                               : expf(static_cast<float>(log_q + log_ratio)) - q);
}

template <class Real>
M2D_DEVICE Real kl_coefficient(const GridShape& s, int layer) {
  return static_cast<Real>(s.kl_weights[layer]) /
         (static_cast<Real>(s.kl_temperature) * static_cast<Real>(s.num_texts));
}

// The KL of one row, and what its gradient needs; by one warp.
template <class Real>
M2D_DEVICE void learn(const LossArgs<Real>& p, int layer, int text) {
  const GridShape& s = p.shape;
  const int lane = threadIdx.x % 32;
  const StudentLogits<Real> z = student_logits(p, layer, text);
  Real max = -INFINITY, teacher_max = -INFINITY, widest = 0;
#pragma unroll 4
  for (int d = lane; d < s.dim; d += 32) {
    const Real own = z.own(d), taught = z.taught(d), gap = own - taught;
    max = own > max ? own : max;
    teacher_max = taught > teacher_max ? taught : teacher_max;
    const Real size = gap < 0 ? -gap : gap;
    widest = size > widest ? size : widest;
  }
  max = warp_max(max);
  teacher_max = warp_max(teacher_max);
  // Close to the teacher, the normaliser too comes from the differences: sum exp z = exp(lse) (1 + sum q expm1(gap)).
  const bool close = warp_max(widest) < Real(0.5);
  Real sum = 0, teacher_sum = 0, gaps = 0;
#pragma unroll 4
  for (int d = lane; d < s.dim; d += 32) {
    const Real own = z.own(d), taught = z.taught(d), gap = own - taught;
    const Real e = exponential(taught, teacher_max);
    teacher_sum += e;
    gaps -= e * gap;
    sum += close ? e * static_cast<Real>(expm1f(static_cast<float>(gap))) : exponential(own, max);
  }
  teacher_sum = warp_sum(teacher_sum);
  sum = warp_sum(sum);
  const Real mean_gap = warp_sum(gaps) / teacher_sum;
  KlRow<Real> result{};
  const Real teacher_log_sum = std::log(teacher_sum);
  result.teacher_lse = teacher_max + teacher_log_sum;
  result.lse_gap = close ? log_one_plus(sum / teacher_sum)
                         : (max - teacher_max) + (std::log(sum) - teacher_log_sum);
  result.kl = kl_divergence(mean_gap, Real(0), result.lse_gap);
  if (s.normalize && s.wants_grad) {
    Real dot = 0;
#pragma unroll 4
    for (int d = lane; d < s.dim; d += 32) {
      const Real own = z.own(d), taught = z.taught(d);
      dot +=
          own * probability_difference(taught - result.teacher_lse, own - taught - result.lse_gap);
    }
    // E is u here.
    result.along =
        kl_coefficient<Real>(s, layer) * static_cast<Real>(s.kl_temperature) * warp_sum(dot);
  }
  if (lane == 0) p.kl_rows[row_of(p.pooled, layer, text)] = result;
}

// Of all rows that have one: each warp takes the next one when it has nothing else to do. Who takes which does not show
// in the results.
template <class Real>
M2D_DEVICE void learn(const LossArgs<Real>& p) {
  const GridShape& s = p.shape;
  if (!s.has_kl) return;
  const int lane = thread_index() % 32;
  const auto take = [&] { return lane == 0 ? atomicAdd(p.kl_ticket, 1) : 0; };
  int row = __shfl_sync(kAllLanes, take(), 0);
  while (row < s.num_layers * s.num_texts) {
    const int next = take();  // on its way meanwhile
    const int layer = row / s.num_texts;
    if (s.kl_weights[layer] != 0.0f) learn(p, layer, row % s.num_texts);
    row = __shfl_sync(kAllLanes, next, 0);
  }
}

// KL of every layer.
template <class Real>
M2D_DEVICE void kl_means(const LossArgs<Real>& p) {
  const GridShape& s = p.shape;
  for_each_by_last_warps(s.num_layers, [&](int layer) {
    const bool asked = s.kl_weights[layer] != 0.0f;
    const KlRow<Real>* rows = p.kl_rows + row_of(p.pooled, layer, 0);
    const Real mean =
        asked ? warp_mean<Real>(s.num_texts, [&](int i) { return rows[i].kl; }) : Real(0);
    if (threadIdx.x % 32 != 0) return;
    p.kl_means[layer] = mean;
    p.kl[layer] = asked ? static_cast<float>(mean) : NAN;
  });
}

}  // namespace m2d::cuda
