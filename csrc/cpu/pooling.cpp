// Pooling as a weighted token sum, and its adjoint. Both move each byte once and are bound by memory.
//   reads  coefficients, and hidden states where the coefficient is not 0
//   writes pooled (=), or the hidden states' gradients (=)
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "simd.h"

namespace m2d::cpu {
namespace {

// to[i] += a[i] from[i] of four rows. Dimension-inner: one of the two stays in the first-level cache.
template <class From, class To, class Acc>
M2D_MULTIVERSION void add_four_rows(const From* __restrict from0, const From* __restrict from1,
                                    const From* __restrict from2, const From* __restrict from3,
                                    Acc a0, Acc a1, Acc a2, Acc a3, int64_t dim, To* __restrict to0,
                                    To* __restrict to1, To* __restrict to2, To* __restrict to3) {
  for (int64_t d = 0; d < dim; ++d) {
    to0[d] = static_cast<To>(static_cast<Acc>(to0[d]) + a0 * static_cast<Acc>(from0[d]));
    to1[d] = static_cast<To>(static_cast<Acc>(to1[d]) + a1 * static_cast<Acc>(from1[d]));
    to2[d] = static_cast<To>(static_cast<Acc>(to2[d]) + a2 * static_cast<Acc>(from2[d]));
    to3[d] = static_cast<To>(static_cast<Acc>(to3[d]) + a3 * static_cast<Acc>(from3[d]));
  }
}

template <class From, class To, class Acc>
M2D_MULTIVERSION void add_row(const From* __restrict from, Acc a, int64_t dim, To* __restrict to) {
  for (int64_t d = 0; d < dim; ++d)
    to[d] = static_cast<To>(static_cast<Acc>(to[d]) + a * static_cast<Acc>(from[d]));
}

// sums += row, and row = 0.
template <class Acc>
M2D_MULTIVERSION void move_to_sums(Acc* __restrict row, int64_t dim, double* __restrict sums) {
  for (int64_t d = 0; d < dim; ++d) {
    sums[d] += static_cast<double>(row[d]);
    row[d] = Acc(0);
  }
}

// row += sums.
template <class Acc>
M2D_MULTIVERSION void add_sums(const double* __restrict sums, int64_t dim, Acc* __restrict row) {
  for (int64_t d = 0; d < dim; ++d)
    row[d] = static_cast<Acc>(sums[d] + static_cast<double>(row[d]));
}

// A text on its way through its tokens.
template <class Token, class Acc>
struct TokenStream {
  Token* tokens;
  int64_t token_stride;
  const Acc* coefficients;
  int64_t num_tokens;
  int64_t next = 0;

  // Whether there is one more token whose coefficient is not 0; `next` is then its index.
  bool seek() {
    while (next < num_tokens && coefficients[next] == Acc(0)) ++next;
    return next < num_tokens;
  }
  Token* token() const { return tokens + next * token_stride; }
  Acc coefficient() const { return coefficients[next]; }
};

// Its tokens are summed in `row`. The rounding errors of one running sum would grow with the number of tokens, and the
// means of long texts are so nearly parallel that little but their last digits makes the gradient: every kTogether
// tokens, the sum moves on to one in double.
template <class Scalar, class Acc>
struct SumStream : TokenStream<const Scalar, Acc> {
  static constexpr int64_t kTogether = 64;
  Acc* row;
  int64_t dim;
  int64_t in_row = 0;
  std::vector<double> sums = {};

  const Scalar* from() const { return this->token(); }
  Acc* to() const { return row; }
  bool advance() {
    ++this->next;
    if (!this->seek()) {
      if (!sums.empty()) add_sums(sums.data(), dim, row);
      return false;
    }
    if (++in_row == kTogether) {
      sums.resize(dim);
      move_to_sums(row, dim, sums.data());
      in_row = 0;
    }
    return true;
  }
};

// A row is added to its tokens.
template <class Scalar, class Acc>
struct AddStream : TokenStream<Scalar, Acc> {
  const Acc* row;

  const Acc* from() const { return row; }
  Scalar* to() const { return this->token(); }
  bool advance() {
    ++this->next;
    return this->seek();
  }
};

// Adds the rows of the texts that `begin(i)` starts for i of [first, last), their coefficients times `factor`. A
// processor's prefetchers follow several streams of consecutive tokens better than one: four texts are on their way at a
// time, each in the order of its tokens.
template <class Acc, class Begin>
void add_texts(int64_t first, int64_t last, int64_t dim, Acc factor, const Begin& begin) {
  constexpr int kStreams = 4;
  decltype(begin(0)) s[kStreams];
  int running = 0;
  for (;;) {
    while (running < kStreams && first < last) {
      s[running] = begin(first++);
      if (s[running].seek()) ++running;
    }
    if (running == 0) return;
    const auto a = [&](int i) { return factor * s[i].coefficient(); };
    if (running == kStreams) {
      add_four_rows(s[0].from(), s[1].from(), s[2].from(), s[3].from(), a(0), a(1), a(2), a(3), dim,
                    s[0].to(), s[1].to(), s[2].to(), s[3].to());
    } else {
      for (int i = 0; i < running; ++i) add_row(s[i].from(), a(i), dim, s[i].to());
    }
    for (int i = running - 1; i >= 0; --i) {
      if (!s[i].advance() && i < --running) s[i] = std::move(s[running]);
    }
  }
}

template <class Scalar, class Acc>
M2D_MULTIVERSION void scale_row(const Acc* __restrict x, Acc factor, int64_t dim,
                                Scalar* __restrict out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<Scalar>(factor * x[d]);
}

// The gradient of one text. Most poolings give all its tokens the same row, formed once in `rows`, which holds
// two: that row and zeros.
template <class Scalar, class Acc>
void scatter_text(const Acc* pooled_grad, Acc grad_output, const Acc* coefficients,
                  int64_t num_tokens, int64_t dim, Scalar* rows, bool stream, Scalar* tokens) {
  Acc formed = Acc(0);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const Acc a = coefficients[t];
    if (a != Acc(0) && a != formed) {
      scale_row(pooled_grad, grad_output * a, dim, rows);
      formed = a;
    }
    const Scalar* row = a == Acc(0) ? rows + dim : rows;
    if (stream) {
      stream_copy(tokens + t * dim, row, dim * sizeof(Scalar));
    } else {
      std::memcpy(static_cast<void*>(tokens + t * dim), row, dim * sizeof(Scalar));
    }
  }
}

template <class Scalar, class Acc>
M2D_MULTIVERSION void sum_row(const Scalar* __restrict x, const Acc* __restrict row, Acc factor,
                              int64_t dim, Scalar* __restrict out) {
  for (int64_t d = 0; d < dim; ++d)
    out[d] = static_cast<Scalar>(static_cast<Acc>(x[d]) + factor * row[d]);
}

// `row` holds one token's sum on its way past the caches.
template <class Scalar, class Acc>
void add_text(const Scalar* grads, const Acc* pooled_grad, Acc grad_output, const Acc* coefficients,
              int64_t num_tokens, int64_t dim, Scalar* row, bool stream, Scalar* tokens) {
  const size_t bytes = dim * sizeof(Scalar);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const Scalar* from = grads + t * dim;
    Scalar* to = tokens + t * dim;
    const bool unchanged = coefficients[t] == Acc(0);
    if (!unchanged)
      sum_row(from, pooled_grad, grad_output * coefficients[t], dim, stream ? row : to);
    if (stream) {
      stream_copy(to, unchanged ? from : row, bytes);
    } else if (unchanged) {
      std::memcpy(static_cast<void*>(to), from, bytes);
    }
  }
}

template <class Scalar, class Acc>
M2D_MULTIVERSION void max_text(const Scalar* __restrict tokens, int64_t token_stride,
                               const Acc* __restrict coefficients, int64_t num_tokens, int64_t dim,
                               Acc* __restrict pooled, int32_t* __restrict indices) {
  bool empty = true;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (coefficients[t] == Acc(0)) continue;
    const Scalar* __restrict token = tokens + t * token_stride;
    const int32_t index = static_cast<int32_t>(t);
    for (int64_t d = 0; d < dim; ++d) {
      const Acc value = static_cast<Acc>(token[d]);
      const bool larger = empty || value > pooled[d] || (value != value && pooled[d] == pooled[d]);
      pooled[d] = larger ? value : pooled[d];
      indices[d] = larger ? index : indices[d];
    }
    empty = false;
  }
  for (int64_t d = 0; empty && d < dim; ++d) {
    pooled[d] = Acc(0);
    indices[d] = -1;
  }
}

template <class Scalar, class Acc>
void scatter_max_text(const Acc* pooled_grad, const int32_t* indices, int64_t num_tokens,
                      int64_t dim, Scalar* tokens) {
  std::fill_n(tokens, num_tokens * dim, Scalar(0));
  for (int64_t d = 0; d < dim; ++d) {
    if (indices[d] >= 0) tokens[indices[d] * dim + d] = static_cast<Scalar>(pooled_grad[d]);
  }
}

// A text of a layer and where it lies.
struct Place {
  int64_t layer, block, text;  // text of the block
};

Place place(const PoolParams& p, int64_t i) {
  const int64_t text = i % p.num_texts;
  int64_t b = 0;
  while (text >= p.blocks[b].first_text + p.blocks[b].num_texts) ++b;
  return {i / p.num_texts, b, text - p.blocks[b].first_text};
}

template <class Token, class Acc>
TokenStream<Token, Acc> token_stream(const PoolParams& p, int64_t i) {
  const Place at = place(p, i);
  const TokenBlock& block = p.blocks[at.block];
  const StateView& state = p.states[at.layer * p.num_blocks + at.block];
  const TokenSpan span = token_span(block, at.text);
  return {static_cast<Token*>(state.data) + state_offset(block, state, at.text), state.token_stride,
          static_cast<const Acc*>(block.coefficients) + span.first, span.count};
}

// Calls body(first, last) for ranges of all layers' texts, in parallel. A thread takes a range when it is done with the
// one before: how fast each of them gets at memory is not known beforehand.
template <class Body>
void for_text_ranges(const PoolParams& p, const Body& body) {
  constexpr int64_t kTexts = 16;
  const int64_t count = p.num_layers * p.num_texts;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (count + kTexts - 1) / kTexts);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t first = next.fetch_add(kTexts, std::memory_order_relaxed);
      if (first >= count) return;
      body(first, std::min(count, first + kTexts));
    }
  });
}

// Calls visit(layer, block, text of the block) for every text of every layer, in parallel.
template <class Visit>
void for_each_text(const PoolParams& p, const Visit& visit) {
  for_text_ranges(p, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Place at = place(p, i);
      visit(at.layer, at.block, at.text);
    }
  });
}

}  // namespace

template <class Scalar, class Acc>
void pool_rows(const PoolParams& p, int64_t first, int64_t last) {
  add_texts(first, last, p.dim, Acc(1), [&p](int64_t i) {
    Acc* pooled = static_cast<Acc*>(p.pooled) + i * p.dim;
    std::fill_n(pooled, p.dim, Acc(0));
    return SumStream<Scalar, Acc>{token_stream<const Scalar, Acc>(p, i), pooled, p.dim};
  });
}

template <class Scalar, class Acc>
void pool(const PoolParams& p) {
  for_text_ranges(p, [&p](int64_t first, int64_t last) { pool_rows<Scalar, Acc>(p, first, last); });
}

template <class Scalar, class Acc>
void scatter_rows(const PoolParams& p, const Acc* pooled_grad, const int64_t* layers,
                  Acc grad_output, bool stream, int64_t first, int64_t last) {
  std::vector<Scalar> rows(2 * p.dim);
  for (int64_t i = first; i < last; ++i) {
    const Place at = place(p, i);
    const TokenBlock& block = p.blocks[at.block];
    const StateView& state = p.states[at.layer * p.num_blocks + at.block];
    const TokenSpan span = token_span(block, at.text);
    scatter_text(pooled_grad + (layers[at.layer] * p.num_texts + i % p.num_texts) * p.dim,
                 grad_output, static_cast<const Acc*>(block.coefficients) + span.first, span.count,
                 p.dim, rows.data(), stream,
                 static_cast<Scalar*>(state.data) + state_offset(block, state, at.text));
  }
  if (stream) end_streams();
}

template <class Scalar, class Acc>
void pool_backward(const PoolParams& p, const Acc* pooled_grad, const int64_t* layers,
                   Acc grad_output, bool stream) {
  for_text_ranges(p, [&](int64_t first, int64_t last) {
    scatter_rows<Scalar>(p, pooled_grad, layers, grad_output, stream, first, last);
  });
}

template <class Scalar, class Acc>
void pool_backward_add(const PoolParams& p, const Acc* pooled_grad, Acc grad_output,
                       const Scalar* grads, bool stream) {
  for_each_text(p, [&](int64_t, int64_t, int64_t text) {
    const TokenBlock& block = p.blocks[0];
    const TokenSpan span = token_span(block, text);
    const int64_t offset = state_offset(block, p.states[0], text);
    std::vector<Scalar> row(p.dim);
    add_text(grads + offset, pooled_grad + text * p.dim, grad_output,
             static_cast<const Acc*>(block.coefficients) + span.first, span.count, p.dim,
             row.data(), stream, static_cast<Scalar*>(p.states[0].data) + offset);
    if (stream) end_streams();
  });
}

template <class Scalar, class Acc>
void pool_backward_accumulate(const PoolParams& p, const Acc* pooled_grad, Acc grad_output) {
  for_text_ranges(p, [&](int64_t first, int64_t last) {
    add_texts(first, last, p.dim, grad_output, [&](int64_t i) {
      return AddStream<Scalar, Acc>{token_stream<Scalar, Acc>(p, i), pooled_grad + i * p.dim};
    });
  });
}

template <class Scalar, class Acc>
void pool_max(const PoolParams& p, int32_t* indices) {
  Acc* pooled = static_cast<Acc*>(p.pooled);
  for_each_text(p, [&](int64_t layer, int64_t b, int64_t text) {
    const TokenBlock& block = p.blocks[b];
    const StateView& state = p.states[layer * p.num_blocks + b];
    const TokenSpan span = token_span(block, text);
    const int64_t row = (layer * p.num_texts + block.first_text + text) * p.dim;
    max_text(static_cast<const Scalar*>(state.data) + state_offset(block, state, text),
             state.token_stride, static_cast<const Acc*>(block.coefficients) + span.first,
             span.count, p.dim, pooled + row, indices + row);
  });
}

template <class Scalar, class Acc>
void pool_max_backward(const PoolParams& p, const Acc* pooled_grad, const int32_t* indices,
                       const int64_t* layers) {
  for_each_text(p, [&](int64_t layer, int64_t b, int64_t text) {
    const TokenBlock& block = p.blocks[b];
    const StateView& state = p.states[layer * p.num_blocks + b];
    const int64_t row = (layers[layer] * p.num_texts + block.first_text + text) * p.dim;
    scatter_max_text(pooled_grad + row, indices + row, token_span(block, text).count, p.dim,
                     static_cast<Scalar*>(state.data) + state_offset(block, state, text));
  });
}

#define M2D_INSTANTIATE(Scalar, Acc)                                                              \
  template void pool_rows<Scalar, Acc>(const PoolParams&, int64_t, int64_t);                      \
  template void pool<Scalar, Acc>(const PoolParams&);                                             \
  template void pool_backward<Scalar, Acc>(const PoolParams&, const Acc*, const int64_t*, Acc,    \
                                           bool);                                                 \
  template void scatter_rows<Scalar, Acc>(const PoolParams&, const Acc*, const int64_t*, Acc,     \
                                          bool, int64_t, int64_t);                                \
  template void pool_backward_add<Scalar, Acc>(const PoolParams&, const Acc*, Acc, const Scalar*, \
                                               bool);                                             \
  template void pool_backward_accumulate<Scalar, Acc>(const PoolParams&, const Acc*, Acc);        \
  template void pool_max<Scalar, Acc>(const PoolParams&, int32_t*);                               \
  template void pool_max_backward<Scalar, Acc>(const PoolParams&, const Acc*, const int32_t*,     \
                                               const int64_t*);
M2D_INSTANTIATE(double, double)
M2D_INSTANTIATE(float, float)
M2D_INSTANTIATE(c10::BFloat16, float)
M2D_INSTANTIATE(c10::Half, float)
#undef M2D_INSTANTIATE

}  // namespace m2d::cpu
