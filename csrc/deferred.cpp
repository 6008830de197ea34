#include "deferred.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <initializer_list>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace m2d {
namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::Node;

// A node of the autograd graph, and which of its outputs.
using Output = std::pair<Node*, uint32_t>;

Output output_of(const Tensor& state) {
  return {state.grad_fn().get(), static_cast<uint32_t>(state.output_nr())};
}

// Adds to the places those of the wanted outputs that lie on a way from the root, and finds a leaf that does.
void walk(Node* root, const std::map<Output, int64_t>& wanted, Deferrable& result) {
  std::unordered_set<Node*> seen{root};
  std::vector<Node*> waiting{root};
  std::set<int64_t> found;
  while (!waiting.empty() && (found.size() < wanted.size() || !result.leaf.has_value())) {
    const Node* node = waiting.back();
    waiting.pop_back();
    for (const torch::autograd::Edge& edge : node->next_edges()) {
      Node* below = edge.function.get();
      if (below == nullptr) continue;
      const auto place = wanted.find({below, edge.input_nr});
      if (place != wanted.end()) found.insert(place->second);
      if (!seen.insert(below).second) continue;
      waiting.push_back(below);
      const auto* leaf = dynamic_cast<const AccumulateGrad*>(below);
      // One that was frozen since has no node that Python could ask for.
      if (leaf != nullptr && leaf->variable.requires_grad() && !result.leaf.has_value())
        result.leaf = leaf->variable;
    }
  }
  result.places.insert(result.places.end(), found.begin(), found.end());
}

Tensor add_pooled_grad(const Tensor& grad, const Tensor& pooled_grad,
                       const std::optional<Tensor>& grad_output, const Tensor& coefficients,
                       const std::optional<Tensor>& cu_seqlens) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("m2d_ext::add_pooled_grad", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
                        const std::optional<Tensor>&)>();
  return op.call(grad, pooled_grad, grad_output, coefficients, cu_seqlens);
}

void add_pooled_grad_(const Tensor& grad, const Tensor& pooled_grad,
                      const std::optional<Tensor>& grad_output, const Tensor& coefficients,
                      const std::optional<Tensor>& cu_seqlens) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("m2d_ext::add_pooled_grad_", "")
                             .typed<void(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                         const Tensor&, const std::optional<Tensor>&)>();
  op.call(grad, pooled_grad, grad_output, coefficients, cu_seqlens);
}

// A hook runs on the stream of its state's layer, and what it reads belongs to the loss's: it must not be given to
// others before it was read.
void record_stream(const at::Device& device, std::initializer_list<std::optional<Tensor>> tensors) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  const c10::Stream stream = guard.getStream(device);
  for (const std::optional<Tensor>& tensor : tensors) {
    if (tensor.has_value()) guard.recordDataPtrOnStream(tensor->storage().data_ptr(), stream);
  }
}

}  // namespace

Deferrable deferrable(const std::vector<Tensor>& states, int64_t blocks) {
  const int64_t count = static_cast<int64_t>(states.size());
  std::unordered_map<Node*, int> times;
  for (const Tensor& state : states) ++times[output_of(state).first];
  Deferrable result;
  for (int64_t block = 0; block < blocks; ++block) {
    const Output root = output_of(states[count - blocks + block]);
    if (root.first == nullptr) continue;
    std::map<Output, int64_t> wanted;
    for (int64_t place = block; place < count; place += blocks) {
      const Output output = output_of(states[place]);
      if (output.first != nullptr && output != root && times[output.first] == 1)
        wanted[output] = place;
    }
    walk(root.first, wanted, result);
  }
  if (!result.leaf.has_value()) result.places.clear();
  return result;
}

DeferredBackward::DeferredBackward(std::vector<Tensor> coefficients, const Tensor& pooled_grad,
                                   const std::optional<Tensor>& grad_output,
                                   const std::vector<int64_t>& expected)
    : id_(torch::autograd::get_current_graph_task_id()),
      coefficients_(std::move(coefficients)),
      // With its history the graph would hold itself: states hold hooks.
      pooled_grad_(pooled_grad.detach()),
      grad_output_(grad_output.has_value() ? std::make_optional(grad_output->detach())
                                           : std::nullopt),
      expected_(expected.begin(), expected.end()) {}

bool DeferredBackward::is_running() const {
  return id_ == torch::autograd::get_current_graph_task_id();
}

void DeferredBackward::arrived(int64_t place) {
  const std::lock_guard<std::mutex> lock(mutex_);
  expected_.erase(place);
}

std::vector<int64_t> DeferredBackward::missing() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {expected_.begin(), expected_.end()};
}

Tensor DeferredBackward::rows_of(int64_t place) const {
  const int64_t blocks = static_cast<int64_t>(coefficients_.size());
  const Tensor layer = pooled_grad_.select(0, place / blocks);
  if (blocks == 1) return layer;
  const int64_t block = place % blocks;
  int64_t first = 0;
  for (int64_t b = 0; b < block; ++b) first += coefficients_[b].size(0);
  return layer.narrow(0, first, coefficients_[block].size(0));
}

// Of one output of a state's node.
class DeferredHooks::Hook : public torch::autograd::FunctionPreHook {
 public:
  Hook(std::shared_ptr<Shared> shared, int64_t place, uint32_t output)
      : shared_(std::move(shared)), place_(place), output_(output) {}

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads) override {
    const Tensor& grad = grads[output_];
    if (!grad.defined()) return grads;  // where the backward is ours, `missing` tells
    Tensor sum = shared_->add(place_, grad);
    torch::autograd::variable_list result = grads;
    result[output_] = std::move(sum);
    return result;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "m2d_ext's deferred gradients do not work with compiled autograd: "
                                "construct the loss with deferred=False");
  }

 private:
  const std::shared_ptr<Shared> shared_;
  const int64_t place_;
  const uint32_t output_;
};

DeferredHooks::DeferredHooks(const std::vector<Tensor>& states, const std::vector<int64_t>& places,
                             int64_t blocks, const std::optional<Tensor>& cu_seqlens,
                             size_t own_references)
    : shared_(new Shared{blocks, cu_seqlens, own_references, {}, {}}) {
  TORCH_CHECK(states.size() == places.size(), "a place is needed for each of the ", states.size(),
              " states, got ", places.size());
  for (size_t i = 0; i < states.size(); ++i) {
    // Before the hooks of others: they may read the gradient, scale it or clip it.
    auto& hooks = states[i].grad_fn()->tensor_pre_hooks();
    hooks.insert(hooks.begin(),
                 std::make_unique<Hook>(shared_, places[i], output_of(states[i]).second));
  }
}

std::shared_ptr<DeferredBackward> DeferredHooks::start(std::vector<Tensor> coefficients,
                                                       const Tensor& pooled_grad,
                                                       const std::optional<Tensor>& grad_output,
                                                       const std::vector<int64_t>& expected) {
  auto backward = std::make_shared<DeferredBackward>(std::move(coefficients), pooled_grad,
                                                     grad_output, expected);
  const std::lock_guard<std::mutex> lock(shared_->mutex);
  std::erase_if(shared_->backwards, [](const auto& one) { return one.expired(); });
  shared_->backwards.push_back(backward);
  return backward;
}

std::shared_ptr<DeferredBackward> DeferredHooks::Shared::running() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const std::weak_ptr<DeferredBackward>& one : backwards) {
    std::shared_ptr<DeferredBackward> backward = one.lock();
    if (backward != nullptr && backward->is_running()) return backward;
  }
  return nullptr;
}

Tensor DeferredHooks::Shared::add(int64_t place, const Tensor& given) {
  const size_t references = given.use_count();
  size_t fewest = fewest_references;
  while (references < fewest && !fewest_references.compare_exchange_weak(fewest, references)) {
  }
  const std::shared_ptr<DeferredBackward> backward = running();
  if (backward == nullptr) return given;
  TORCH_CHECK(!at::GradMode::is_enabled() && !given.requires_grad(),
              "the gradient of m2d_ext's loss cannot be differentiated again (create_graph=True)");
  backward->arrived(place);
  const bool in_place = is_own(given);
  const Tensor grad = given.layout() == at::kStrided ? given : given.to_dense();
  const Tensor flat = cu_seqlens.has_value() ? grad.reshape({-1, grad.size(-1)}) : grad;
  const Tensor rows = backward->rows_of(place);
  const Tensor& table = backward->table(place % blocks);
  const std::optional<Tensor>& factor = backward->grad_output();
  if (grad.is_cuda()) record_stream(grad.device(), {rows, table, factor, cu_seqlens});
  ++added;
  if (in_place) {
    ++added_in_place;
    add_pooled_grad_(flat, rows, factor, table, cu_seqlens);
    return given;
  }
  return add_pooled_grad(flat, rows, factor, table, cu_seqlens).view(grad.sizes());
}

// What autograd asks before it accumulates in place. (An addition hands one gradient to both of its terms.)
bool DeferredHooks::Shared::is_own(const Tensor& grad) const {
  return grad.is_cpu() && grad.layout() == at::kStrided && grad.is_contiguous() &&
         !grad._is_zerotensor() && !at::isTensorSubclassLike(grad) &&
         torch::autograd::impl::is_tensor_stealable(grad, own_references) && grad.has_storage() &&
         grad.storage().use_count() == 1;
}

}  // namespace m2d
