// The loss over pooled rows, all layers and dims at once. The formulas are those of math.h.
//
//   1. Embeddings   inverse norms of every row and prefix, a center for each layer
//   2. RowGradient  the teacher's softmax
//   3. Cells        for a few layers at a time, or for a part of one layer's anchors:
//        center      delta, as it is and transposed                           tasks of 16 rows
//        anchors     U, row softmaxes, X, and the anchors' finished gradient  a task per tile of anchors
//        candidates  the candidates' finished gradient                        a task per tile of candidates
//   4. rows that are in no cell
//   5. cells, KLs, loss                                                       in a fixed order
//
// The products are formed of centered rows in single precision, all else in double: rows of a real batch are nearly
// parallel in the early layers, where cosines agree in most of their digits and X E - r E cancels.
//
// Each output element has one owner, and every sum an order that depends on the sizes of the problem
// alone, not on the number of threads. X is kept for one wave of layers or anchors: memory grows with
// B + M and not with L * B * M.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../math.h"
#include "embeddings.h"
#include "gemm.h"
#include "kernels.h"
#include "row_gradient.h"
#include "rows.h"

namespace m2d::cpu {
namespace {

// Row length in memory: whole cache lines, an odd number of them, so that rows do not meet in few cache sets.
int64_t padded(int64_t n) {
  constexpr int64_t kLine = 16;
  return (ceil_div(n, kLine) | 1) * kLine;
}

// Rows come and go in T; they are multiplied in Product.
template <class T, class Product>
class Cells {
 public:
  Cells(const Embeddings<T>& embeddings, const RowGradient<T>& rows,
        const std::vector<int64_t>& layers)
      : e_(embeddings),
        p_(embeddings.params()),
        rows_(rows),
        layers_(layers),
        tile_(std::clamp(p_.num_anchors / kTilesPerBatch, kMinTile, kMaxTile)),
        delta_stride_(padded(p_.dim)),
        column_stride_(padded(p_.num_candidates)),
        wave_layers_(choose_layers()),
        wave_anchors_(choose_anchors()),
        wave_tiles_(ceil_div(wave_anchors_, tile_)),
        anchor_delta_(wave_layers_ * wave_anchors_ * delta_stride_ + kGemmSlack),
        anchor_along_(wave_layers_ * p_.num_dims * wave_anchors_),
        anchor_gamma_(wave_layers_ * wave_anchors_),
        candidate_delta_(grad_only(wave_layers_ * p_.num_candidates * delta_stride_ + kGemmSlack)),
        candidate_products_(
            kProductsApart ? grad_only(wave_layers_ * p_.num_candidates * delta_stride_) : 0),
        candidate_along_(wave_layers_ * p_.num_dims * p_.num_candidates),
        candidate_gamma_(wave_layers_ * p_.num_candidates),
        columns_(wave_layers_ * p_.dim * column_stride_ + kGemmSlack),
        x_(grad_only(wave_layers_ * p_.num_dims * wave_anchors_ * column_stride_)),
        tile_sums_(grad_only(wave_layers_ * wave_tiles_ * 2 * sums_size())),
        sums_(grad_only(wave_layers_ * 2 * sums_size())),
        cross_entropy_(p_.num_layers * p_.num_dims * p_.num_anchors) {}

  void run() {
    const int64_t num_layers = static_cast<int64_t>(layers_.size());
    for (int64_t l = 0; l < num_layers; l += wave_layers_) {
      for (int64_t first = 0; first < p_.num_anchors; first += wave_anchors_) {
        run({layers_.data() + l, std::min(wave_layers_, num_layers - l), first,
             std::min(wave_anchors_, p_.num_anchors - first)});
      }
    }
  }

  // The cross-entropy of each anchor (B,); left as it was where the weight is 0.
  const double* cross_entropy(int64_t l, int64_t k) const {
    return cross_entropy_.get() + (l * p_.num_dims + k) * p_.num_anchors;
  }

 private:
  static constexpr int64_t kWaveBytes = 12 << 20;  // working set of a wave
  static constexpr int64_t kTasksPerThread = 4;    // a wave takes in layers until there are as many
  static constexpr int64_t kMinTile = 32;          // rows of one task
  static constexpr int64_t kMaxTile = 128;
  static constexpr int64_t kTilesPerBatch = 8;  // tiles grow from B = 256 on
  static constexpr int64_t kCenterGrain = 16;

  // Layers that are worked on together, or a part of the anchors of one layer. Below, w counts a wave's layers.
  struct Wave {
    const int64_t* layers;
    int64_t num_layers;
    int64_t first, num_anchors;
  };

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

  int64_t choose_layers() const {
    const int64_t delta_rows = p_.num_anchors + p_.num_candidates;
    const int64_t delta = delta_rows * delta_stride_ + p_.dim * column_stride_;
    const int64_t bytes = x_bytes(p_.num_anchors) + delta * static_cast<int64_t>(sizeof(Product));
    const int64_t tiles = ceil_div(p_.num_anchors, tile_);
    const int64_t wanted = ceil_div(kTasksPerThread * at::get_num_threads(), tiles);
    const int64_t available = std::max<int64_t>(1, static_cast<int64_t>(layers_.size()));
    const int64_t most = std::min(wanted, std::max<int64_t>(1, kWaveBytes / bytes));
    return ceil_div(available, ceil_div(available, most));
  }

  int64_t choose_anchors() const {
    const int64_t tiles = kWaveBytes / x_bytes(tile_);
    return std::min(p_.num_anchors, std::max<int64_t>(1, tiles) * tile_);
  }

  Product* anchor_delta(int64_t w, int64_t i) const {
    return anchor_delta_.get() + (w * wave_anchors_ + i) * delta_stride_;
  }
  Product* candidate_delta(int64_t w, int64_t j) const {
    return candidate_delta_.get() + (w * p_.num_candidates + j) * delta_stride_;
  }
  Product* columns(int64_t w, int64_t d) const {
    return columns_.get() + (w * p_.dim + d) * column_stride_;
  }
  double* anchor_along(int64_t w, int64_t k) const {
    return anchor_along_.get() + (w * p_.num_dims + k) * wave_anchors_;
  }
  double* anchor_gamma(int64_t w) const { return anchor_gamma_.get() + w * wave_anchors_; }
  double* candidate_along(int64_t w, int64_t k) const {
    return candidate_along_.get() + (w * p_.num_dims + k) * p_.num_candidates;
  }
  double* candidate_gamma(int64_t w) const {
    return candidate_gamma_.get() + w * p_.num_candidates;
  }
  Product* x(int64_t w, int64_t k, int64_t i) const {
    return x_.get() + ((w * p_.num_dims + k) * wave_anchors_ + i) * column_stride_;
  }
  // (2, K, M): G times the anchors' inverse norms, and G C, summed over the anchors of a tile, or over all.
  double* tile_sums(int64_t w, int64_t tile) const {
    return tile_sums_.get() + (w * wave_tiles_ + tile) * 2 * sums_size();
  }
  double* sums(int64_t w) const { return sums_.get() + w * 2 * sums_size(); }

  void run(const Wave& wave) const {
    for_row_ranges(
        wave.num_layers, wave.num_anchors, kCenterGrain,
        [&](int64_t w, int64_t first, int64_t last) { center_anchors(wave, w, first, last); });
    if (wave.first == 0) {
      for_row_ranges(
          wave.num_layers, p_.num_candidates, kCenterGrain,
          [&](int64_t w, int64_t first, int64_t last) { center_candidates(wave, w, first, last); });
    }
    for_row_ranges(wave.num_layers, wave.num_anchors, tile_,
                   [&](int64_t w, int64_t first, int64_t last) { anchors(wave, w, first, last); });
    for_row_ranges(
        wave.num_layers, p_.num_candidates, tile_,
        [&](int64_t w, int64_t first, int64_t last) { candidates(wave, w, first, last); });
  }

  // -- center --

  void center_anchors(const Wave& wave, int64_t w, int64_t first, int64_t last) const {
    const Side<T> s = e_.anchors(wave.layers[w]);
    for (int64_t i = first; i < last; ++i) {
      anchor_gamma(w)[i] =
          center(s, wave.first + i, anchor_delta(w, i), anchor_along(w, 0) + i, wave_anchors_);
    }
  }

  void center_candidates(const Wave& wave, int64_t w, int64_t first, int64_t last) const {
    const Side<T> s = e_.candidates(wave.layers[w]);
    const Buffer<Product> unkept(rows_.wants_grad() ? 0 : kCenterGrain * delta_stride_);
    Product* delta = rows_.wants_grad() ? candidate_delta(w, first) : unkept.get();
    for (int64_t j = first; j < last; ++j) {
      candidate_gamma(w)[j] = center(s, j, delta + (j - first) * delta_stride_,
                                     candidate_along(w, 0) + j, p_.num_candidates);
    }
    const int64_t end = last == p_.num_candidates ? column_stride_ : last;
    const int64_t width = p_.dims[e_.used_dims(s.layer) - 1];
    for (int64_t d = 0; d < width; ++d) {
      Product* column = columns(w, d) + first;
      for (int64_t j = 0; j < last - first; ++j) column[j] = delta[j * delta_stride_ + d];
      std::fill(column + (last - first), column + (end - first), Product(0));
    }
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

  // Anchors [first, last) of the wave.
  void anchors(const Wave& wave, int64_t w, int64_t first, int64_t last) const {
    const int64_t l = wave.layers[w];
    const int64_t rows = last - first;
    const Buffer<Product> u(rows * column_stride_);
    const Buffer<double> row_sums(grad_only(2 * p_.num_dims * rows));
    const Buffer<double> scratch(std::max(2 * p_.num_candidates, rows_.scratch_size()));
    if (rows_.wants_grad()) std::fill_n(tile_sums(w, first / tile_), 2 * sums_size(), 0.0);
    for (int64_t k = 0; k < e_.used_dims(l); ++k) {
      gemm<Product>({rows, p_.num_candidates, e_.chunk_size(k),
                     anchor_delta(w, first) + e_.chunk_begin(k), delta_stride_, 1,
                     columns(w, e_.chunk_begin(k)), column_stride_, u.get(), column_stride_,
                     k > 0});
      if (e_.weight(l, k) != 0) {
        for (int64_t i = 0; i < rows; ++i) {
          anchor_cell(wave, w, k, first + i, u.get() + i * column_stride_,
                      row_sums.get() + k * rows + i, p_.num_dims * rows, scratch.get());
        }
      } else if (rows_.wants_grad()) {
        std::fill_n(x(w, k, first), rows * column_stride_, Product(0));
      }
    }
    suffix_sum(w, e_.used_dims(l), first, rows);
    const Buffer<Product> own(kProductsApart ? grad_only(rows * delta_stride_) : 0);
    const Products products = place_products(e_.anchors(l), wave.first + first, own.get());
    anchor_products(w, l, first, rows, products);
    for (int64_t i = 0; i < rows; ++i) {
      const CellTerms<Product> terms{products.rows + i * products.stride, row_sums.get() + i,
                                     row_sums.get() + p_.num_dims * rows + i, rows};
      rows_.finish(e_.anchors(l), wave.first + first + i, &terms, scratch.get());
    }
  }

  // Cross-entropy of anchor i of the wave in cell (l, k), and its row of X. `products` holds <delta_i, delta_j>.
  void anchor_cell(const Wave& wave, int64_t w, int64_t k, int64_t i, const Product* products,
                   double* row_sums, int64_t cosines_offset, double* scratch) const {
    const int64_t l = wave.layers[w];
    const int64_t m = p_.num_candidates;
    const int64_t anchor = wave.first + i;
    const int64_t target = p_.target_offset + anchor;
    const double ia = e_.prefix_inverse(e_.anchors(l), k)[anchor];
    const double* ib = e_.prefix_inverse(e_.candidates(l), k);
    double* s = scratch;
    double* e = scratch + m;
    const double gamma = anchor_gamma(w)[i];
    const double along = anchor_along(w, k)[i] - gamma * e_.center_squared(l, k);
    const double max = logits(products, gamma, along, candidate_gamma(w), candidate_along(w, k), ib,
                              p_.scale * ia, m, s);
    exponentials(s, max, m, e);
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

  void candidates(const Wave& wave, int64_t w, int64_t first, int64_t last) const {
    const Side<T> s = e_.candidates(wave.layers[w]);
    const Products products = place_products(s, first, candidate_products(w, first));
    if (rows_.wants_grad()) collect_tiles(wave, w, s.layer, first, last, products);
    if (wave.first + wave.num_anchors < p_.num_anchors) return;
    const Buffer<double> scratch(rows_.scratch_size());
    for (int64_t j = first; j < last; ++j) {
      const CellTerms<Product> terms{products.rows + (j - first) * products.stride, sums(w) + j,
                                     sums(w) + sums_size() + j, p_.num_candidates};
      rows_.finish(s, j, &terms, scratch.get());
    }
  }

  // X^T delta, chunk by chunk, and the sums of all tiles.
  void collect_tiles(const Wave& wave, int64_t w, int64_t l, int64_t first, int64_t last,
                     const Products& out) const {
    const int64_t m = p_.num_candidates;
    for (int64_t k = 0; k < e_.used_dims(l); ++k) {
      const int64_t begin = e_.chunk_begin(k);
      gemm<Product>({last - first, e_.chunk_size(k), wave.num_anchors, x(w, k, 0) + first, 1,
                     column_stride_, anchor_delta(w, 0) + begin, delta_stride_, out.rows + begin,
                     out.stride, wave.first > 0});
    }
    for (int64_t part = 0; part < 2 * p_.num_dims; ++part) {
      double* total = sums(w) + part * m;
      if (wave.first == 0) std::fill(total + first, total + last, 0.0);
      for (int64_t tile = 0; tile < ceil_div(wave.num_anchors, tile_); ++tile)
        add(tile_sums(w, tile) + part * m + first, last - first, total + first);
    }
  }

  const Embeddings<T>& e_;
  const LossParams<T>& p_;
  const RowGradient<T>& rows_;
  const std::vector<int64_t>& layers_;
  const int64_t tile_;
  const int64_t delta_stride_, column_stride_;
  const int64_t wave_layers_, wave_anchors_, wave_tiles_;  // W, A
  const Buffer<Product> anchor_delta_;                     // (W, A, delta_stride)
  const Buffer<double> anchor_along_;                      // <c, u_k> (W, K, A)
  const Buffer<double> anchor_gamma_;                      // (W, A)
  const Buffer<Product> candidate_delta_;                  // (W, M, delta_stride)
  const Buffer<Product> candidate_products_;  // (W, M, delta_stride), kProductsApart only
  const Buffer<double> candidate_along_;      // <c, u_k> (W, K, M)
  const Buffer<double> candidate_gamma_;      // (W, M)
  const Buffer<Product> columns_;             // delta^T (W, D, column_stride)
  const Buffer<Product> x_;                   // suffix sums of X (W, K, A, column_stride)
  const Buffer<double> tile_sums_;            // (W, tiles, 2, K, M)
  const Buffer<double> sums_;                 // (W, 2, K, M)
  const Buffer<double> cross_entropy_;        // (L, K, B)
};

// Rows that meet no other: all of a layer without cells, and own candidates where others were gathered.
template <class T>
void finish_rows_outside_cells(const Embeddings<T>& e, const RowGradient<T>& rows) {
  const LossParams<T>& p = e.params();
  at::parallel_for(0, p.num_layers * p.num_texts, 16, [&](int64_t begin, int64_t end) {
    const Buffer<double> scratch(rows.scratch_size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t l = i / p.num_texts;
      const int64_t n = i % p.num_texts;
      if (e.used_dims(l) == 0 || (p.gathered && n >= p.num_anchors))
        rows.template finish<T>(e.texts(l), n, nullptr, scratch.get());
    }
  });
}

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

template <class T, class Product>
void run(const LossParams<T>& params) {
  const Embeddings<T> embeddings(params);
  const RowGradient<T> rows(embeddings);
  std::vector<int64_t> layers;
  for (int64_t l = 0; l < params.num_layers; ++l) {
    if (embeddings.used_dims(l) > 0) layers.push_back(l);
  }
  Cells<T, Product> cells(embeddings, rows, layers);
  cells.run();
  finish_rows_outside_cells(embeddings, rows);
  reduce(params, cells, rows);
}

}  // namespace

// A prefix of very few dimensions can be thousands of times shorter than its row, and magnifies each rounding.
constexpr int64_t kFewDims = 8;

template <>
void loss(const LossParams<float>& params) {
  params.dims[0] < kFewDims ? run<float, double>(params) : run<float, float>(params);
}

template <>
void loss(const LossParams<double>& params) {
  run<double, double>(params);
}

}  // namespace m2d::cpu
