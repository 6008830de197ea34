// Runs one launcher of csrc/cuda/launch.h on one problem, once per grid size and seed, and demands the same bits of all.
//
//   driver LAUNCHER PROBLEM RESULTS SEEDS GRIDS       e.g. driver loss problem.bin results.bin 0,1,3 1,2,5
//
// Every array is an allocation of its exact size, filled with 0xFF: AddressSanitizer sees what runs over, and what is
// read before it is written is NaN. Exit status 3: a launch failed; 4: results depend on schedule or grid.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "launch.h"
#include "simt_emu.h"

namespace {

using m2d::LossParams;
using m2d::PoolParams;
using m2d::cuda::StateType;

[[noreturn]] void stop(int status, const std::string& message) {
  std::fprintf(stderr, "driver: %s\n", message.c_str());
  std::exit(status);
}

// Named arrays of bytes: what problems and results are. On file each is (int64 size of name, name, int64 size, bytes).
class Arrays {
 public:
  static Arrays read(const char* path) {
    Arrays arrays;
    FILE* file = std::fopen(path, "rb");
    if (file == nullptr) stop(2, std::string("cannot read ") + path);
    int64_t size;
    while (std::fread(&size, sizeof(size), 1, file) == 1) {
      std::string name(size, '\0');
      if (std::fread(name.data(), 1, size, file) != name.size() ||
          std::fread(&size, sizeof(size), 1, file) != 1)
        stop(2, "truncated problem");
      std::vector<char>& bytes = arrays.arrays_[name];
      bytes.resize(size);
      if (size > 0 && std::fread(bytes.data(), 1, size, file) != bytes.size())
        stop(2, "truncated problem");
    }
    std::fclose(file);
    return arrays;
  }

  void write(const char* path) const {
    FILE* file = std::fopen(path, "wb");
    if (file == nullptr) stop(2, std::string("cannot write ") + path);
    for (const auto& [name, bytes] : arrays_) {
      const int64_t sizes[2] = {static_cast<int64_t>(name.size()),
                                static_cast<int64_t>(bytes.size())};
      std::fwrite(&sizes[0], sizeof(int64_t), 1, file);
      std::fwrite(name.data(), 1, name.size(), file);
      std::fwrite(&sizes[1], sizeof(int64_t), 1, file);
      if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), file);
    }
    if (std::fclose(file) != 0) stop(2, std::string("cannot write ") + path);
  }

  bool has(const std::string& name) const { return arrays_.count(name) != 0; }
  const std::vector<char>& bytes(const std::string& name) const {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) stop(2, "the problem has no " + name);
    return found->second;
  }
  template <class T>
  std::vector<T> list(const std::string& name) const {
    const std::vector<char>& source = bytes(name);
    std::vector<T> values(source.size() / sizeof(T));
    std::memcpy(values.data(), source.data(), values.size() * sizeof(T));
    return values;
  }
  int64_t integer(const std::string& name) const { return list<int64_t>(name).at(0); }
  double real(const std::string& name) const { return list<double>(name).at(0); }

  void set(const std::string& name, const void* data, size_t size) {
    const char* begin = static_cast<const char*>(data);
    arrays_[name] = size == 0 ? std::vector<char>() : std::vector<char>(begin, begin + size);
  }
  const std::map<std::string, std::vector<char>>& all() const { return arrays_; }

 private:
  std::map<std::string, std::vector<char>> arrays_;
};

// "Device memory" that lives as long as one launch.
class Memory {
 public:
  ~Memory() {
    for (const Piece& piece : pieces_) std::free(piece.allocation);
  }

  // `shift` bytes past an alignment of 256; nullptr for nothing.
  void* allocate(size_t size, size_t shift = 0) {
    if (size == 0) return nullptr;
    void* allocation = nullptr;
    if (posix_memalign(&allocation, 256, size + shift) != 0) stop(2, "no memory");
    std::memset(allocation, 0xff, size + shift);
    pieces_.push_back({allocation, static_cast<char*>(allocation) + shift, nullptr});
    return pieces_.back().data;
  }

  // A copy that nobody may write to; `bytes` must outlive this.
  void* input(const std::vector<char>& bytes, size_t shift = 0) {
    void* data = allocate(bytes.size(), shift);
    if (data == nullptr) return nullptr;
    std::memcpy(data, bytes.data(), bytes.size());
    pieces_.back().original = &bytes;
    return data;
  }

  bool inputs_are_unchanged() const {
    for (const Piece& piece : pieces_)
      if (piece.original != nullptr &&
          std::memcmp(piece.data, piece.original->data(), piece.original->size()) != 0)
        return false;
    return true;
  }

 private:
  struct Piece {
    void* allocation;
    char* data;
    const std::vector<char>* original;
  };
  std::vector<Piece> pieces_;
};

std::string state_name(int64_t layer, int64_t block) {
  return "state." + std::to_string(layer) + "." + std::to_string(block);
}

// The tokens of a problem: hidden states to read, or gradients to write.
struct Tokens {
  PoolParams params{};
  StateType type;
  std::vector<m2d::TokenBlock> blocks;
  std::vector<m2d::StateView> states;
  std::vector<size_t> sizes;  // of the states, in bytes

  Tokens(const Arrays& problem, Memory& memory, bool read)
      : type(static_cast<StateType>(problem.integer("type"))) {
    const std::vector<int64_t> num_texts = problem.list<int64_t>("block_texts");
    const std::vector<int64_t> num_tokens = problem.list<int64_t>("block_tokens");
    const std::vector<int64_t> text_strides = problem.list<int64_t>("text_strides");
    const std::vector<int64_t> token_strides = problem.list<int64_t>("token_strides");
    const std::vector<int64_t> elements = problem.list<int64_t>("state_elements");
    const size_t element = type == StateType::kFloat ? 4 : 2;
    const size_t shift = element * problem.integer("state_shift");
    params.num_layers = problem.integer("num_layers");
    params.num_blocks = static_cast<int64_t>(num_texts.size());
    params.dim = problem.integer("dim");
    for (int64_t b = 0; b < params.num_blocks; ++b) {
      m2d::TokenBlock block{};
      block.first_text = params.num_texts;
      block.num_texts = num_texts[b];
      block.num_tokens = num_tokens[b];
      block.coefficients = memory.input(problem.bytes("coefficients." + std::to_string(b)));
      if (problem.has("token_offsets"))
        block.token_offsets =
            static_cast<const int64_t*>(memory.input(problem.bytes("token_offsets")));
      blocks.push_back(block);
      params.num_texts += block.num_texts;
    }
    for (int64_t l = 0; l < params.num_layers; ++l) {
      for (int64_t b = 0; b < params.num_blocks; ++b) {
        sizes.push_back(element * elements[b]);
        void* data = read ? memory.input(problem.bytes(state_name(l, b)), shift)
                          : memory.allocate(sizes.back(), shift);
        states.push_back({data, text_strides[b], token_strides[b]});
      }
    }
    params.blocks = blocks.data();
    params.states = states.data();
  }

  void add_results(Arrays& results) const {
    for (size_t i = 0; i < states.size(); ++i)
      results.set(state_name(i / blocks.size(), i % blocks.size()), states[i].data, sizes[i]);
  }
};

cudaError_t run_pool(const Arrays& problem, bool max, Memory& memory, Arrays& results) {
  Tokens tokens(problem, memory, true);
  const size_t size = 4 * tokens.params.num_layers * tokens.params.num_texts * tokens.params.dim;
  tokens.params.pooled = memory.allocate(size);
  int32_t* indices = max ? static_cast<int32_t*>(memory.allocate(size)) : nullptr;
  const cudaError_t error =
      max ? m2d::cuda::launch_pool_max(tokens.params, tokens.type, indices, nullptr)
          : m2d::cuda::launch_pool(tokens.params, tokens.type, nullptr);
  results.set("pooled", tokens.params.pooled, size);
  if (max) results.set("indices", indices, size);
  return error;
}

enum class Backward { kWrite, kAdd, kMax };

cudaError_t run_pool_backward(const Arrays& problem, Backward kind, Memory& memory,
                              Arrays& results) {
  Tokens tokens(problem, memory, false);
  const float* pooled_grad = static_cast<const float*>(memory.input(problem.bytes("pooled_grad")));
  const std::vector<int64_t> layers = problem.list<int64_t>("layers");
  const float* grad_output = nullptr;
  if (problem.has("grad_output"))
    grad_output = static_cast<const float*>(memory.input(problem.bytes("grad_output")));
  cudaError_t error = cudaErrorInvalidValue;
  if (kind == Backward::kMax) {
    const void* indices = memory.input(problem.bytes("indices"));
    error = m2d::cuda::launch_pool_max_backward(tokens.params, tokens.type, pooled_grad,
                                                static_cast<const int32_t*>(indices), layers.data(),
                                                nullptr);
  } else if (kind == Backward::kAdd) {
    const Tokens before(problem, memory, true);
    std::vector<const void*> incoming;
    for (const m2d::StateView& state : before.states) incoming.push_back(state.data);
    error =
        m2d::cuda::launch_pool_backward_add(tokens.params, tokens.type, pooled_grad, layers.data(),
                                            grad_output, incoming.data(), nullptr);
  } else {
    error = m2d::cuda::launch_pool_backward(tokens.params, tokens.type, pooled_grad, layers.data(),
                                            grad_output, nullptr);
  }
  tokens.add_results(results);
  return error;
}

cudaError_t run_loss(const Arrays& problem, Memory& memory, Arrays& results) {
  std::unique_ptr<Tokens> tokens;
  LossParams<float> p{};
  p.num_layers = problem.integer("num_layers");
  p.num_texts = problem.integer("num_texts");
  p.num_anchors = problem.integer("num_anchors");
  p.dim = problem.integer("dim");
  p.gathered = problem.has("candidates");
  p.num_candidates = p.gathered ? problem.integer("num_candidates") : p.num_texts - p.num_anchors;
  p.target_offset = problem.integer("target_offset");
  const std::vector<int64_t> dims = problem.list<int64_t>("dims");
  const std::vector<double> weights = problem.list<double>("weights");
  const std::vector<double> kl_weights = problem.list<double>("kl_weights");
  p.num_dims = static_cast<int64_t>(dims.size());
  p.dims = dims.data();
  p.weights = weights.data();
  p.kl_weights = kl_weights.data();
  p.scale = problem.real("scale");
  p.hardness = problem.real("hardness");
  p.own_hardness = problem.real("own_hardness");
  p.column_size = problem.integer("column_size");
  p.kl_temperature = problem.real("kl_temperature");
  p.normalize = problem.integer("normalize") != 0;

  const size_t shift = 4 * problem.integer("row_shift");
  const size_t pooled_size = 4 * p.num_layers * p.num_texts * p.dim;
  const size_t candidate_size = 4 * p.num_layers * p.num_candidates * p.dim;
  const bool wants_grad = problem.integer("wants_grad") != 0;
  const auto floats = [&](size_t size) { return static_cast<float*>(memory.allocate(size)); };
  m2d::cuda::LossLaunch how{nullptr, StateType::kFloat, problem.integer("allow_tf32") != 0};
  p.pooled = {nullptr, p.num_texts * p.dim, p.num_texts};
  if (problem.has("pooled")) {
    p.pooled.data = static_cast<const float*>(memory.input(problem.bytes("pooled"), shift));
    if (problem.integer("were_half") != 0) how.type = StateType::kBFloat16;
  } else {
    tokens = std::make_unique<Tokens>(problem, memory, true);
    if (!m2d::cuda::fits(tokens->params)) stop(2, "the tokens do not fit");
    how.tokens = &tokens->params;
    how.type = tokens->type;
  }
  if (wants_grad) p.pooled_grad = {floats(pooled_size), p.num_texts * p.dim, p.num_texts};
  if (p.gathered) {
    const void* rows = memory.input(problem.bytes("candidates"), shift);
    p.candidates = {static_cast<const float*>(rows), p.num_candidates * p.dim, p.num_candidates};
    if (wants_grad)
      p.candidate_grad = {floats(candidate_size), p.num_candidates * p.dim, p.num_candidates};
  }
  p.cells = floats(4 * p.num_layers * p.num_dims);
  p.kl = floats(4 * p.num_layers);
  p.loss = floats(4);
  if (!m2d::cuda::fits(p)) stop(2, "the loss does not fit");
  void* workspace = memory.allocate(m2d::cuda::loss_workspace_bytes(p, how));
  const cudaError_t error = m2d::cuda::launch_loss(p, how, workspace, nullptr);

  results.set("cells", p.cells, 4 * p.num_layers * p.num_dims);
  results.set("kl", p.kl, 4 * p.num_layers);
  results.set("loss", p.loss, 4);
  if (wants_grad) results.set("pooled_grad", p.pooled_grad.data, pooled_size);
  if (wants_grad && p.gathered)
    results.set("candidate_grad", p.candidate_grad.data, candidate_size);
  return error;
}

Arrays run(const std::string& launcher, const Arrays& problem) {
  Arrays results;
  Memory memory;
  cudaError_t error = cudaErrorInvalidValue;
  if (launcher == "pool" || launcher == "pool_max") {
    error = run_pool(problem, launcher == "pool_max", memory, results);
  } else if (launcher == "pool_backward") {
    error = run_pool_backward(problem, Backward::kWrite, memory, results);
  } else if (launcher == "pool_backward_add") {
    error = run_pool_backward(problem, Backward::kAdd, memory, results);
  } else if (launcher == "pool_max_backward") {
    error = run_pool_backward(problem, Backward::kMax, memory, results);
  } else if (launcher == "loss") {
    error = run_loss(problem, memory, results);
  } else {
    stop(2, "no launcher is called " + launcher);
  }
  if (error != cudaSuccess) stop(3, "launch error " + std::to_string(static_cast<int>(error)));
  if (!memory.inputs_are_unchanged()) stop(3, "an input was written to");
  return results;
}

std::vector<int> parse_list(const char* text) {
  std::vector<int> values;
  for (char* end = nullptr; *text != '\0'; text = *end == ',' ? end + 1 : end) {
    values.push_back(static_cast<int>(std::strtol(text, &end, 10)));
    if (end == text) stop(2, std::string("not a list of numbers: ") + text);
  }
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) stop(2, "usage: driver LAUNCHER PROBLEM RESULTS SEEDS GRIDS");
  const Arrays problem = Arrays::read(argv[2]);
  Arrays first;
  bool differs = false;
  for (const int grid : parse_list(argv[5])) {
    for (const int seed : parse_list(argv[4])) {
      simt::set_sm_count(grid);
      simt::set_seed(seed);
      const Arrays results = run(argv[1], problem);
      if (first.all().empty()) first = results;
      for (const auto& [name, bytes] : first.all()) {
        if (results.bytes(name) == bytes) continue;
        std::fprintf(stderr, "driver: %s differs, seed %d, grid %d\n", name.c_str(), seed, grid);
        differs = true;
      }
    }
  }
  first.write(argv[3]);
  return differs ? 4 : 0;
}
