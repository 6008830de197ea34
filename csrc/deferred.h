// The hooks of deferred gradients, which m2d_ext/deferred.py decides on. Here autograd calls them without waiting for
// Python, and it can be asked who holds a gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <vector>

namespace m2d {

using at::Tensor;

// The states that the final one of their block was computed from, by nodes of their own.
struct Deferrable {
  std::vector<int64_t> places;  // among the states, layer-major with so many blocks to a layer
  std::optional<Tensor> leaf;   // one that they were computed from; without, there are no places
};
Deferrable deferrable(const std::vector<Tensor>& states, int64_t blocks);

// One hook on each of some hidden states. In the backward that `start` was called in it adds g a[n, t] dP[l, n, :] to the
// gradient that autograd brings; in others it lets gradients pass. In place where autograd alone holds what it brings.
class DeferredHooks {
 public:
  // states[i] is the one at places[i] of the loss's states.
  // own_references: of a gradient that autograd alone holds, as `fewest_references` has found them.
  DeferredHooks(const std::vector<Tensor>& states, const std::vector<int64_t>& places,
                int64_t blocks, const std::optional<Tensor>& cu_seqlens, size_t own_references);

  // A table per block, dP (L, N, D), g or nothing for 1, and the places that the present backward will come to.
  void start(std::vector<Tensor> coefficients, const Tensor& pooled_grad,
             const std::optional<Tensor>& grad_output, const std::vector<int64_t>& expected);

  // The expected places that got no gradient.
  std::vector<int64_t> finish();

  // Additions so far, and how many of them were in place.
  int64_t added() const { return hooks_->added; }
  int64_t added_in_place() const { return hooks_->added_in_place; }

  // The fewest references to a gradient inside a hook so far: every version of torch has its own hands on the way.
  size_t fewest_references() const { return hooks_->fewest_references; }

 private:
  // Lives as long as the states do.
  struct Hooks {
    static constexpr int kNone = -1;

    int64_t blocks;
    std::optional<Tensor> cu_seqlens;  // packed states only
    size_t own_references;

    // That of `start`, an id of autograd's: one that fails never comes to `finish`.
    int backward = kNone;
    std::vector<Tensor> coefficients;
    Tensor pooled_grad;
    std::optional<Tensor> grad_output;
    std::set<int64_t> expected;

    int64_t added = 0;
    int64_t added_in_place = 0;
    size_t fewest_references = std::numeric_limits<size_t>::max();

    // What takes the place of the gradient; undefined where that stays.
    Tensor add(int64_t place, const Tensor& grad);
    Tensor rows_of(int64_t place) const;
    bool is_own(const Tensor& grad) const;
  };

  const std::shared_ptr<Hooks> hooks_;
};

}  // namespace m2d
