// The loss over pooled rows, all layers and dims at once. The formulas are those of math.h.
//
// Each layer goes through these steps, of which all but `center` are split into tasks (pipeline.h):
//
//   read        a few texts' rows, pooled where they are not there yet, and the inverse norms of their prefixes
//   center      the layer's center
//   teacher     the final layer's softmax: it leads
//   then for a part of its anchors after the other, where all at once would take much memory:
//     rows        delta, of the candidates as it is and transposed
//     anchors     U, row softmaxes, X, and the anchors' finished gradient
//     candidates  the candidates' finished gradient
//   outside     rows that are in no cell
//   write       the hidden states' gradients, where they are wanted at once
//
// and at the end cells, KLs and the loss are reduced in a fixed order.
//
// The products are formed of centered rows in single precision, all else in double: rows of a real batch are nearly
// parallel in the early layers, where cosines agree in most of their digits and X E - r E cancels.
//
// Each output element has one owner, and every sum an order that depends on the sizes of the problem
// alone, not on the number of threads. X is kept for a few layers, or parts of their anchors, at a time: memory grows
// with B + M and not with L * B * M.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../math.h"
#include "embeddings.h"
#include "gemm.h"
#include "kernels.h"
#include "pipeline.h"
#include "row_gradient.h"
#include "rows.h"

namespace m2d::cpu {
namespace {

// Row length in memory: whole cache lines, an odd number of them, so that rows do not meet in few cache sets.
int64_t padded(int64_t n) {
  constexpr int64_t kLine = 16;
  return (ceil_div(n, kLine) | 1) * kLine;
}

// Rows [first, last) of the index-th task of `grain` rows.
struct Range {
  int64_t first, last;

  static int64_t count(int64_t rows, int64_t grain) { return ceil_div(rows, grain); }
  Range(int64_t index, int64_t rows, int64_t grain)
      : first(index * grain), last(std::min(rows, first + grain)) {}
};

// What a layer's rows do to each other. Rows come and go in T; they are multiplied in Product.
template <class T, class Product>
class Cells {
 public:
  Cells(const Embeddings<T>& embeddings, const RowGradient<T>& rows)
      : e_(embeddings),
        p_(embeddings.params()),
        rows_(rows),
        tile_(std::clamp(p_.num_anchors / kTilesPerBatch, kMinTile, kMaxTile)),
        delta_stride_(padded(p_.dim)),
        column_stride_(padded(p_.num_candidates)),
        num_slots_(choose_slots()),
        part_anchors_(choose_part()),
        part_tiles_(ceil_div(part_anchors_, tile_)),
        anchor_delta_(num_slots_ * part_anchors_ * delta_stride_ + kGemmPanel),
        anchor_along_(num_slots_ * p_.num_dims * part_anchors_),
        anchor_gamma_(num_slots_ * part_anchors_),
        candidate_delta_(grad_only(num_slots_ * p_.num_candidates * delta_stride_ + kGemmPanel)),
        candidate_products_(
            kProductsApart ? grad_only(num_slots_ * p_.num_candidates * delta_stride_) : 0),
        candidate_along_(num_slots_ * p_.num_dims * p_.num_candidates),
        candidate_gamma_(num_slots_ * p_.num_candidates),
        panels_(num_slots_ * num_panels() * panel_size()),
        x_(grad_only(num_slots_ * p_.num_dims * part_anchors_ * column_stride_)),
        tile_sums_(grad_only(num_slots_ * part_tiles_ * 2 * sums_size())),
        sums_(grad_only(num_slots_ * 2 * sums_size())),
        cross_entropy_(p_.num_layers * p_.num_dims * p_.num_anchors) {}

  int64_t num_slots() const { return num_slots_; }
  int64_t num_parts() const { return ceil_div(p_.num_anchors, part_anchors_); }

  // Of a layer with cells, in its slot w.
  struct Part {
    int64_t layer, w;
    int64_t first, num_anchors;
  };
  Part part(int64_t layer, int64_t w, int64_t index) const {
    const Range anchors(index, p_.num_anchors, part_anchors_);
    return {layer, w, anchors.first, anchors.last - anchors.first};
  }

  // Three steps of a part, each of so many tasks.
  int64_t num_row_tasks(const Part& part) const {
    return num_anchor_row_tasks(part) +
           (part.first == 0 ? Range::count(p_.num_candidates, kRowGrain) : 0);
  }
  int64_t num_anchor_tasks(const Part& part) const { return Range::count(part.num_anchors, tile_); }
  int64_t num_candidate_tasks() const { return Range::count(p_.num_candidates, tile_); }

  void rows(const Part& part, int64_t task) const {
    const int64_t of_candidates = task - num_anchor_row_tasks(part);
    if (of_candidates < 0) {
      center_anchors(part, Range(task, part.num_anchors, kRowGrain));
    } else {
      center_candidates(part, Range(of_candidates, p_.num_candidates, kRowGrain));
    }
  }
  void anchors(const Part& part, int64_t task) const {
    anchors(part, Range(task, part.num_anchors, tile_));
  }
  void candidates(const Part& part, int64_t task) const {
    candidates(part, Range(task, p_.num_candidates, tile_));
  }

  // The cross-entropy of each anchor (B,); left as it was where the weight is 0.
  const double* cross_entropy(int64_t l, int64_t k) const {
    return cross_entropy_.get() + (l * p_.num_dims + k) * p_.num_anchors;
  }

 private:
  static constexpr int64_t kMostBytes = 12 << 20;  // working set of all slots
  static constexpr int64_t kTasksPerThread = 4;    // slots are added until there are as many
  static constexpr int64_t kMinTile = 32;          // rows of one task
  static constexpr int64_t kMaxTile = 128;
  static constexpr int64_t kTilesPerBatch = 8;      // tiles grow from B = 256 on
  static constexpr int64_t kRowGrain = kGemmPanel;  // a task of candidates fills a panel

  int64_t num_anchor_row_tasks(const Part& part) const {
    return Range::count(part.num_anchors, kRowGrain);
  }

  // Where products of rows go until they are finished: the rows' own gradients, where those are as wide.
  struct Products {
    Product* rows;
    int64_t stride;
  };
  static constexpr bool kProductsApart = !std::is_same_v<T, Product>;

  // -- sizes and places --

  Products place_products(const Side<T>& s, int64_t first, Product* own) const {
    if constexpr (kProductsApart) {
      return {own, delta_stride_};
    } else {
      return {rows_.wants_grad() ? e_.grad_row(s, first) : nullptr, p_.dim};
    }
  }
  Product* candidate_products(int64_t w, int64_t j) const {
    return candidate_products_.get() + (w * p_.num_candidates + j) * delta_stride_;
  }

  int64_t grad_only(int64_t size) const { return rows_.wants_grad() ? size : 0; }
  int64_t sums_size() const { return p_.num_dims * p_.num_candidates; }
  int64_t x_bytes(int64_t anchors) const {
    return p_.num_dims * anchors * column_stride_ * static_cast<int64_t>(sizeof(Product));
  }

  int64_t choose_slots() const {
    const int64_t delta_rows = p_.num_anchors + p_.num_candidates;
    const int64_t delta = delta_rows * delta_stride_ + num_panels() * panel_size();
    const int64_t bytes = x_bytes(p_.num_anchors) + delta * static_cast<int64_t>(sizeof(Product));
    const int64_t tiles = ceil_div(p_.num_anchors, tile_);
    const int64_t wanted = ceil_div(kTasksPerThread * at::get_num_threads(), tiles);
    return std::min({wanted, p_.num_layers, std::max<int64_t>(1, kMostBytes / bytes)});
  }

  int64_t choose_part() const {
    const int64_t tiles = kMostBytes / x_bytes(tile_);
    return std::min(p_.num_anchors, std::max<int64_t>(1, tiles) * tile_);
  }

  Product* anchor_delta(int64_t w, int64_t i) const {
    return anchor_delta_.get() + (w * part_anchors_ + i) * delta_stride_;
  }
  Product* candidate_delta(int64_t w, int64_t j) const {
    return candidate_delta_.get() + (w * p_.num_candidates + j) * delta_stride_;
  }
  int64_t num_panels() const { return Range::count(p_.num_candidates, kGemmPanel); }
  int64_t panel_size() const { return p_.dim * kGemmPanel; }
  Product* panel(int64_t w, int64_t index) const {
    return panels_.get() + (w * num_panels() + index) * panel_size();
  }
  double* anchor_along(int64_t w, int64_t k) const {
    return anchor_along_.get() + (w * p_.num_dims + k) * part_anchors_;
  }
  double* anchor_gamma(int64_t w) const { return anchor_gamma_.get() + w * part_anchors_; }
  double* candidate_along(int64_t w, int64_t k) const {
    return candidate_along_.get() + (w * p_.num_dims + k) * p_.num_candidates;
  }
  double* candidate_gamma(int64_t w) const {
    return candidate_gamma_.get() + w * p_.num_candidates;
  }
  Product* x(int64_t w, int64_t k, int64_t i) const {
    return x_.get() + ((w * p_.num_dims + k) * part_anchors_ + i) * column_stride_;
  }
  // (2, K, M): G times the anchors' inverse norms, and G C, summed over the anchors of a tile, or over all.
  double* tile_sums(int64_t w, int64_t tile) const {
    return tile_sums_.get() + (w * part_tiles_ + tile) * 2 * sums_size();
  }
  double* sums(int64_t w) const { return sums_.get() + w * 2 * sums_size(); }

  // -- center --

  void center_anchors(const Part& part, const Range& range) const {
    const Side<T> s = e_.anchors(part.layer);
    for (int64_t i = range.first; i < range.last; ++i) {
      anchor_gamma(part.w)[i] = center(s, part.first + i, anchor_delta(part.w, i),
                                       anchor_along(part.w, 0) + i, part_anchors_);
    }
  }

  void center_candidates(const Part& part, const Range& range) const {
    const auto [first, last] = range;
    const int64_t w = part.w;
    const Side<T> s = e_.candidates(part.layer);
    const Buffer<Product> unkept(rows_.wants_grad() ? 0 : kRowGrain * delta_stride_);
    Product* delta = rows_.wants_grad() ? candidate_delta(w, first) : unkept.get();
    for (int64_t j = first; j < last; ++j) {
      candidate_gamma(w)[j] = center(s, j, delta + (j - first) * delta_stride_,
                                     candidate_along(w, 0) + j, p_.num_candidates);
    }
    Product* columns = panel(w, first / kGemmPanel);
    const int64_t width = p_.dims[e_.used_dims(s.layer) - 1];
    if (last - first < kGemmPanel) std::fill_n(columns, width * kGemmPanel, Product(0));
    transpose(delta, delta_stride_, last - first, width, kGemmPanel, columns);
  }

  // Row i: writes delta, and <c, u> of prefix k at along[k * stride]; returns gamma.
  double center(const Side<T>& s, int64_t i, Product* delta, double* along, int64_t stride) const {
    const double inverse = e_.full_inverse(s, i);
    const T* x = e_.row(s, i);
    double sum = 0;
    double gamma = 1;
    for (int64_t k = 0; k < e_.used_dims(s.layer); ++k) {
      const int64_t begin = e_.chunk_begin(k);
      sum += inverse * dot(e_.center(s.layer) + begin, x + begin, e_.chunk_size(k));
      along[k * stride] = sum;
      if (2 * sum < e_.center_squared(s.layer, k)) gamma = 0;
    }
    const int64_t width = p_.dims[e_.used_dims(s.layer) - 1];
    center_row(x, inverse, e_.center(s.layer), gamma, width, delta);
    std::fill(delta + width, delta + delta_stride_, Product(0));
    return gamma;
  }

  // -- anchors --

  void anchors(const Part& part, const Range& range) const {
    const auto [first, last] = range;
    const int64_t l = part.layer;
    const int64_t w = part.w;
    const int64_t rows = last - first;
    const Buffer<Product> u(rows * column_stride_);
    const Buffer<double> row_sums(grad_only(2 * p_.num_dims * rows));
    const Buffer<double> scratch(std::max(3 * p_.num_candidates, rows_.scratch_size()));
    if (rows_.wants_grad()) std::fill_n(tile_sums(w, first / tile_), 2 * sums_size(), 0.0);
    for (int64_t k = 0; k < e_.used_dims(l); ++k) {
      gemm<Product>({rows, p_.num_candidates, e_.chunk_size(k),
                     anchor_delta(w, first) + e_.chunk_begin(k), delta_stride_, 1,
                     panel(w, 0) + e_.chunk_begin(k) * kGemmPanel, kGemmPanel, u.get(),
                     column_stride_, k > 0, panel_size()});
      if (e_.weight(l, k) != 0) {
        for (int64_t i = 0; i < rows; ++i) {
          anchor_cell(part, k, first + i, u.get() + i * column_stride_,
                      row_sums.get() + k * rows + i, p_.num_dims * rows, scratch.get());
        }
      } else if (rows_.wants_grad()) {
        std::fill_n(x(w, k, first), rows * column_stride_, Product(0));
      }
    }
    suffix_sum(w, e_.used_dims(l), first, rows);
    const Buffer<Product> own(kProductsApart ? grad_only(rows * delta_stride_) : 0);
    const Products products = place_products(e_.anchors(l), part.first + first, own.get());
    anchor_products(w, l, first, rows, products);
    for (int64_t i = 0; i < rows; ++i) {
      const CellTerms<Product> terms{products.rows + i * products.stride, row_sums.get() + i,
                                     row_sums.get() + p_.num_dims * rows + i, rows};
      rows_.finish(e_.anchors(l), part.first + first + i, &terms, scratch.get());
    }
  }

  // Cross-entropy of anchor i of the part at prefix k, and its row of X. `products` holds <delta_i, delta_j>.
  void anchor_cell(const Part& part, int64_t k, int64_t i, const Product* products,
                   double* row_sums, int64_t cosines_offset, double* scratch) const {
    const int64_t l = part.layer;
    const int64_t w = part.w;
    const int64_t m = p_.num_candidates;
    const int64_t anchor = part.first + i;
    const int64_t target = p_.target_offset + anchor;
    const double ia = e_.prefix_inverse(e_.anchors(l), k)[anchor];
    const double* ib = e_.prefix_inverse(e_.candidates(l), k);
    double* s = scratch;
    double* e = scratch + m;
    double* hardened = scratch + 2 * m;
    const double gamma = anchor_gamma(w)[i];
    const double along = anchor_along(w, k)[i] - gamma * e_.center_squared(l, k);
    double max = logits(products, gamma, along, candidate_gamma(w), candidate_along(w, k), ib,
                        p_.scale * ia, m, s);
    const bool is_hard = p_.hardness != 0 || p_.own_hardness != 0;
    if (is_hard) max = harden(s, target, hardened);
    exponentials<T>(is_hard ? hardened : s, max, m, e);
    const double at_target = e[target];
    e[target] = 0;
    const double others = sum(e, m);
    cross_entropy_.get()[(l * p_.num_dims + k) * p_.num_anchors + anchor] =
        m2d::cross_entropy(others, at_target, max - s[target]);
    if (!rows_.wants_grad()) return;
    // The probability of the target is never formed as 1 - p: in a saturated row that is all rounding error.
    e[target] = -others;
    const double coefficient =
        e_.weight(l, k) * p_.scale / static_cast<double>(p_.num_anchors) / (others + at_target);
    double* weighted = tile_sums(w, i / tile_) + k * m;
    const GradientSums of_row =
        gradient_row(e, s, ia, gamma, ib, candidate_gamma(w), coefficient, 1.0 / p_.scale, m,
                     x(w, k, i), weighted, weighted + sums_size());
    row_sums[0] = of_row.weighted;
    row_sums[cosines_offset] = of_row.cosines;
  }

  // Z of an anchor from its S; returns max Z.
  double harden(const double* s, int64_t target, double* z) const {
    scale(s, 1.0 + p_.hardness / p_.scale, p_.num_candidates, z);
    const double own_factor = 1.0 + p_.own_hardness / p_.scale;
    for (int64_t j = target; j < p_.num_candidates; j += p_.column_size) {
      z[j] = (j == target ? 1.0 : own_factor) * s[j];
    }
    return max_scaled(z, 1.0, p_.num_candidates);
  }

  // X_c = sum_{k >= c} X_k, in place.
  void suffix_sum(int64_t w, int64_t used, int64_t first, int64_t rows) const {
    if (!rows_.wants_grad()) return;
    for (int64_t k = used - 2; k >= 0; --k) {
      for (int64_t i = first; i < first + rows; ++i)
        add(x(w, k + 1, i), p_.num_candidates, x(w, k, i));
    }
  }

  // X delta, chunk by chunk.
  void anchor_products(int64_t w, int64_t l, int64_t first, int64_t rows,
                       const Products& out) const {
    if (!rows_.wants_grad()) return;
    for (int64_t k = 0; k < e_.used_dims(l); ++k) {
      const int64_t begin = e_.chunk_begin(k);
      gemm<Product>({rows, e_.chunk_size(k), p_.num_candidates, x(w, k, first), column_stride_, 1,
                     candidate_delta(w, 0) + begin, delta_stride_, out.rows + begin, out.stride,
                     false});
    }
  }

  // -- candidates --

  void candidates(const Part& part, const Range& range) const {
    const auto [first, last] = range;
    const int64_t w = part.w;
    const Side<T> s = e_.candidates(part.layer);
    const Products products = place_products(s, first, candidate_products(w, first));
    if (rows_.wants_grad()) collect_tiles(part, range, products);
    if (part.first + part.num_anchors < p_.num_anchors) return;
    const Buffer<double> scratch(rows_.scratch_size());
    for (int64_t j = first; j < last; ++j) {
      const CellTerms<Product> terms{products.rows + (j - first) * products.stride, sums(w) + j,
                                     sums(w) + sums_size() + j, p_.num_candidates};
      rows_.finish(s, j, &terms, scratch.get());
    }
  }

  // X^T delta, chunk by chunk, and the sums of all tiles.
  void collect_tiles(const Part& part, const Range& range, const Products& out) const {
    const auto [first, last] = range;
    const int64_t w = part.w;
    const int64_t m = p_.num_candidates;
    for (int64_t k = 0; k < e_.used_dims(part.layer); ++k) {
      const int64_t begin = e_.chunk_begin(k);
      gemm<Product>({last - first, e_.chunk_size(k), part.num_anchors, x(w, k, 0) + first, 1,
                     column_stride_, anchor_delta(w, 0) + begin, delta_stride_, out.rows + begin,
                     out.stride, part.first > 0});
    }
    for (int64_t row = 0; row < 2 * p_.num_dims; ++row) {
      double* total = sums(w) + row * m;
      if (part.first == 0) std::fill(total + first, total + last, 0.0);
      for (int64_t tile = 0; tile < num_anchor_tasks(part); ++tile)
        add(tile_sums(w, tile) + row * m + first, last - first, total + first);
    }
  }

  const Embeddings<T>& e_;
  const LossParams<T>& p_;
  const RowGradient<T>& rows_;
  const int64_t tile_;
  const int64_t delta_stride_, column_stride_;
  const int64_t num_slots_, part_anchors_, part_tiles_;  // W, A
  const Buffer<Product> anchor_delta_;                   // (W, A, delta_stride)
  const Buffer<double> anchor_along_;                    // <c, u_k> (W, K, A)
  const Buffer<double> anchor_gamma_;                    // (W, A)
  const Buffer<Product> candidate_delta_;                // (W, M, delta_stride)
  const Buffer<Product> candidate_products_;  // (W, M, delta_stride), kProductsApart only
  const Buffer<double> candidate_along_;      // <c, u_k> (W, K, M)
  const Buffer<double> candidate_gamma_;      // (W, M)
  const Buffer<Product> panels_;              // delta^T (W, panels, D, kGemmPanel)
  const Buffer<Product> x_;                   // suffix sums of X (W, K, A, column_stride)
  const Buffer<double> tile_sums_;            // (W, tiles, 2, K, M)
  const Buffer<double> sums_;                 // (W, 2, K, M)
  const Buffer<double> cross_entropy_;        // (L, K, B)
};

double mean(const double* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total / static_cast<double>(n);
}

template <class T, class Product>
void reduce(const LossParams<T>& p, const Cells<T, Product>& cells, const RowGradient<T>& rows) {
  constexpr double kNotComputed = std::numeric_limits<double>::quiet_NaN();
  double loss = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    for (int64_t k = 0; k < p.num_dims; ++k) {
      const double w = p.weights[l * p.num_dims + k];
      const double ce = w == 0 ? kNotComputed : mean(cells.cross_entropy(l, k), p.num_anchors);
      p.cells[l * p.num_dims + k] = static_cast<T>(ce);
      if (w != 0) loss += w * ce;
    }
    const double v = p.kl_weights[l];
    const double kl = v == 0 ? kNotComputed : mean(rows.kl(l), p.num_texts);
    p.kl[l] = static_cast<T>(kl);
    if (v != 0) loss += v * kl;
  }
  *p.loss = static_cast<T>(loss);
}

// A layer's steps; see the head of this file.
template <class T, class Product>
class Steps {
 public:
  Steps(const Embeddings<T>& embeddings, const RowGradient<T>& rows, const Cells<T, Product>& cells,
        const TokenSide& tokens)
      : e_(embeddings), p_(embeddings.params()), rows_(rows), cells_(cells), tokens_(tokens) {}

  void run() const {
    Pipeline pipeline;
    for (int64_t i = 0; i < p_.num_layers; ++i)
      pipeline.layers.push_back((i + p_.num_layers - 1) % p_.num_layers);
    pipeline.num_steps = write_step() + 1;
    if (tokens_.read) pipeline.num_reading_steps = kCenter;
    pipeline.num_writing_steps = 1;
    pipeline.num_leading_steps = kParts;
    pipeline.num_slots = cells_.num_slots();
    pipeline.num_tasks = [this](int64_t layer, int64_t step) { return num_tasks(layer, step); };
    pipeline.run_task = [this](const Task& task) { run_task(task); };
    if (tokens_.read_and_write) {
      pipeline.run_both = [this](const Task& reading, const Task& writing) {
        run_both(reading, writing);
      };
    }
    pipeline.run();
  }

 private:
  using Task = Pipeline::Task;
  enum Step : int64_t { kRead, kCenter, kTeacher, kParts };
  enum PartStep : int64_t { kRows, kAnchors, kCandidates, kPartSteps };
  static constexpr int64_t kTexts = 16;  // of a task

  int64_t outside_step() const { return kParts + kPartSteps * cells_.num_parts(); }
  int64_t write_step() const { return outside_step() + 1; }
  bool has_cells(int64_t layer) const { return e_.used_dims(layer) > 0; }
  typename Cells<T, Product>::Part part(int64_t layer, int64_t slot, int64_t step) const {
    return cells_.part(layer, slot, (step - kParts) / kPartSteps);
  }

  int64_t num_tasks(int64_t layer, int64_t step) const {
    const int64_t texts = Range::count(p_.num_texts, kTexts);
    if (step == kRead) return texts + num_gathered_tasks(layer);
    if (step == kCenter) return has_cells(layer) ? 1 : 0;
    if (step == kTeacher) return rows_.has_kl() && layer == p_.num_layers - 1 ? texts : 0;
    if (step == outside_step()) return num_outside_tasks(layer);
    if (step == write_step()) return tokens_.write ? texts : 0;
    if (!has_cells(layer)) return 0;
    const PartStep part_step = static_cast<PartStep>((step - kParts) % kPartSteps);
    if (part_step == kRows) return cells_.num_row_tasks(part(layer, 0, step));
    if (part_step == kAnchors) return cells_.num_anchor_tasks(part(layer, 0, step));
    return cells_.num_candidate_tasks();
  }

  int64_t num_gathered_tasks(int64_t layer) const {
    return Range::count(e_.gathered(layer).count, kTexts);
  }

  // Rows that meet no other: own and gathered ones of a layer without cells, and else, where there are gathered ones,
  // own candidates.
  int64_t num_outside_tasks(int64_t layer) const {
    if (has_cells(layer)) return p_.gathered ? Range::count(p_.num_texts, kTexts) : 0;
    return Range::count(p_.num_texts, kTexts) + num_gathered_tasks(layer);
  }

  void run_task(const Task& task) const {
    const auto [layer, step, slot, index] = task;
    if (step == kRead) return read(layer, index);
    if (step == kCenter) return e_.compute_center(layer);
    const RowRange texts = texts_of(task);
    if (step == kTeacher) return rows_.compute_teacher(texts.first, texts.last);
    if (step == outside_step()) return finish_outside(layer, index);
    if (step == write_step()) return tokens_.write(texts);
    const PartStep part_step = static_cast<PartStep>((step - kParts) % kPartSteps);
    if (part_step == kRows) return cells_.rows(part(layer, slot, step), index);
    if (part_step == kAnchors) return cells_.anchors(part(layer, slot, step), index);
    cells_.candidates(part(layer, slot, step), index);
  }

  RowRange texts_of(const Task& task) const {
    const Range texts(task.index, p_.num_texts, kTexts);
    return {task.layer, texts.first, texts.last};
  }

  // Hidden states are read for losses without gathered rows alone: each reading task is one of texts.
  void run_both(const Task& reading, const Task& writing) const {
    const RowRange texts = texts_of(reading);
    tokens_.read_and_write(texts, texts_of(writing));
    compute_norms(texts);
  }

  void read(int64_t layer, int64_t index) const {
    const int64_t of_gathered = index - Range::count(p_.num_texts, kTexts);
    if (of_gathered >= 0) {
      const Side<T> s = e_.gathered(layer);
      const Range range(of_gathered, s.count, kTexts);
      return e_.compute_norms(s.part(range.first, range.last));
    }
    const RowRange texts = texts_of({layer, kRead, 0, index});
    if (tokens_.read) tokens_.read(texts);
    compute_norms(texts);
  }

  void compute_norms(const RowRange& texts) const {
    e_.compute_norms(e_.texts(texts.layer).part(texts.first, texts.last));
  }

  void finish_outside(int64_t layer, int64_t index) const {
    const Buffer<double> scratch(rows_.scratch_size());
    const int64_t of_gathered = index - Range::count(p_.num_texts, kTexts);
    const Side<T> s = of_gathered < 0 ? e_.texts(layer) : e_.gathered(layer);
    const Range range(of_gathered < 0 ? index : of_gathered, s.count, kTexts);
    const int64_t inside = has_cells(layer) ? p_.num_anchors : 0;
    for (int64_t n = std::max(range.first, inside); n < range.last; ++n)
      rows_.template finish<T>(s, n, nullptr, scratch.get());
  }

  const Embeddings<T>& e_;
  const LossParams<T>& p_;
  const RowGradient<T>& rows_;
  const Cells<T, Product>& cells_;
  const TokenSide& tokens_;
};

template <class T, class Product>
void run(const LossParams<T>& params, const TokenSide& tokens) {
  const Embeddings<T> embeddings(params);
  const RowGradient<T> rows(embeddings);
  const Cells<T, Product> cells(embeddings, rows);
  Steps<T, Product>(embeddings, rows, cells, tokens).run();
  reduce(params, cells, rows);
}

}  // namespace

// A prefix of very few dimensions can be thousands of times shorter than its row, and magnifies each rounding.
constexpr int64_t kFewDims = 8;

template <>
void loss(const LossParams<float>& params, const TokenSide& tokens) {
  params.dims[0] < kFewDims ? run<float, double>(params, tokens)
                            : run<float, float>(params, tokens);
}

template <>
void loss(const LossParams<double>& params, const TokenSide& tokens) {
  run<double, double>(params, tokens);
}

}  // namespace m2d::cpu
