// Times of the loss's two launches on the GPU that is there, without torch: `make gpu-bench PART=kernels`.
//
//   gpu_kernels LAYERS PAIRS TOKENS WIDTH DIM,DIM,... float32|bfloat16|float16 ROUNDS
//
// Prints a line of JSON: microseconds of each round between events around a CUDA graph, of the forward, of the
// backward, of both, and of the floor, which copies each hidden state to where its gradient goes. The L2 cache is
// overwritten before each. Texts have between half of all tokens and all; every cell and the KL count.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace {

using m2d::LossParams;
using m2d::PoolParams;
using m2d::StateView;
using m2d::TokenBlock;
using m2d::cuda::LossLaunch;
using m2d::cuda::StateType;

constexpr size_t kFlushBytes = size_t{256} << 20;
constexpr int kWarmup = 3;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Allocations of the process: it ends with them.
template <class T>
T* allocate(size_t count) {
  void* data = nullptr;
  check(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(data);
}

// About normal: the sum of four uniform numbers.
template <class T>
__global__ void fill(T* x, size_t count, uint32_t seed) {
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += step) {
    uint64_t bits = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
    bits ^= bits >> 31;
    float sum = 0.0f;
    for (int part = 0; part < 4; ++part)
      sum += static_cast<float>((bits >> (16 * part)) & 0xffff) * (1.0f / 65536.0f) - 0.5f;
    x[i] = static_cast<T>(sum * 1.7320508f);
  }
}

struct Shape {
  int64_t layers, pairs, tokens, width;
  std::vector<int64_t> dims;
};

// The hidden states, their gradients, and all that the launches are given.
template <class Scalar>
struct Problem {
  StateType type;
  size_t state_size;  // elements
  std::vector<StateView> states, grads;
  TokenBlock block{};
  PoolParams tokens{}, token_grads{};
  std::vector<int64_t> dims, layers;
  std::vector<double> weights, kl_weights;
  LossParams<float> loss{};
  void* workspace;

  Problem(const Shape& shape, StateType state_type) : type(state_type), dims(shape.dims) {
    const int64_t texts = 2 * shape.pairs;
    state_size = static_cast<size_t>(texts * shape.tokens * shape.width);
    for (int64_t l = 0; l < shape.layers; ++l) {
      Scalar* state = allocate<Scalar>(state_size);
      fill<<<1024, 256>>>(state, state_size, static_cast<uint32_t>(l + 1) * 7919u);
      const int64_t text_stride = shape.tokens * shape.width;
      states.push_back({state, text_stride, shape.width});
      grads.push_back({allocate<Scalar>(state_size), text_stride, shape.width});
      layers.push_back(l);
    }
    block.num_texts = texts;
    block.num_tokens = shape.tokens;
    block.coefficients = coefficients(texts, shape.tokens);
    tokens.num_layers = shape.layers;
    tokens.num_blocks = 1;
    tokens.num_texts = texts;
    tokens.dim = shape.width;
    tokens.blocks = &block;
    token_grads = tokens;
    tokens.states = states.data();
    token_grads.states = grads.data();
    weights.assign(shape.layers * dims.size(), 1.0);
    kl_weights.assign(shape.layers, 0.5);
    kl_weights.back() = 0.0;
    set_loss(shape, texts);
    workspace = allocate<char>(m2d::cuda::loss_workspace_bytes(loss, {&tokens, type, false}));
    check(cudaDeviceSynchronize(), "fill");
  }

  static const float* coefficients(int64_t texts, int64_t tokens) {
    std::vector<float> table(texts * tokens, 0.0f);
    for (int64_t n = 0; n < texts; ++n) {
      const int64_t length = std::max<int64_t>(1, tokens - n * 37 % (tokens / 2 + 1));
      std::fill_n(table.begin() + n * tokens, length, 1.0f / static_cast<float>(length));
    }
    float* data = allocate<float>(table.size());
    check(cudaMemcpy(data, table.data(), table.size() * sizeof(float), cudaMemcpyHostToDevice),
          "coefficients");
    return data;
  }

  void set_loss(const Shape& shape, int64_t texts) {
    const int64_t num_dims = static_cast<int64_t>(dims.size());
    loss.num_layers = shape.layers;
    loss.num_texts = texts;
    loss.num_anchors = loss.num_candidates = loss.column_size = shape.pairs;
    loss.dim = shape.width;
    loss.num_dims = num_dims;
    loss.dims = dims.data();
    loss.weights = weights.data();
    loss.kl_weights = kl_weights.data();
    loss.scale = 20.0;
    loss.kl_temperature = 0.3;
    loss.pooled = {nullptr, texts * shape.width, texts};
    loss.pooled_grad = {allocate<float>(shape.layers * texts * shape.width), texts * shape.width,
                        texts};
    loss.cells = allocate<float>(shape.layers * num_dims);
    loss.kl = allocate<float>(shape.layers);
    loss.loss = allocate<float>(1);
  }

  void forward(cudaStream_t stream) const {
    const LossLaunch how{&tokens, type, false};
    check(m2d::cuda::launch_loss(loss, how, workspace, stream), "launch_loss");
  }
  void backward(cudaStream_t stream) const {
    check(m2d::cuda::launch_pool_backward(token_grads, type, loss.pooled_grad.data, layers.data(),
                                          nullptr, stream),
          "launch_pool_backward");
  }
  void floor(cudaStream_t stream) const {
    for (size_t l = 0; l < states.size(); ++l)
      check(cudaMemcpyAsync(grads[l].data, states[l].data, state_size * sizeof(Scalar),
                            cudaMemcpyDeviceToDevice, stream),
            "cudaMemcpyAsync");
  }
};

cudaGraphExec_t capture(cudaStream_t stream, const std::function<void()>& work) {
  cudaGraph_t graph;
  cudaGraphExec_t result;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  work();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&result, graph, 0), "cudaGraphInstantiate");
  return result;
}

template <class Scalar>
void measure(const Shape& shape, StateType type, int rounds) {
  const Problem<Scalar> problem(shape, type);
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  struct Timed {
    const char* name;
    cudaGraphExec_t graph;
    std::vector<float> microseconds;
  };
  std::vector<Timed> all;
  const auto add = [&](const char* name, const std::function<void()>& work) {
    all.push_back({name, capture(stream, work), {}});
  };
  add("floor", [&] { problem.floor(stream); });
  add("forward", [&] { problem.forward(stream); });
  add("backward", [&] { problem.backward(stream); });
  add("both", [&] {
    problem.forward(stream);
    problem.backward(stream);
  });
  char* flush = allocate<char>(kFlushBytes);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  for (int round = -kWarmup; round < rounds; ++round) {
    for (Timed& timed : all) {
      check(cudaMemsetAsync(flush, round & 1, kFlushBytes, stream), "flush");
      check(cudaEventRecord(begin, stream), "begin");
      check(cudaGraphLaunch(timed.graph, stream), timed.name);
      check(cudaEventRecord(end, stream), "end");
      check(cudaStreamSynchronize(stream), timed.name);
      float milliseconds;
      check(cudaEventElapsedTime(&milliseconds, begin, end), timed.name);
      if (round >= 0) timed.microseconds.push_back(1000.0f * milliseconds);
    }
  }
  float loss;
  check(cudaMemcpy(&loss, problem.loss.loss, sizeof(loss), cudaMemcpyDeviceToHost), "loss");
  std::printf("{\"loss\": %.9g", loss);
  for (const Timed& timed : all) {
    std::printf(", \"%s\": [", timed.name);
    for (size_t i = 0; i < timed.microseconds.size(); ++i)
      std::printf("%s%.3f", i == 0 ? "" : ", ", timed.microseconds[i]);
    std::printf("]");
  }
  std::printf("}\n");
}

std::vector<int64_t> parse_dims(const std::string& text) {
  std::vector<int64_t> dims;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    dims.push_back(std::stoll(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return dims;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 8) {
    std::fprintf(stderr, "gpu_kernels LAYERS PAIRS TOKENS WIDTH DIM,DIM,... DTYPE ROUNDS\n");
    return 2;
  }
  const Shape shape{std::stoll(arguments[1]), std::stoll(arguments[2]), std::stoll(arguments[3]),
                    std::stoll(arguments[4]), parse_dims(arguments[5])};
  const std::string dtype = arguments[6];
  const int rounds = std::stoi(arguments[7]);
  if (dtype == "float32") {
    measure<float>(shape, StateType::kFloat, rounds);
  } else if (dtype == "bfloat16") {
    measure<__nv_bfloat16>(shape, StateType::kBFloat16, rounds);
  } else if (dtype == "float16") {
    measure<__half>(shape, StateType::kHalf, rounds);
  } else {
    std::fprintf(stderr, "DTYPE must be float32, bfloat16 or float16, not %s\n", arguments[6]);
    return 2;
  }
  return 0;
}
