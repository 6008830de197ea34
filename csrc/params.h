// The problem as plain data: what the validated tensors of checks.h become before any kernel runs.
// Standard headers only; both backends read these structs. Strides count elements, not bytes.
#pragma once

#include <cstdint>

namespace m2d {

// Texts whose tokens lie in one tensor: a batch padded to one width, or one packed run of tokens.
struct TokenBlock {
  int64_t first_text;            // index of the block's first text among all N texts
  int64_t num_texts;             // texts in this block
  int64_t num_tokens;            // padded: tokens per text; packed: tokens of all texts together
  const int64_t* token_offsets;  // packed: (num_texts + 1,) cumulative lengths; padded: nullptr
  const void* coefficients;      // a: padded (num_texts, num_tokens), packed (num_tokens,)
};

// One layer's hidden states of one block: (num_texts, num_tokens, D), or packed (num_tokens, D).
// The last dimension is contiguous.
struct StateView {
  void* data;
  int64_t text_stride;
  int64_t token_stride;
};

// The tokens of one text as a kernel walks them.
struct TokenSpan {
  int64_t first;  // coefficient index of the text's first token
  int64_t count;  // tokens
};

inline TokenSpan token_span(const TokenBlock& block, int64_t text) {
  if (block.token_offsets != nullptr) {
    const int64_t begin = block.token_offsets[text];
    return {begin, block.token_offsets[text + 1] - begin};
  }
  return {text * block.num_tokens, block.num_tokens};
}

inline int64_t state_offset(const TokenBlock& block, const StateView& view, int64_t text) {
  return block.token_offsets != nullptr ? block.token_offsets[text] * view.token_stride
                                        : text * view.text_stride;
}

// P[l, n, :] = sum_t a[n, t] * H[l, n, t, :] and its adjoint.
struct PoolParams {
  int64_t num_layers;        // L
  int64_t num_blocks;        // blocks per layer
  int64_t num_texts;         // N
  int64_t dim;               // D
  const TokenBlock* blocks;  // (num_blocks,)
  const StateView* states;   // (num_layers, num_blocks)
  void* pooled;              // (L, N, D), the accumulation dtype
};

// Rows of D elements of every layer: row r of layer l starts at data + l * layer_stride + r * D.
template <class T>
struct Rows {
  T* data;
  int64_t layer_stride;
  int64_t count;
};

// The loss over pooled rows. Own candidates are rows B..N of `pooled`; gathered ones lie apart.
template <class T>
struct LossParams {
  int64_t num_layers;        // L
  int64_t num_texts;         // N, the divisor of the KL
  int64_t num_anchors;       // B
  int64_t num_candidates;    // M
  int64_t dim;               // D
  int64_t num_dims;          // K
  int64_t target_offset;     // anchor i's positive is candidate target_offset + i
  const int64_t* dims;       // (K,) ascending, distinct, the last one <= D
  const double* weights;     // W (L, K)
  const double* kl_weights;  // V (L,), 0 for the final layer
  double scale;
  double hardness;      // h of math.h, of other anchors' candidates
  double own_hardness;  // of an anchor's own but the positive
  int64_t column_size;  // candidates of one column
  double kl_temperature;
  bool normalize;
  bool gathered;             // candidates lie apart from the pooled rows
  Rows<const T> pooled;      // (L, N, D)
  Rows<const T> candidates;  // (L, M, D), gathered only
  Rows<T> pooled_grad;       // dP (L, N, D); data is nullptr where no gradient is wanted
  Rows<T> candidate_grad;    // (L, M, D), gathered only
  T* cells;                  // CE (L, K); NaN for a cell whose weight is 0
  T* kl;                     // KL (L,); NaN for a layer whose weight is 0
  T* loss;                   // scalar
};

// Cosines of the rows of a with those of b, of all prefixes.
template <class T>
struct CosineParams {
  int64_t num_layers;   // L
  int64_t dim;          // D
  int64_t num_dims;     // K
  const int64_t* dims;  // (K,) ascending, distinct, the last one <= D
  bool pairs;           // row i with row i: cosines are (L, K, A), else (L, K, A, B)
  Rows<const T> a;      // (L, A, D)
  Rows<const T> b;      // (L, B, D)
};

template <class T>
struct CosineGrads {
  const double* grad;     // of the cosines, as they are shaped
  const double* cosines;  // C
  Rows<T> a, b;           // (L, A, D) and (L, B, D); data is nullptr where none is wanted
};

template <class T>
int64_t chunk_begin(const CosineParams<T>& p, int64_t k) {
  return k == 0 ? 0 : p.dims[k - 1];
}

// Scores of which some are left out, and where their logsumexp is taken.
struct LogSumExpParams {
  int64_t batches, rows, columns;
  int64_t batch_stride, row_stride;  // of the scores; columns lie side by side
  const double* scores;
  // (rows, columns), not 0: left out, of all batches; nullptr: none are. As wide as the scores, for vectors of both.
  const double* mask;
  double scale;
  bool over_rows;  // the results are (batches, columns), else (batches, rows)
};

}  // namespace m2d
