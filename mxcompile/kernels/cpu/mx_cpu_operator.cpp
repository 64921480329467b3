// mx::cpu_linears in C++: for one token of a small model, dispatch through Python takes longer than the matmuls.
//
// Calls without a registered kernel go to mx::linears, which is Python (ops/linears.py); that registers a kernel for later calls
// with `mx_register_kernel`. Built by cpu/build.py against the stable C++ ABI of torch.

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

// `multiply` is the kernel for calls with these arguments.
struct SelectedKernel {
  std::string format;
  Text activation, rule;
  ScalarType dtype;
  Multiply* multiply;
  Rounding rounding;
};
std::deque<SelectedKernel> selected_kernels;  // entries are never erased, so pointers to them stay valid
std::shared_mutex guard;

const SelectedKernel* find(const std::string& format, const Text& activation, const Text& rule, ScalarType dtype) {
  const std::shared_lock<std::shared_mutex> reading(guard);
  for (const SelectedKernel& kernel : selected_kernels)
    if (kernel.format == format && kernel.activation == activation && kernel.rule == rule && kernel.dtype == dtype)
      return &kernel;
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

Tensors multiply(const SelectedKernel& kernel, const Tensor& x, int64_t tokens, const Tensors& elements, const Tensors& scales,
                 const std::vector<std::optional<Tensor>>& biases) {
  const int wide = kernel.dtype == ScalarType::Float;
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
  kernel.multiply(weights.data(), int(weights.size()), x.data_ptr(), wide, tokens, x.size(x.dim() - 1),
                  kernel.activation ? &kernel.rounding : nullptr, int(torch::stable::get_num_threads()));
  return outputs;
}

Tensors linears(Tensor x, Tensors elements, Tensors scales, std::vector<std::optional<Tensor>> biases,
                std::string format, Text activation, Text rule) {
  const int64_t size = x.dim() == 0 ? 0 : x.size(x.dim() - 1);
  const int64_t tokens = size == 0 ? 0 : x.numel() / size;
  const SelectedKernel* kernel = find(format, activation, rule, x.scalar_type());
  if (kernel != nullptr && tokens > 0 && tokens <= MAX_TOKENS && is_plain(x, kernel->dtype) &&
      are_plain(elements, scales, biases, kernel->dtype))
    return multiply(*kernel, x, tokens, elements, scales, biases);
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),          from(elements), from(scales),       from(biases), from(format),
                                    from(activation), from(rule),     from(std::nullopt), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mx::linears", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensors>(stack[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mx, CPU, library) { library.impl("cpu_linears", TORCH_BOX(&linears)); }

// Use `multiply` for these arguments from now on. activation and rule are null for unquantized inputs. wide: x is
// float32, otherwise bfloat16.
extern "C" void mx_register_kernel(const char* format, const char* activation, const char* rule, int wide, Multiply* multiply,
                         const Rounding* rounding) {
  const auto text = [](const char* value) { return value == nullptr ? Text() : Text(value); };
  const Rounding copied = rounding == nullptr ? Rounding{} : *rounding;
  const std::unique_lock<std::shared_mutex> writing(guard);
  selected_kernels.push_back(
      {format, text(activation), text(rule), wide ? ScalarType::Float : ScalarType::BFloat16, multiply, copied});
}
