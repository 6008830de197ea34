// Runs every launcher of csrc/cuda/launch.h on small random problems, for compute-sanitizer (`make gpu-check`).
// No torch. Arrays are allocations of their exact size; outputs and workspace start uninitialised. Every launch is done
// twice and must give the same bits, and finite ones. Values are tests/test_cuda.py's business.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace {

using m2d::LossParams;
using m2d::PoolParams;
using m2d::cuda::LossLaunch;
using m2d::cuda::StateType;

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what.c_str(), cudaGetErrorString(error));
  std::exit(1);
}

std::mt19937 generator(0);

float uniform() {
  return std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator);
}

// Device memory, freed when the problem is done.
class Memory {
 public:
  ~Memory() {
    for (void* piece : pieces_) cudaFree(piece);
  }

  template <class T>
  T* empty(int64_t count) {
    void* data = nullptr;
    check(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc");
    pieces_.push_back(data);
    return static_cast<T*>(data);
  }

  template <class T>
  T* copy(const std::vector<T>& values) {
    T* data = empty<T>(static_cast<int64_t>(values.size()));
    check(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
          "cudaMemcpy");
    return data;
  }

  float* random(int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = uniform();
    return copy(values);
  }

  void* random_states(StateType type, int64_t count) {
    if (type == StateType::kFloat) return random(count);
    std::vector<uint16_t> values(count);
    for (uint16_t& bits : values) {
      const __nv_bfloat16 wide = __float2bfloat16(uniform());
      const __half narrow = __float2half(uniform());
      std::memcpy(&bits, type == StateType::kHalf ? static_cast<const void*>(&narrow) : &wide, 2);
    }
    return copy(values);
  }

 private:
  std::vector<void*> pieces_;
};

int64_t element_size(StateType type) {
  return type == StateType::kFloat ? 4 : 2;
}

bool is_finite(const std::vector<char>& bytes, StateType type) {
  for (size_t i = 0; i < bytes.size(); i += element_size(type)) {
    float value = 0.0f;
    if (type == StateType::kFloat) {
      std::memcpy(&value, &bytes[i], 4);
    } else {
      uint16_t half;
      std::memcpy(&half, &bytes[i], 2);
      const uint16_t exponent = type == StateType::kHalf ? 0x7c00 : 0x7f80;
      if ((half & exponent) == exponent) return false;
    }
    if (!std::isfinite(value)) return false;
  }
  return true;
}

struct Output {
  const void* data;
  int64_t bytes;
  bool numbers;  // of the given type, to be finite
  StateType type;
};

int launches = 0;

void run_twice(const std::string& what, const std::vector<Output>& outputs,
               const std::function<cudaError_t()>& launch) {
  std::vector<std::vector<char>> first;
  for (int round = 0; round < 2; ++round) {
    check(launch(), what);
    check(cudaDeviceSynchronize(), what);
    ++launches;
    for (size_t i = 0; i < outputs.size(); ++i) {
      std::vector<char> bytes(outputs[i].bytes);
      check(cudaMemcpy(bytes.data(), outputs[i].data, bytes.size(), cudaMemcpyDeviceToHost), what);
      const bool bad = outputs[i].numbers && !is_finite(bytes, outputs[i].type);
      if (round == 0) first.push_back(bytes);
      if (bad || bytes != first[i]) {
        std::fprintf(stderr, "%s: output %zu %s\n", what.c_str(), i,
                     bad ? "is not finite" : "differs between two runs");
        std::exit(1);
      }
    }
  }
}

// Texts of 0 to max_tokens tokens, in two padded blocks or packed.
struct Tokens {
  PoolParams params{};
  StateType type;
  std::vector<m2d::TokenBlock> blocks;
  std::vector<m2d::StateView> states;
  std::vector<Output> outputs;  // the states, as something that is written

  Tokens(Memory& memory, StateType state_type, bool packed, int64_t layers, int64_t texts,
         int64_t max_tokens, int64_t dim, bool written)
      : type(state_type) {
    params.num_layers = layers;
    params.num_texts = texts;
    params.dim = dim;
    params.num_blocks = packed ? 1 : 2;
    for (int64_t b = 0; b < params.num_blocks; ++b) {
      m2d::TokenBlock block{};
      block.first_text = b * (texts / 2);
      block.num_texts = packed ? texts : b == 0 ? texts / 2 : texts - texts / 2;
      const int64_t width = max_tokens - b;
      std::vector<float> coefficients;
      std::vector<int64_t> offsets{0};
      for (int64_t n = 0; n < block.num_texts; ++n) {
        const int64_t length = (7 * n + 3 * b) % (width + 1);
        for (int64_t t = 0; t < (packed ? length : width); ++t)
          coefficients.push_back(t < length ? 1.0f / static_cast<float>(length) : 0.0f);
        offsets.push_back(offsets.back() + length);
      }
      block.num_tokens = packed ? offsets.back() : width;
      if (packed) block.token_offsets = memory.copy(offsets);
      block.coefficients = memory.copy(coefficients);
      blocks.push_back(block);
    }
    for (int64_t l = 0; l < layers; ++l) {
      for (const m2d::TokenBlock& block : blocks) {
        const int64_t count = (packed ? 1 : block.num_texts) * block.num_tokens * dim;
        const int64_t bytes = count * element_size(type);
        void* data = written ? memory.empty<char>(bytes) : memory.random_states(type, count);
        states.push_back({data, packed ? 0 : block.num_tokens * dim, dim});
        outputs.push_back({data, bytes, true, type});
      }
    }
    params.blocks = blocks.data();
    params.states = states.data();
  }
};

struct Grid {
  std::vector<int64_t> dims;
  std::vector<double> weights;
  std::vector<double> kl_weights;
};

Grid make_grid(int64_t layers, int64_t dim) {
  Grid grid{{dim / 3, dim / 2, dim}, {}, {}};
  for (int64_t l = 0; l < layers; ++l) {
    for (int64_t k = 0; k < 3; ++k) grid.weights.push_back(0.5 + static_cast<double>(l + k));
    grid.kl_weights.push_back(l + 1 < layers ? 0.3 : 0.0);
  }
  grid.weights[1] = 0.0;  // a cell that nobody asks for
  return grid;
}

void run_loss(const std::string& what, Memory& memory, LossParams<float> p, const Grid& grid,
              const LossLaunch& how) {
  p.num_dims = static_cast<int64_t>(grid.dims.size());
  p.dims = grid.dims.data();
  p.weights = grid.weights.data();
  p.kl_weights = grid.kl_weights.data();
  p.scale = 20.0;
  p.column_size = p.num_candidates;
  p.kl_temperature = 0.3;
  const int64_t rows = p.num_layers * p.num_texts * p.dim;
  const int64_t others = p.num_layers * p.num_candidates * p.dim;
  p.pooled_grad = {memory.empty<float>(rows), p.num_texts * p.dim, p.num_texts};
  if (p.gathered)
    p.candidate_grad = {memory.empty<float>(others), p.num_candidates * p.dim, p.num_candidates};
  p.cells = memory.empty<float>(p.num_layers * p.num_dims);
  p.kl = memory.empty<float>(p.num_layers);
  p.loss = memory.empty<float>(1);
  std::vector<Output> outputs{{p.loss, 4, true, StateType::kFloat},
                              {p.cells, 4 * p.num_layers * p.num_dims, false, StateType::kFloat},
                              {p.kl, 4 * p.num_layers, false, StateType::kFloat},
                              {p.pooled_grad.data, 4 * rows, true, StateType::kFloat}};
  if (p.gathered) outputs.push_back({p.candidate_grad.data, 4 * others, true, StateType::kFloat});
  char* workspace =
      memory.empty<char>(static_cast<int64_t>(m2d::cuda::loss_workspace_bytes(p, how)));
  run_twice(what, outputs, [&] { return m2d::cuda::launch_loss(p, how, workspace, nullptr); });
}

void run_tokens(StateType type, bool packed, int64_t dim) {
  const int64_t layers = 3;
  const int64_t texts = 2 * 37;
  Memory memory;
  const std::string what = "type " + std::to_string(static_cast<int>(type)) +
                           (packed ? ", packed" : ", padded") + ", D = " + std::to_string(dim);
  Tokens tokens(memory, type, packed, layers, texts, 11, dim, false);
  Tokens grads(memory, type, packed, layers, texts, 11, dim, true);
  const int64_t rows = layers * texts * dim;
  float* pooled = memory.empty<float>(rows);
  int32_t* indices = memory.empty<int32_t>(rows);
  const Output pooled_output{pooled, 4 * rows, true, StateType::kFloat};
  tokens.params.pooled = pooled;
  run_twice("pool, " + what, {pooled_output},
            [&] { return m2d::cuda::launch_pool(tokens.params, type, nullptr); });
  run_twice("pool_max, " + what, {pooled_output, {indices, 4 * rows, false, StateType::kFloat}},
            [&] { return m2d::cuda::launch_pool_max(tokens.params, type, indices, nullptr); });

  const float* pooled_grad = memory.random(rows);
  const float* grad_output = memory.random(1);
  const std::vector<int64_t> chosen{2, 0, 1};
  std::vector<const void*> incoming;
  for (const m2d::StateView& state : tokens.states) incoming.push_back(state.data);
  run_twice("pool_backward, " + what, grads.outputs, [&] {
    return m2d::cuda::launch_pool_backward(grads.params, type, pooled_grad, chosen.data(),
                                           grad_output, nullptr);
  });
  run_twice("pool_backward_add, " + what, grads.outputs, [&] {
    return m2d::cuda::launch_pool_backward_add(grads.params, type, pooled_grad, chosen.data(),
                                               nullptr, incoming.data(), nullptr);
  });
  run_twice("pool_max_backward, " + what, grads.outputs, [&] {
    return m2d::cuda::launch_pool_max_backward(grads.params, type, pooled_grad, indices,
                                               chosen.data(), nullptr);
  });

  const Grid grid = make_grid(layers, dim);
  for (const bool normalize : {false, true}) {
    LossParams<float> p{};
    p.num_layers = layers;
    p.num_texts = texts;
    p.num_anchors = texts / 2;
    p.num_candidates = texts - p.num_anchors;
    p.dim = dim;
    p.normalize = normalize;
    p.pooled = {nullptr, texts * dim, texts};
    run_loss("loss, " + what, memory, p, grid, {&tokens.params, type, false});
  }
}

// `type`: of the rows before they were widened; `more`: gathered candidates.
void run_pooled(bool gathered, bool allow_tf32, int64_t texts, int64_t dim,
                StateType type = StateType::kFloat, int64_t more = 13) {
  Memory memory;
  const int64_t layers = 2;
  LossParams<float> p{};
  p.num_layers = layers;
  p.num_texts = texts;
  p.num_anchors = texts / 2;
  p.num_candidates = gathered ? texts + more : texts - p.num_anchors;
  p.target_offset = gathered ? 13 : 0;
  p.dim = dim;
  p.gathered = gathered;
  p.pooled = {memory.random(layers * texts * dim), texts * dim, texts};
  if (gathered)
    p.candidates = {memory.random(layers * p.num_candidates * dim), p.num_candidates * dim,
                    p.num_candidates};
  run_loss(
      std::string("pooled loss") + (gathered ? ", gathered" : "") + (allow_tf32 ? ", tf32" : ""),
      memory, p, make_grid(layers, dim), {nullptr, type, allow_tf32});
}

}  // namespace

int main() {
  for (const StateType type : {StateType::kFloat, StateType::kBFloat16, StateType::kHalf}) {
    run_tokens(type, false, 101);  // rows that are no whole vectors
    run_tokens(type, false, 104);
    run_tokens(type, true, 104);
  }
  for (const bool gathered : {false, true}) {
    for (const bool allow_tf32 : {false, true}) run_pooled(gathered, allow_tf32, 150, 77);
  }
  // More candidates than are summed in one part.
  for (const StateType type : {StateType::kFloat, StateType::kBFloat16})
    run_pooled(true, false, 70, 40, type, 1100);
  std::printf("%d launches: finite, and the same bits twice\n", launches);
  return 0;
}
