#include "checks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

namespace m2d {
namespace {

at::ScalarType accumulate_type_of(at::ScalarType type, const char* name) {
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
      " must be float64, float32, bfloat16 or float16, got ", type);
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor last_dim_contiguous(const Tensor& tensor) {
  return tensor.size(-1) == 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// The coefficient tables, and the texts they cover.
void add_blocks(PoolProblem& problem, at::TensorList coefficients,
                const std::optional<Tensor>& cu_seqlens) {
  TORCH_CHECK(!coefficients.empty(), "coefficients must not be empty");
  const bool packed = cu_seqlens.has_value();
  TORCH_CHECK(!packed || coefficients.size() == 1, "packed states come as one block, got ",
              coefficients.size());
  int64_t first_text = 0;
  for (const Tensor& table : coefficients) {
    TORCH_CHECK(table.dim() == (packed ? 1 : 2), "coefficients must be ", packed ? 1 : 2,
                "-dimensional, got ", table.dim());
    TORCH_CHECK(table.scalar_type() == problem.accumulate_type, "coefficients must be ",
                problem.accumulate_type, ", got ", table.scalar_type());
    TORCH_CHECK(table.device() == problem.options.device() &&
                    (!packed || cu_seqlens->device() == problem.options.device()),
                "coefficients and cu_seqlens must be on ", problem.options.device());
    problem.storage.push_back(table.contiguous());
    TokenBlock block{};
    block.first_text = first_text;
    block.coefficients = problem.storage.back().const_data_ptr();
    if (packed) {
      TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 &&
                      cu_seqlens->scalar_type() == at::kLong,
                  "cu_seqlens must be one-dimensional int64");
      problem.storage.push_back(cu_seqlens->contiguous());
      block.token_offsets = problem.storage.back().const_data_ptr<int64_t>();
      block.num_texts = cu_seqlens->numel() - 1;
      block.num_tokens = table.size(0);
    } else {
      block.num_texts = table.size(0);
      block.num_tokens = table.size(1);
    }
    first_text += block.num_texts;
    problem.blocks.push_back(block);
  }
  problem.params.num_blocks = static_cast<int64_t>(problem.blocks.size());
  problem.params.num_texts = first_text;
}

// On the CPU reading the offsets costs nothing; on CUDA the kernels clamp instead of a host sync.
void check_offsets(const PoolProblem& problem, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens.has_value() || !cu_seqlens->is_cpu()) return;
  const TokenBlock& block = problem.blocks.front();
  TORCH_CHECK(block.token_offsets[0] == 0, "cu_seqlens must start at 0");
  for (int64_t text = 0; text < block.num_texts; ++text) {
    TORCH_CHECK(block.token_offsets[text] <= block.token_offsets[text + 1],
                "cu_seqlens must not decrease");
  }
  TORCH_CHECK(block.token_offsets[block.num_texts] == block.num_tokens,
              "cu_seqlens must end at the token count ", block.num_tokens);
}

// `written`: the kernels write to it. Memory that a lazy clone shares becomes its own by being asked for.
void add_state(PoolProblem& problem, const Tensor& state, const TokenBlock& block, bool packed,
               bool written) {
  TORCH_CHECK(state.dim() == (packed ? 2 : 3), "hidden states must be ", packed ? 2 : 3,
              "-dimensional, got ", state.dim());
  TORCH_CHECK(state.scalar_type() == at::typeMetaToScalarType(problem.options.dtype()) &&
                  state.device() == problem.options.device(),
              "hidden states must share one dtype and device");
  const int64_t tokens = state.size(packed ? 0 : 1);
  TORCH_CHECK((packed || state.size(0) == block.num_texts) && tokens == block.num_tokens &&
                  state.size(-1) == problem.params.dim,
              "hidden states of shape ", state.sizes(), " do not fit ", block.num_texts,
              " texts of ", block.num_tokens, " tokens of width ", problem.params.dim);
  problem.storage.push_back(last_dim_contiguous(state));
  const Tensor& view = problem.storage.back();
  void* data = written ? view.mutable_data_ptr() : const_cast<void*>(view.const_data_ptr());
  problem.states.push_back({data, packed ? 0 : view.stride(0), view.stride(packed ? 0 : 1)});
}

void link(PoolProblem& problem) {
  problem.params.blocks = problem.blocks.data();
  problem.params.states = problem.states.data();
}

template <class T>
Rows<T> rows_of(const Tensor& tensor) {
  return {tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.data_ptr()),
          tensor.size(1) * tensor.size(2), tensor.size(1)};
}

template <class T>
Rows<const T> const_rows_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.size(1) * tensor.size(2),
          tensor.size(1)};
}

void check_dims(at::IntArrayRef dims, int64_t width) {
  int64_t previous = 0;
  for (const int64_t d : dims) {
    TORCH_CHECK(d > previous && d <= width, "dims must ascend within 1..", width);
    previous = d;
  }
  TORCH_CHECK(!dims.empty(), "dims must not be empty");
}

template <class T>
void check_loss_options(const LossParams<T>& params, const LossOptions& options) {
  const auto is_table = [](const Tensor& t) {
    return t.is_cpu() && t.scalar_type() == at::kDouble && t.is_contiguous();
  };
  TORCH_CHECK(is_table(options.weights) && options.weights.dim() == 2 &&
                  options.weights.size(0) == params.num_layers &&
                  options.weights.size(1) == params.num_dims,
              "weights must be a contiguous float64 CPU tensor (L, K)");
  TORCH_CHECK(is_table(options.kl_weights) && options.kl_weights.dim() == 1 &&
                  options.kl_weights.size(0) == params.num_layers,
              "kl_weights must be a contiguous float64 CPU tensor (L,)");
  TORCH_CHECK(params.num_layers >= 1 && params.num_anchors >= 1, "the batch must not be empty");
  check_dims(options.dims, params.dim);
  TORCH_CHECK((options.hardness == 0 && options.own_hardness == 0) ||
                  (params.num_candidates % (options.num_columns - 1) == 0 &&
                   params.target_offset <=
                       params.num_candidates / (options.num_columns - 1) - params.num_anchors),
              "hardness asks for as many candidates in every column, the positives in the first");
  TORCH_CHECK(params.target_offset >= 0 &&
                  params.target_offset <= params.num_candidates - params.num_anchors,
              "target_offset must leave a candidate for each anchor");
}

// All but the rows: sizes, what is asked of them, and the outputs.
template <class T>
LossProblem<T> start_loss(at::IntArrayRef rows, const at::TensorOptions& row_options,
                          const std::optional<Tensor>& candidates, int64_t target_offset,
                          const LossOptions& options) {
  TORCH_CHECK(options.num_columns >= 2 && rows[1] % options.num_columns == 0,
              "the number of texts must be a multiple of num_columns >= 2");
  TORCH_CHECK(!candidates || candidates->dim() == 3, "candidates must be (L, M, D), got ",
              candidates ? candidates->sizes() : rows);
  LossProblem<T> problem{};
  LossParams<T>& params = problem.params;
  LossOutputs& outputs = problem.outputs;
  params.num_layers = rows[0];
  params.num_texts = rows[1];
  params.dim = rows[2];
  params.num_anchors = rows[1] / options.num_columns;
  params.gathered = candidates.has_value();
  params.num_candidates = params.gathered ? candidates->size(1) : rows[1] - params.num_anchors;
  params.num_dims = static_cast<int64_t>(options.dims.size());
  params.target_offset = target_offset;
  check_loss_options(params, options);
  params.dims = options.dims.data();
  params.weights = options.weights.const_data_ptr<double>();
  params.kl_weights = options.kl_weights.const_data_ptr<double>();
  params.scale = options.scale;
  params.hardness = options.hardness;
  params.own_hardness = options.own_hardness;
  params.column_size = params.num_candidates / (options.num_columns - 1);
  params.kl_temperature = options.kl_temperature;
  params.normalize = options.normalize;
  params.pooled = {nullptr, rows[1] * rows[2], rows[1]};
  outputs.pooled_grad =
      at::empty(options.needs_grad ? rows : at::IntArrayRef{0, 0, 0}, row_options);
  params.pooled_grad = rows_of<T>(outputs.pooled_grad);
  outputs.candidate_grad = at::empty({0, 0, 0}, row_options);
  outputs.cells = at::empty({params.num_layers, params.num_dims}, row_options);
  outputs.kl = at::empty({params.num_layers}, row_options);
  outputs.loss = at::empty({}, row_options);
  params.cells = static_cast<T*>(outputs.cells.data_ptr());
  params.kl = static_cast<T*>(outputs.kl.data_ptr());
  params.loss = static_cast<T*>(outputs.loss.data_ptr());
  return problem;
}

}  // namespace

PoolProblem read_states(at::TensorList hidden_states, at::TensorList coefficients,
                        const std::optional<Tensor>& cu_seqlens, bool written) {
  TORCH_CHECK(!hidden_states.empty(), "hidden_states must not be empty");
  PoolProblem problem{};
  problem.options = hidden_states[0].options();
  problem.accumulate_type = accumulate_type_of(hidden_states[0].scalar_type(), "hidden states");
  add_blocks(problem, coefficients, cu_seqlens);
  check_offsets(problem, cu_seqlens);
  const int64_t blocks = problem.params.num_blocks;
  const int64_t states = static_cast<int64_t>(hidden_states.size());
  TORCH_CHECK(states % blocks == 0, "expected a multiple of ", blocks, " hidden states, got ",
              states);
  problem.params.num_layers = states / blocks;
  TORCH_CHECK(hidden_states[0].dim() >= 2, "hidden states must be 2- or 3-dimensional");
  problem.params.dim = hidden_states[0].size(-1);
  for (int64_t i = 0; i < states; ++i) {
    add_state(problem, hidden_states[i], problem.blocks[i % blocks], cu_seqlens.has_value(),
              written);
  }
  link(problem);
  return problem;
}

GradProblem allocate_state_grads(const Tensor& pooled_grad, at::IntArrayRef layers,
                                 at::TensorList coefficients,
                                 const std::optional<Tensor>& cu_seqlens, at::ScalarType dtype) {
  TORCH_CHECK(pooled_grad.dim() == 3 && pooled_grad.is_contiguous(),
              "pooled_grad must be a contiguous (L, N, D) tensor");
  GradProblem problem{};
  PoolProblem& pool = problem.pool;
  pool.options = pooled_grad.options().dtype(dtype);
  pool.accumulate_type = accumulate_type_of(dtype, "dtype");
  TORCH_CHECK(pooled_grad.scalar_type() == pool.accumulate_type, "pooled_grad must be ",
              pool.accumulate_type, ", got ", pooled_grad.scalar_type());
  add_blocks(pool, coefficients, cu_seqlens);
  check_offsets(pool, cu_seqlens);
  TORCH_CHECK(pool.params.num_texts == pooled_grad.size(1), "pooled_grad has ", pooled_grad.size(1),
              " rows for ", pool.params.num_texts, " texts");
  pool.params.num_layers = static_cast<int64_t>(layers.size());
  pool.params.dim = pooled_grad.size(2);
  const bool packed = cu_seqlens.has_value();
  for (const int64_t layer : layers) {
    TORCH_CHECK(layer >= 0 && layer < pooled_grad.size(0), "layer ", layer, " is out of range");
    for (const TokenBlock& block : pool.blocks) {
      problem.grads.push_back(
          packed ? at::empty({block.num_tokens, pool.params.dim}, pool.options)
                 : at::empty({block.num_texts, block.num_tokens, pool.params.dim}, pool.options));
      add_state(pool, problem.grads.back(), block, packed, true);
    }
  }
  link(pool);
  return problem;
}

Tensor accumulated(const Tensor& rows) {
  return rows.to(accumulate_type_of(rows.scalar_type(), "rows"));
}

std::optional<Tensor> accumulated(const std::optional<Tensor>& rows) {
  return rows.has_value() ? std::make_optional(accumulated(*rows)) : std::nullopt;
}

template <class T>
LossProblem<T> read_loss(const Tensor& pooled, const std::optional<Tensor>& candidates,
                         int64_t target_offset, const LossOptions& options) {
  TORCH_CHECK(pooled.dim() == 3, "pooled must be (L, N, D), got ", pooled.sizes());
  const Tensor rows = pooled.contiguous();
  LossProblem<T> problem =
      start_loss<T>(rows.sizes(), rows.options(), candidates, target_offset, options);
  LossParams<T>& params = problem.params;
  LossOutputs& outputs = problem.outputs;
  problem.storage.push_back(rows);
  params.pooled = const_rows_of<T>(rows);
  if (params.gathered) {
    TORCH_CHECK(candidates->size(0) == rows.size(0) && candidates->size(2) == rows.size(2) &&
                    candidates->scalar_type() == rows.scalar_type() &&
                    candidates->device() == rows.device(),
                "candidates must be (L, M, D) of pooled's dtype and device");
    const Tensor columns = candidates->contiguous();
    problem.storage.push_back(columns);
    params.candidates = const_rows_of<T>(columns);
    if (options.needs_grad) outputs.candidate_grad = at::empty_like(columns);
    params.candidate_grad = rows_of<T>(outputs.candidate_grad);
  }
  return problem;
}

LossProblem<float> read_loss_of_tokens(const PoolProblem& tokens, const LossOptions& options) {
  const PoolParams& p = tokens.params;
  return start_loss<float>({p.num_layers, p.num_texts, p.dim},
                           tokens.options.dtype(tokens.accumulate_type), std::nullopt, 0, options);
}

template LossProblem<float> read_loss(const Tensor&, const std::optional<Tensor>&, int64_t,
                                      const LossOptions&);
template LossProblem<double> read_loss(const Tensor&, const std::optional<Tensor>&, int64_t,
                                       const LossOptions&);

template <class T>
CosineProblem<T> read_cosines(const Tensor& a, const Tensor& b, at::IntArrayRef dims, bool pairs) {
  TORCH_CHECK(
      a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(2) &&
          (!pairs || a.size(1) == b.size(1)),
      "a and b must be rows (L, A, D) and (L, B, D), and as many where they are pairs, got ",
      a.sizes(), " and ", b.sizes());
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(),
              "a and b must share one dtype and device");
  check_dims(dims, a.size(2));
  CosineProblem<T> problem{{}, a.contiguous(), b.contiguous(), {}};
  const int64_t num_dims = static_cast<int64_t>(dims.size());
  problem.params = {a.size(0),
                    a.size(2),
                    num_dims,
                    dims.data(),
                    pairs,
                    const_rows_of<T>(problem.a),
                    const_rows_of<T>(problem.b)};
  problem.cosines = {a.size(0), num_dims, a.size(1)};
  if (!pairs) problem.cosines.push_back(b.size(1));
  return problem;
}

template <class T>
CosineGradProblem<T> allocate_cosine_grads(const CosineProblem<T>& problem, const Tensor& grad,
                                           const Tensor& cosines, bool needs_a, bool needs_b) {
  for (const Tensor& table : {grad, cosines}) {
    TORCH_CHECK(table.sizes() == problem.cosines && table.scalar_type() == at::kDouble,
                "grad and cosines must be float64 of shape ", at::IntArrayRef(problem.cosines),
                ", got ", table.scalar_type(), " of shape ", table.sizes());
  }
  CosineGradProblem<T> grads{{}, grad.contiguous(), cosines.contiguous(), {}, {}};
  grads.a = needs_a ? at::empty_like(problem.a) : at::empty({0, 0, 0}, problem.a.options());
  grads.b = needs_b ? at::empty_like(problem.b) : at::empty({0, 0, 0}, problem.b.options());
  grads.grads = {grads.grad.template const_data_ptr<double>(),
                 grads.cosines.template const_data_ptr<double>(), rows_of<T>(grads.a),
                 rows_of<T>(grads.b)};
  return grads;
}

LogSumExpProblem read_scores(const Tensor& scores, const std::optional<Tensor>& mask, double scale,
                             bool over_rows) {
  TORCH_CHECK(scores.dim() == 4 && scores.scalar_type() == at::kDouble,
              "scores must be float64 (L, K, A, M), got ", scores.scalar_type(), " of shape ",
              scores.sizes());
  const at::IntArrayRef matrix = scores.sizes().slice(2);
  TORCH_CHECK(!mask || (mask->sizes() == matrix && mask->scalar_type() == at::kBool &&
                        mask->device() == scores.device()),
              "mask must be bool of shape ", matrix, " on the scores' device, got ",
              mask ? mask->toString() : "", " of shape ", mask ? mask->sizes() : matrix);
  // The stride of a dimension of one element says nothing, not even of what is contiguous.
  const int64_t batch = scores.size(1) == 1 ? 0 : 1;
  const bool is_one_batch = scores.size(0) == 1 || scores.size(1) == 1 ||
                            scores.stride(0) == scores.size(1) * scores.stride(1);
  LogSumExpProblem problem{{},
                           is_one_batch && scores.stride(3) == 1 ? scores : scores.contiguous(),
                           mask ? mask->contiguous().to(at::kDouble) : Tensor(),
                           scores.sizes().vec()};
  problem.params = {scores.size(0) * scores.size(1),
                    scores.size(2),
                    scores.size(3),
                    problem.scores.stride(batch),
                    problem.scores.stride(2),
                    problem.scores.const_data_ptr<double>(),
                    mask ? problem.mask.const_data_ptr<double>() : nullptr,
                    scale,
                    over_rows};
  problem.result.erase(problem.result.begin() + (over_rows ? 2 : 3));
  return problem;
}

template CosineProblem<float> read_cosines(const Tensor&, const Tensor&, at::IntArrayRef, bool);
template CosineProblem<double> read_cosines(const Tensor&, const Tensor&, at::IntArrayRef, bool);
template CosineGradProblem<float> allocate_cosine_grads(const CosineProblem<float>&, const Tensor&,
                                                        const Tensor&, bool, bool);
template CosineGradProblem<double> allocate_cosine_grads(const CosineProblem<double>&,
                                                         const Tensor&, const Tensor&, bool, bool);

}  // namespace m2d
