// mx::cpu_linears without Python, which takes longer than the products of a small model for a token.
//
// What it cannot do it hands to mx::linears, which is Python (ops.py). That tells it by `mx_serve` what it can do from
// then on. See cpu/build.py, which builds it against torch's stable interface for C++.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <vector>

#include "mx_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Text = std::optional<std::string>;

// Calls with these arguments are served by `multiply`.
struct Served {
  std::string format;
  Text activation, rule;
  ScalarType dtype;
  Multiply* multiply;
  Rounding rounding;
};
std::deque<Served> all_served;  // never erased from: pointers to entries stay good
std::shared_mutex guard;

const Served* find(const std::string& format, const Text& activation, const Text& rule, ScalarType dtype) {
  const std::shared_lock<std::shared_mutex> reading(guard);
  for (const Served& one : all_served)
    if (one.format == format && one.activation == activation && one.rule == rule && one.dtype == dtype) return &one;
  return nullptr;
}

bool is_plain(const Tensor& tensor, ScalarType dtype) {
  return tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous();
}

bool are_plain(const Tensors& elements, const Tensors& scales, const std::vector<std::optional<Tensor>>& biases,
               ScalarType dtype) {
  if (scales.size() != elements.size() || biases.size() != elements.size()) return false;
  for (size_t i = 0; i < elements.size(); ++i)
    if (!is_plain(elements[i], ScalarType::Byte) || !is_plain(scales[i], ScalarType::Byte) ||
        (biases[i] && !is_plain(*biases[i], dtype)))
      return false;
  return true;
}

Tensors multiply(const Served& served, const Tensor& x, int64_t tokens, const Tensors& elements, const Tensors& scales,
                 const std::vector<std::optional<Tensor>>& biases) {
  const int wide = served.dtype == ScalarType::Float;
  Tensors outputs;
  std::vector<Weight> weights;
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < x.dim(); ++axis) shape.push_back(x.size(axis));
  for (size_t i = 0; i < elements.size(); ++i) {
    shape.back() = elements[i].size(0);
    outputs.push_back(torch::stable::new_empty(x, shape));
    weights.push_back({static_cast<const uint8_t*>(elements[i].data_ptr()),
                       static_cast<const uint8_t*>(scales[i].data_ptr()), biases[i] ? biases[i]->data_ptr() : nullptr,
                       outputs[i].data_ptr(), elements[i].size(0), wide});
  }
  served.multiply(weights.data(), int(weights.size()), x.data_ptr(), wide, tokens, x.size(x.dim() - 1),
                  served.activation ? &served.rounding : nullptr, int(torch::stable::get_num_threads()));
  return outputs;
}

Tensors linears(Tensor x, Tensors elements, Tensors scales, std::vector<std::optional<Tensor>> biases,
                std::string format, Text activation, Text rule) {
  const int64_t size = x.dim() == 0 ? 0 : x.size(x.dim() - 1);
  const int64_t tokens = size == 0 ? 0 : x.numel() / size;
  const Served* served = find(format, activation, rule, x.scalar_type());
  if (served != nullptr && tokens > 0 && tokens <= MOST_TOKENS && is_plain(x, served->dtype) &&
      are_plain(elements, scales, biases, served->dtype))
    return multiply(*served, x, tokens, elements, scales, biases);
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),          from(elements), from(scales),       from(biases), from(format),
                                    from(activation), from(rule),     from(std::nullopt), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mx::linears", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensors>(stack[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mx, CPU, library) { library.impl("cpu_linears", TORCH_BOX(&linears)); }

// From now on serve these arguments; no activation and no rule if they are null. wide: x is float32, otherwise bfloat16.
extern "C" void mx_serve(const char* format, const char* activation, const char* rule, int wide, Multiply* multiply,
                         const Rounding* rounding) {
  const auto text = [](const char* given) { return given == nullptr ? Text() : Text(given); };
  const Rounding kept = rounding == nullptr ? Rounding{} : *rounding;
  const std::unique_lock<std::shared_mutex> writing(guard);
  all_served.push_back(
      {format, text(activation), text(rule), wide ? ScalarType::Float : ScalarType::BFloat16, multiply, kept});
}
