// Pooling as a weighted token sum, and its adjoint. Both move each byte once and are bound by memory.
//   reads  coefficients, and hidden states where the coefficient is not 0
//   writes pooled (=), or the hidden states' gradients (=)
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "../math.h"
#include "buffer.h"
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

#if defined(M2D_HAS_SSE2)

// One row is added to another, and at the same time a third one is copied past the caches.
template <class Scalar, class Acc>
struct AddAndStream {
  const Scalar* from;
  Acc a;
  Acc* to;
  const Scalar* stream_from;
  Scalar* stream_to;
};

template <class Scalar, class Acc>
using FourAddAndStream = std::array<AddAndStream<Scalar, Acc>, 4>;

// Line by line: a core that waits for what it reads has room for what it writes. Rows are whole cache lines.
template <class Line, class Scalar, class Acc>
M2D_INLINE void add_and_stream_by(const FourAddAndStream<Scalar, Acc>& four, int64_t dim) {
  constexpr int64_t kLine = kCacheLine / sizeof(Scalar);
  const FourAddAndStream<Scalar, Acc> rows = four;
  for (int64_t d = 0; d < dim; d += kLine) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma omp simd
      for (int64_t j = d; j < d + kLine; ++j)
        rows[i].to[j] += rows[i].a * static_cast<Acc>(rows[i].from[j]);
      Line::copy(rows[i].stream_to + d, rows[i].stream_from + d);
    }
  }
}

#if defined(M2D_HAS_X86_LEVELS)
template <class Scalar, class Acc>
__attribute__((target("arch=x86-64-v4"))) void add_and_stream_v4(
    const FourAddAndStream<Scalar, Acc>& four, int64_t dim) {
  add_and_stream_by<LineBy32>(four, dim);
}

template <class Scalar, class Acc>
__attribute__((target("arch=x86-64-v3"))) void add_and_stream_v3(
    const FourAddAndStream<Scalar, Acc>& four, int64_t dim) {
  add_and_stream_by<LineBy32>(four, dim);
}
#endif

template <class Scalar, class Acc>
void add_and_stream_baseline(const FourAddAndStream<Scalar, Acc>& four, int64_t dim) {
  add_and_stream_by<LineBy16>(four, dim);
}

template <class Scalar, class Acc>
auto best_add_and_stream() {
#if defined(M2D_HAS_X86_LEVELS)
  if (__builtin_cpu_supports("x86-64-v4")) return &add_and_stream_v4<Scalar, Acc>;
  if (__builtin_cpu_supports("x86-64-v3")) return &add_and_stream_v3<Scalar, Acc>;
#endif
  return &add_and_stream_baseline<Scalar, Acc>;
}

#endif

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

// Four texts are on their way at a time, each in the order of its tokens: a processor's prefetchers follow several
// streams of consecutive tokens better than one.
template <class Stream, class Acc>
void add_four_tokens(const Stream* s, Acc factor, int64_t dim) {
  const auto a = [&](int i) { return factor * s[i].coefficient(); };
  add_four_rows(s[0].from(), s[1].from(), s[2].from(), s[3].from(), a(0), a(1), a(2), a(3), dim,
                s[0].to(), s[1].to(), s[2].to(), s[3].to());
}

// Adds the rows of the texts that `begin(i)` starts for i of [first, last), their coefficients times `factor`; the next
// tokens of four texts by `add_four(streams)`.
template <class Acc, class Begin, class AddFour>
void add_texts(int64_t first, int64_t last, int64_t dim, Acc factor, const Begin& begin,
               const AddFour& add_four) {
  constexpr int kStreams = 4;
  decltype(begin(0)) s[kStreams];
  int running = 0;
  for (;;) {
    while (running < kStreams && first < last) {
      s[running] = begin(first++);
      if (s[running].seek()) ++running;
    }
    if (running == 0) return;
    if (running == kStreams) {
      add_four(s);
    } else {
      for (int i = 0; i < running; ++i)
        add_row(s[i].from(), factor * s[i].coefficient(), dim, s[i].to());
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
    const int64_t t = indices[d];
    if (t >= 0 && t < num_tokens) tokens[t * dim + d] = static_cast<Scalar>(pooled_grad[d]);
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

// The gradients of texts, one token after the other. Most poolings give all tokens of a text the same row, which is
// formed once.
template <class Scalar, class Acc>
class GradientRows {
 public:
  static constexpr int kValid = 4;  // rows of which the last one handed out is one stay as they are

  struct Row {
    const Scalar* from;
    Scalar* to;
  };

  GradientRows(const ScatterParams<Acc>& params, const RowRange& texts)
      : s_(params),
        layer_(texts.layer),
        next_text_(texts.first),
        last_text_(texts.last),
        rows_((kValid + 1) * dim()) {
    begin_texts();
  }

  bool has_next() const { return token_ < span_.count; }

  Row next() {
    const Row row = {form(coefficients_[token_]), tokens_ + token_ * dim()};
    ++token_;
    begin_texts();
    return row;
  }

 private:
  int64_t dim() const { return s_.states.dim; }
  Scalar* zeros() { return rows_.data() + kValid * dim(); }

  // Goes on to the next text that has tokens, where none are left of this one.
  void begin_texts() {
    while (!has_next() && next_text_ < last_text_) begin(next_text_++);
  }

  void begin(int64_t text) {
    const PoolParams& p = s_.states;
    const Place at = place(p, layer_ * p.num_texts + text);
    const TokenBlock& block = p.blocks[at.block];
    const StateView& state = p.states[layer_ * p.num_blocks + at.block];
    span_ = token_span(block, at.text);
    token_ = 0;
    coefficients_ = static_cast<const Acc*>(block.coefficients) + span_.first;
    tokens_ = static_cast<Scalar*>(state.data) + state_offset(block, state, at.text);
    pooled_grad_ = s_.pooled_grad + (s_.layers[layer_] * p.num_texts + text) * p.dim;
    formed_ = Acc(0);
  }

  const Scalar* form(Acc a) {
    if (a == Acc(0)) return zeros();
    if (a != formed_) {
      place_ = (place_ + 1) % kValid;
      scale_row(pooled_grad_, s_.grad_output * a, dim(), rows_.data() + place_ * dim());
      formed_ = a;
    }
    return rows_.data() + place_ * dim();
  }

  const ScatterParams<Acc>& s_;
  const int64_t layer_;
  int64_t next_text_;
  const int64_t last_text_;
  // The text at hand.
  TokenSpan span_ = {0, 0};
  int64_t token_ = 0;
  const Acc* coefficients_ = nullptr;
  Scalar* tokens_ = nullptr;
  const Acc* pooled_grad_ = nullptr;
  Acc formed_ = Acc(0);  // coefficient of the row at place_, 0 where there is none
  int place_ = 0;
  std::vector<Scalar> rows_;  // kValid formed ones, and zeros
};

template <class Scalar, class Acc>
void write_rows(GradientRows<Scalar, Acc>& rows, size_t row_bytes, bool stream) {
  while (rows.has_next()) {
    const auto row = rows.next();
    if (stream) {
      stream_copy(row.to, row.from, row_bytes);
    } else {
      std::memcpy(static_cast<void*>(row.to), row.from, row_bytes);
    }
  }
  if (stream) end_streams();
}

// Tasks [0, count), which lie one after the other in memory, dealt to threads. A thread begins with the share that
// torch's elementwise operations give it, and with the end of that: of a gradient which such an operation has just
// written it is what this core wrote last, and still holds, while another core's caches can be farther away than
// memory. Then it helps the others: how fast each of them gets at memory is not known beforehand.
class Shares {
 public:
  static constexpr int64_t kNone = -1;

  Shares(int64_t count, int64_t threads) : count_(count), left_(threads) {
    for (int64_t share = 0; share < threads; ++share)
      left_[share] = begin(share + 1) - begin(share);
  }

  // The thread's next task, kNone if all are taken.
  int64_t take(int64_t thread) {
    for (int64_t i = 0; i < num_shares(); ++i) {
      const int64_t share = (thread + i) % num_shares();
      const int64_t left = left_[share].fetch_sub(1, std::memory_order_relaxed);
      if (left > 0) return begin(share) + left - 1;
    }
    return kNone;
  }

 private:
  int64_t num_shares() const { return static_cast<int64_t>(left_.size()); }
  int64_t begin(int64_t share) const { return share * count_ / num_shares(); }

  const int64_t count_;
  std::vector<std::atomic<int64_t>> left_;
};

// Calls body(texts) for ranges of each layer's texts, in parallel. Ranges leave each thread more than one:
// a pass goes over one layer alone.
template <class Body>
void for_text_ranges(const PoolParams& p, const Body& body) {
  constexpr int64_t kMostTexts = 16;
  constexpr int64_t kRangesPerThread = 2;
  const int64_t most_threads = at::get_num_threads();
  const int64_t wanted = ceil_div(p.num_layers * p.num_texts, kRangesPerThread * most_threads);
  const int64_t length = std::clamp<int64_t>(wanted, 1, kMostTexts);
  const int64_t of_layer = ceil_div(p.num_texts, length);
  const int64_t count = p.num_layers * of_layer;
  const int64_t threads = std::min(most_threads, count);
  Shares shares(count, threads);
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t i = shares.take(thread); i != Shares::kNone; i = shares.take(thread)) {
      const int64_t first = i % of_layer * length;
      body(RowRange{i / of_layer, first, std::min(p.num_texts, first + length)});
    }
  });
}

// Calls visit(layer, block, text of the block) for every text of every layer, in parallel.
template <class Visit>
void for_each_text(const PoolParams& p, const Visit& visit) {
  for_text_ranges(p, [&](const RowRange& texts) {
    for (int64_t n = texts.first; n < texts.last; ++n) {
      const Place at = place(p, texts.layer * p.num_texts + n);
      visit(at.layer, at.block, at.text);
    }
  });
}

}  // namespace

namespace {

// Pools texts, the next tokens of four of them by `add_four(streams)`.
template <class Scalar, class Acc, class AddFour>
void pool_texts(const PoolParams& p, const RowRange& texts, const AddFour& add_four) {
  const int64_t first = texts.layer * p.num_texts;
  add_texts(
      first + texts.first, first + texts.last, p.dim, Acc(1),
      [&p](int64_t i) {
        Acc* pooled = static_cast<Acc*>(p.pooled) + i * p.dim;
        std::fill_n(pooled, p.dim, Acc(0));
        return SumStream<Scalar, Acc>{token_stream<const Scalar, Acc>(p, i), pooled, p.dim};
      },
      add_four);
}

}  // namespace

template <class Scalar, class Acc>
void pool_rows(const PoolParams& p, const RowRange& texts) {
  pool_texts<Scalar, Acc>(p, texts, [&p](const SumStream<Scalar, Acc>* streams) {
    add_four_tokens(streams, Acc(1), p.dim);
  });
}

template <class Scalar, class Acc>
void pool(const PoolParams& p) {
  for_text_ranges(p, [&p](const RowRange& texts) { pool_rows<Scalar, Acc>(p, texts); });
}

template <class Scalar, class Acc>
void scatter_rows(const ScatterParams<Acc>& p, const RowRange& texts) {
  GradientRows<Scalar, Acc> rows(p, texts);
  write_rows(rows, p.states.dim * sizeof(Scalar), p.stream);
}

template <class Scalar, class Acc>
void pool_backward(const ScatterParams<Acc>& p) {
  for_text_ranges(p.states, [&p](const RowRange& texts) { scatter_rows<Scalar, Acc>(p, texts); });
}

template <class Scalar, class Acc>
void pool_and_scatter_rows(const PoolParams& p, const RowRange& read,
                           const ScatterParams<Acc>& scatter, const RowRange& written) {
#if defined(M2D_HAS_SSE2)
  static const auto add_and_stream = best_add_and_stream<Scalar, Acc>();
  GradientRows<Scalar, Acc> rows(scatter, written);
  const size_t row_bytes = p.dim * sizeof(Scalar);
  pool_texts<Scalar, Acc>(p, read, [&](const SumStream<Scalar, Acc>* streams) {
    FourAddAndStream<Scalar, Acc> four;
    int found = 0;
    for (; found < 4 && rows.has_next(); ++found) {
      const auto row = rows.next();
      four[found] = {streams[found].from(), streams[found].coefficient(), streams[found].to(),
                     row.from, row.to};
    }
    if (found == 4) return add_and_stream(four, p.dim);
    for (int i = 0; i < found; ++i) stream_copy(four[i].stream_to, four[i].stream_from, row_bytes);
    add_four_tokens(streams, Acc(1), p.dim);
  });
  write_rows(rows, row_bytes, true);
#else
  pool_rows<Scalar, Acc>(p, read);
  scatter_rows<Scalar, Acc>(scatter, written);
#endif
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
  for_text_ranges(p, [&](const RowRange& texts) {
    add_texts(
        texts.first, texts.last, p.dim, grad_output,
        [&](int64_t i) {
          return AddStream<Scalar, Acc>{token_stream<Scalar, Acc>(p, i), pooled_grad + i * p.dim};
        },
        [&](const AddStream<Scalar, Acc>* streams) {
          add_four_tokens(streams, grad_output, p.dim);
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
  template void pool_rows<Scalar, Acc>(const PoolParams&, const RowRange&);                       \
  template void pool<Scalar, Acc>(const PoolParams&);                                             \
  template void pool_backward<Scalar, Acc>(const ScatterParams<Acc>&);                            \
  template void scatter_rows<Scalar, Acc>(const ScatterParams<Acc>&, const RowRange&);            \
  template void pool_and_scatter_rows<Scalar, Acc>(const PoolParams&, const RowRange&,            \
                                                   const ScatterParams<Acc>&, const RowRange&);   \
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
