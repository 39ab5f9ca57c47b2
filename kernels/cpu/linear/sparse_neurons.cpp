// surgeon::selected_neurons on CPUs: the neurons of a gated layer that its gate keeps.
//
// `surgeon.kernels.sparse_neurons` describes what the operator computes. In a process without Python, this library also
// declares the operator.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "calls.h"

namespace surgeon {
namespace {

const std::string SCHEMA =
    "selected_neurons(Tensor x, Tensor a, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? scale, Tensor? centre, "
    "Tensor levels, Tensor tau, bool up_relu) -> Tensor";

#define ARGUMENTS \
  const Tensor &x, const Tensor &a, const Tensor &w1, const Optional &b1, const Tensor &w2, const Optional &b2, \
      const Optional &scale, const Optional &centre, const Tensor &levels, const Tensor &tau, bool up_relu
#define GIVEN x, a, w1, b1, w2, b2, scale, centre, levels, tau, up_relu

// Every neuron is computed, and those that are skipped are set to zero.
Tensor masked(ARGUMENTS) {
  Tensor scores = a.to(at::kFloat).abs();
  if (scale) scores = scores * scale->to(at::kFloat);
  Tensor up = at::linear(x, w1, b1), skipped = scores <= threshold_of(levels, tau);
  Tensor hidden = a * (up_relu ? up.relu() : up);
  if (centre) {
    auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    hidden = (hidden.to(wide) - centre->to(wide)).to(x.scalar_type());
  }
  return at::linear(hidden.masked_fill(skipped, 0), w2.t(), b2);
}

// Whether this is a call that the kernels take. Others, wrong ones among them, are left to torch.
bool fits(ARGUMENTS) {
  auto type = x.scalar_type();
  if (type != at::kFloat && type != at::kBFloat16 && type != at::kHalf) return false;
  if (x.dim() < 1 || a.dim() < 1 || w1.dim() != 2 || w2.dim() != 2 || levels.dim() != 1 || levels.size(0) < 2) return false;
  int64_t d_in = x.size(-1), neurons = a.size(-1), d_out = w2.size(1);
  if (!d_in || !neurons || !d_out || neurons > INT32_MAX - ROOM || x.numel() / d_in > MOST_TOKENS) return false;
  if (x.numel() / d_in != a.numel() / neurons || tau.dim()) return false;
  auto sized = [](const Optional& tensor, int64_t size) {
    return !tensor || (tensor->dim() == 1 && tensor->size(0) == size && tensor->is_floating_point());
  };
  auto typed = [&](const auto&... tensors) { return (... && (tensors.scalar_type() == type)); };
  auto may_be_typed = [&](const auto&... tensors) { return (... && (!tensors || tensors->scalar_type() == type)); };
  return w1.size(0) == neurons && w1.size(1) == d_in && w2.size(0) == neurons && typed(a, w1, w2) &&
      may_be_typed(b1, b2) && sized(b1, neurons) && sized(b2, d_out) && sized(scale, neurons) && sized(centre, neurons);
}

// A call that fits, of up to MOST_TOKENS tokens. T: of its values.
template <class T>
Tensor few(ARGUMENTS) {
  const LinearKernels& kernels = chosen_linear();
  const LinearValues<T>& values = kernels.of(T{});
  int64_t d_in = x.size(-1), neurons = a.size(-1), d_out = w2.size(1), tokens = x.numel() / d_in, apart = neurons + ROOM;
  Tensor inputs = x.contiguous(), gates = a.contiguous(), rows1 = w1.contiguous(), rows2 = w2.contiguous();
  Tensor scales = floats_of(scale), centres = floats_of(centre), bias1 = floats_of(b1);
  Tensor bias2 = b2 ? b2->contiguous() : Tensor();
  // Only below a negative threshold may a gate that is kept be zero, and then every neuron is kept.
  Keeping keeping{neurons, data_of(scales), nullptr, threshold_of(levels, tau)};
  bool all = keeping.threshold < 0.f;
  std::vector<int32_t> place(apart);
  std::vector<float> hidden(apart * tokens), up(apart * tokens);
  int64_t count = values.select(keeping, data<T>(gates), tokens, place.data(), hidden.data(), apart);
  if (dense_linear_is_faster(x.scalar_type(), tokens, double(count) / double(neurons))) return masked(GIVEN);
  int64_t least = ceil_of(LEAST_PRODUCTS, tokens * d_in);
  at::parallel_for(0, count, least, [&](int64_t begin, int64_t end) {
    values.dot(
        Rows{tokens, end - begin, apart, place.data() + begin, nullptr}, data<T>(inputs), data<T>(rows1), d_in,
        up.data() + begin);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = begin; j < end; ++j) {
        float& value = hidden[t * apart + j];
        float factor = up[t * apart + j] + (bias1.defined() ? data_of(bias1)[place[j]] : 0.f);
        if (up_relu && factor < 0.f) factor = 0.f;
        // Otherwise another token keeps it, and what it is here, infinity perhaps, does not count.
        if (all || value != 0.f) value = value * factor - (centres.defined() ? data_of(centres)[place[j]] : 0.f);
      }
  });
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.push_back(d_out);
  Tensor y = at::empty(shape, x.options());
  add_rows_of<T>(
      kernels, Rows{tokens, count, apart, place.data(), hidden.data()}, data<T>(rows2), d_out, nullptr, data<T>(bias2),
      static_cast<T*>(y.mutable_data_ptr()));
  return y;
}

Tensor selected_neurons(ARGUMENTS) {
  if (!fits(GIVEN) || !x.numel()) return masked(GIVEN);
  auto type = x.scalar_type();
  return type == at::kFloat ? few<float>(GIVEN) : type == at::kBFloat16 ? few<bf16>(GIVEN) : few<fp16>(GIVEN);
}

TORCH_LIBRARY_FRAGMENT(surgeon, library) {
  // Python declares it itself, before or after it loads this library; it has declared this operator before.
  if (!c10::Dispatcher::singleton().findSchema({"surgeon::masked_ffn", ""})) library.def(SCHEMA.c_str());
}

TORCH_LIBRARY_IMPL(surgeon, CPU, library) { library.impl("selected_neurons", &selected_neurons); }

}  // namespace
}  // namespace surgeon
