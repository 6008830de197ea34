// The hooks of deferred gradients, which m2d_ext/deferred.py decides on. Here autograd calls them without waiting for
// Python, and it can be asked who holds a gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
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

// What the hooks add in one backward. Lives as long as that: autograd drops it with all else of the backward, also
// where an error ended it.
class DeferredBackward {
 public:
  DeferredBackward(std::vector<Tensor> coefficients, const Tensor& pooled_grad,
                   const std::optional<Tensor>& grad_output, const std::vector<int64_t>& expected);

  bool is_running() const;  // whether it is the one that this thread is in
  void arrived(int64_t place);
  std::vector<int64_t> missing() const;  // expected places that got no gradient

  const Tensor& table(int64_t block) const { return coefficients_[block]; }
  const std::optional<Tensor>& grad_output() const { return grad_output_; }
  // dP of the texts of one layer and block.
  Tensor rows_of(int64_t place) const;

 private:
  const int id_;  // autograd's
  const std::vector<Tensor> coefficients_;
  const Tensor pooled_grad_;
  const std::optional<Tensor> grad_output_;
  mutable std::mutex mutex_;  // of what follows: hooks of one backward may run on several threads
  std::set<int64_t> expected_;
};

// One hook on each of some hidden states. In a backward that `start` was called in it adds g a[n, t] dP[l, n, :] to the
// gradient that autograd brings, before any other hook of the state sees it; in others it lets gradients pass. In place
// where autograd alone holds what it brings.
class DeferredHooks {
 public:
  // states[i] is the one at places[i] of the loss's states, and no leaf.
  // own_references: of a gradient that autograd alone holds, as `fewest_references` has found them.
  DeferredHooks(const std::vector<Tensor>& states, const std::vector<int64_t>& places,
                int64_t blocks, const std::optional<Tensor>& cu_seqlens, size_t own_references);

  // A table per block, dP (L, N, D), g or nothing for 1, and the places that the present backward will come to. For as
  // long as the result lives, the hooks add.
  std::shared_ptr<DeferredBackward> start(std::vector<Tensor> coefficients,
                                          const Tensor& pooled_grad,
                                          const std::optional<Tensor>& grad_output,
                                          const std::vector<int64_t>& expected);

  // Additions so far, and how many of them were in place.
  int64_t added() const { return shared_->added; }
  int64_t added_in_place() const { return shared_->added_in_place; }

  // The fewest references to a gradient inside a hook so far: every version of torch has its own hands on the way.
  size_t fewest_references() const { return shared_->fewest_references; }

 private:
  class Hook;

  // Lives as long as the states do.
  struct Shared {
    const int64_t blocks;
    const std::optional<Tensor> cu_seqlens;  // packed states only
    const size_t own_references;

    std::mutex mutex;
    std::vector<std::weak_ptr<DeferredBackward>> backwards;

    std::atomic<int64_t> added = 0;
    std::atomic<int64_t> added_in_place = 0;
    std::atomic<size_t> fewest_references = std::numeric_limits<size_t>::max();

    std::shared_ptr<DeferredBackward> running();
    // The gradient with its addition; itself where nothing is to be added, or it was in place.
    Tensor add(int64_t place, const Tensor& grad);
    bool is_own(const Tensor& grad) const;
  };

  const std::shared_ptr<Shared> shared_;
};

}  // namespace m2d
