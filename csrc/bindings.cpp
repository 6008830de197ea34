// The Python module m2d_ext._C and the only operator schemas. Each backend registers its own kernels.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "deferred.h"
#include "vector_levels.h"

// L hidden states of `blocks` tensors each come as one list, layer-major. `weights` (L, K) and
// `kl_weights` (L,) are float64 CPU tensors on every backend. docs in m2d_ext/ops.py.
TORCH_LIBRARY(m2d_ext, m) {
  m.def("pool(Tensor[] hidden_states, Tensor[] coefficients, Tensor? cu_seqlens) -> Tensor");
  m.def(
      "pool_backward(Tensor pooled_grad, Tensor? grad_output, int[] layers, Tensor[] coefficients, "
      "Tensor? cu_seqlens, ScalarType dtype) -> Tensor[]");
  m.def(
      "add_pooled_grad(Tensor grad, Tensor pooled_grad, Tensor? grad_output, Tensor coefficients, "
      "Tensor? cu_seqlens) -> Tensor");
  m.def(
      "add_pooled_grad_(Tensor(a!) grad, Tensor pooled_grad, Tensor? grad_output, "
      "Tensor coefficients, Tensor? cu_seqlens) -> ()");
  m.def(
      "pool_max(Tensor[] hidden_states, Tensor[] coefficients, Tensor? cu_seqlens) -> (Tensor, "
      "Tensor)");
  m.def(
      "pool_max_backward(Tensor pooled_grad, Tensor indices, int[] layers, Tensor[] coefficients, "
      "Tensor? cu_seqlens, ScalarType dtype) -> Tensor[]");
  m.def(
      "loss(Tensor[] hidden_states, Tensor[] coefficients, Tensor? cu_seqlens, Tensor weights, "
      "Tensor kl_weights, int[] dims, int num_columns, float scale, float kl_temperature, "
      "bool normalize, float hardness, float own_hardness, bool needs_grad) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "loss_and_gradients(Tensor[] hidden_states, Tensor[] coefficients, Tensor? cu_seqlens, "
      "Tensor weights, Tensor kl_weights, int[] dims, int num_columns, float scale, "
      "float kl_temperature, bool normalize, float hardness, float own_hardness, "
      "float grad_output, int[] layers) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "pooled_loss(Tensor pooled, Tensor? candidates, int target_offset, Tensor weights, "
      "Tensor kl_weights, int[] dims, int num_columns, float scale, float kl_temperature, "
      "bool normalize, float hardness, float own_hardness, bool needs_grad) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def("nested_cosines(Tensor a, Tensor b, int[] dims, bool pairs) -> Tensor");
  m.def(
      "nested_cosines_backward(Tensor grad, Tensor cosines, Tensor a, Tensor b, int[] dims, "
      "bool pairs, bool needs_a, bool needs_b) -> (Tensor, Tensor)");
  m.def("masked_logsumexp(Tensor scores, Tensor? mask, float scale, bool over_rows) -> Tensor");
  m.def(
      "masked_logsumexp_backward(Tensor grad, Tensor result, Tensor scores, Tensor? mask, "
      "float scale, bool over_rows) -> Tensor");
}

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["torch"] = TORCH_VERSION;
  info["cpu_capability"] = m2d::vector_level();
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the operators of torch.ops.m2d_ext.";
  m.def("build_info", &build_info, "What this extension was compiled with.");

  using at::Tensor;
  using m2d::Deferrable;
  using m2d::DeferredBackward;
  using m2d::DeferredHooks;
  namespace py = pybind11;
  m.def("deferrable", [](const std::vector<Tensor>& states, int64_t blocks) {
    Deferrable found = m2d::deferrable(states, blocks);
    return std::pair(std::move(found.places), std::move(found.leaf));
  });
  py::class_<DeferredBackward, std::shared_ptr<DeferredBackward>>(m, "DeferredBackward")
      .def("missing", &DeferredBackward::missing);
  py::class_<DeferredHooks>(m, "DeferredHooks", "See csrc/deferred.h and m2d_ext/deferred.py.")
      .def(py::init<const std::vector<Tensor>&, const std::vector<int64_t>&, int64_t,
                    const std::optional<Tensor>&, size_t>(),
           py::arg("states"), py::arg("places"), py::arg("blocks"), py::arg("cu_seqlens"),
           py::arg("own_references"))
      // A hook that drops the last hold on a tensor may wait for Python, under the lock that this waits for.
      .def("start", &DeferredHooks::start, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("added", &DeferredHooks::added)
      .def_property_readonly("added_in_place", &DeferredHooks::added_in_place)
      .def_property_readonly("fewest_references", &DeferredHooks::fewest_references);
}
