#include "deferred.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
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

DeferredHooks::DeferredHooks(const std::vector<Tensor>& states, const std::vector<int64_t>& places,
                             int64_t blocks, const std::optional<Tensor>& cu_seqlens,
                             size_t own_references)
    : hooks_(std::make_shared<Hooks>()) {
  TORCH_CHECK(states.size() == places.size(), "a place is needed for each of the ", states.size(),
              " states, got ", places.size());
  hooks_->blocks = blocks;
  hooks_->cu_seqlens = cu_seqlens;
  hooks_->own_references = own_references;
  for (size_t i = 0; i < states.size(); ++i) {
    states[i].register_hook([hooks = hooks_, place = places[i]](const Tensor& grad) -> Tensor {
      return hooks->add(place, grad);
    });
  }
}

void DeferredHooks::start(std::vector<Tensor> coefficients, const Tensor& pooled_grad,
                          const std::optional<Tensor>& grad_output,
                          const std::vector<int64_t>& expected) {
  hooks_->coefficients = std::move(coefficients);
  hooks_->pooled_grad = pooled_grad;
  hooks_->grad_output = grad_output;
  hooks_->expected = {expected.begin(), expected.end()};
  hooks_->backward = torch::autograd::get_current_graph_task_id();
}

std::vector<int64_t> DeferredHooks::finish() {
  const std::vector<int64_t> missing(hooks_->expected.begin(), hooks_->expected.end());
  hooks_->backward = Hooks::kNone;
  hooks_->coefficients.clear();
  hooks_->pooled_grad.reset();
  hooks_->grad_output.reset();
  hooks_->expected.clear();
  return missing;
}

Tensor DeferredHooks::Hooks::add(int64_t place, const Tensor& grad) {
  if (!grad.defined()) return {};  // where a backward is ours, `finish` reports it
  fewest_references = std::min(fewest_references, grad.use_count());
  if (backward == kNone || backward != torch::autograd::get_current_graph_task_id()) return {};
  TORCH_CHECK(!grad.requires_grad(),
              "the gradient of m2d_ext's loss cannot be differentiated again (create_graph=True)");
  expected.erase(place);
  const bool in_place = is_own(grad);
  const Tensor flat = cu_seqlens.has_value() ? grad.reshape({-1, grad.size(-1)}) : grad;
  const Tensor& table = coefficients[place % blocks];
  ++added;
  if (in_place) {
    ++added_in_place;
    add_pooled_grad_(flat, rows_of(place), grad_output, table, cu_seqlens);
    return {};
  }
  return add_pooled_grad(flat, rows_of(place), grad_output, table, cu_seqlens).view(grad.sizes());
}

// dP of the texts of one layer and block.
Tensor DeferredHooks::Hooks::rows_of(int64_t place) const {
  const Tensor layer = pooled_grad.select(0, place / blocks);
  if (blocks == 1) return layer;
  const int64_t block = place % blocks;
  int64_t first = 0;
  for (int64_t b = 0; b < block; ++b) first += coefficients[b].size(0);
  return layer.narrow(0, first, coefficients[block].size(0));
}

// What autograd asks before it accumulates in place. (An addition hands one gradient to both of its terms.)
bool DeferredHooks::Hooks::is_own(const Tensor& grad) const {
  return grad.is_cpu() && grad.is_contiguous() && !at::isTensorSubclassLike(grad) &&
         torch::autograd::impl::is_tensor_stealable(grad, own_references) && grad.has_storage() &&
         grad.storage().use_count() == 1;
}

}  // namespace m2d
