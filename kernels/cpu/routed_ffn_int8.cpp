// surgeon::routed_ffn_int8 and surgeon::router_scores_int8 on CPUs. `surgeon.kernels.int8` describes what they compute.
//
// In a process without Python, this library also declares the operators.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "activation_names.h"
#include "int8/choice.h"
#include "int8/routed.h"
#include "processor.h"

namespace surgeon {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

#define ROUTER_SCHEMA                                                                                              \
  "Tensor? x_scale, Tensor? fc1, Tensor? fc1_scale, Tensor? fc1_bias, Tensor fc2, Tensor? fc2_bias, str hidden, " \
  "str output"
constexpr const char* SCHEMA =
    "routed_ffn_int8(Tensor x, Tensor tau, str rule, int shared, " ROUTER_SCHEMA
    ", Tensor w1, Tensor w1_scale, Tensor? b1, Tensor? gate, Tensor? gate_scale, Tensor? b_gate, Tensor w2, "
    "Tensor w2_scale, Tensor y_scale, Tensor? b2, str activation, Tensor? w1_group=None, Tensor? gate_group=None, "
    "Tensor? w2_group=None) -> Tensor";
constexpr const char* SCORES_SCHEMA = "router_scores_int8(Tensor x, " ROUTER_SCHEMA ") -> Tensor";

#define ROUTER                                                                                                 \
  const Optional &x_scale, const Optional &fc1, const Optional &fc1_scale, const Optional &fc1_bias,           \
      const Tensor &fc2, const Optional &fc2_bias, c10::string_view hidden, c10::string_view output
#define ROUTER_GIVEN x_scale, fc1, fc1_scale, fc1_bias, fc2, fc2_bias, hidden, output
#define ARGUMENTS                                                                                              \
  const Tensor &x, const Tensor &tau, c10::string_view rule, int64_t shared, ROUTER, const Tensor &w1,         \
      const Tensor &w1_scale, const Optional &b1, const Optional &gate, const Optional &gate_scale,            \
      const Optional &b_gate, const Tensor &w2, const Tensor &w2_scale, const Tensor &y_scale,                 \
      const Optional &b2, c10::string_view activation, const Optional &w1_group, const Optional &gate_group,   \
      const Optional &w2_group
#define GIVEN                                                                                                  \
  x, tau, rule, shared, ROUTER_GIVEN, w1, w1_scale, b1, gate, gate_scale, b_gate, w2, w2_scale, y_scale, b2,   \
      activation, w1_group, gate_group, w2_group
using Signature = Tensor(ARGUMENTS);
using ScoresSignature = Tensor(const Tensor& x, ROUTER);

template <class Value>
std::optional<Value> find(std::string_view name, std::initializer_list<std::pair<const char*, Value>> known) {
  for (auto& [called, value] : known)
    if (name == called) return value;
  return std::nullopt;
}

std::optional<Rule> find_rule(std::string_view name) {
  return find<Rule>(
      name, {{"max", Rule::max}, {"cumulative", Rule::cumulative}, {"energy", Rule::energy}, {"top_k", Rule::top_k}});
}
std::optional<TrunkActivation> find_hidden(std::string_view name) {
  return find<TrunkActivation>(name, {{"relu", TrunkActivation::relu}, {"tanh", TrunkActivation::tanh}});
}
std::optional<RouterOutput> find_output(std::string_view name) {
  using O = RouterOutput;
  return find<O>(
      name, {{"abs", O::abs}, {"relu", O::relu}, {"softplus", O::softplus}, {"exp", O::exp}, {"sigmoid", O::sigmoid}});
}
std::optional<Number> find_number(const Tensor& x) {
  return find<Number>(
      toString(x.scalar_type()), {{"Float", Number::f32}, {"BFloat16", Number::bf16}, {"Half", Number::f16}});
}

// Tensors of a call as the kernels take them. What has to be converted is kept as long as this is.
class Operands {
 public:
  const float* floats(const Tensor& tensor, at::IntArrayRef shape) {
    fits_ = fits_ && tensor.sizes() == shape && tensor.is_floating_point() && tensor.device().is_cpu();
    return fits_ ? keep(tensor, at::kFloat).const_data_ptr<float>() : nullptr;
  }
  const float* floats(const Optional& tensor, at::IntArrayRef shape) { return tensor ? floats(*tensor, shape) : nullptr; }

  template <class Whole>
  const Whole* panels(const Tensor& tensor, at::IntArrayRef shape) {
    auto dtype = at::ScalarType(c10::CppTypeToScalarType<Whole>::value);
    fits_ = fits_ && tensor.sizes() == shape && tensor.scalar_type() == dtype && tensor.device().is_cpu();
    return fits_ ? keep(tensor, dtype).const_data_ptr<Whole>() : nullptr;
  }
  template <class Whole>
  const Whole* panels(const Optional& tensor, at::IntArrayRef shape) {
    return tensor ? panels<Whole>(*tensor, shape) : nullptr;
  }

  void need(bool condition) { fits_ = fits_ && condition; }
  // Whether this is a call that the kernels take. Others, wrong ones among them, are left to the general operator.
  bool fits() const { return fits_; }

 private:
  std::vector<Tensor> kept_;
  bool fits_ = true;

  const Tensor& keep(const Tensor& tensor, at::ScalarType dtype) {
    if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
    return kept_.emplace_back(tensor.to(dtype).contiguous());
  }
};

// A call's input, whose tokens are in one dimension.
struct Input {
  Tensor x;
  Number number;
  int64_t tokens, d_in;

  Input(const Tensor& given, Operands& operands) {
    auto found = find_number(given);
    operands.need(found && given.dim() > 0 && given.device().is_cpu() && given.size(-1) > 0);
    if (!operands.fits()) return;
    x = given.contiguous();
    number = *found, d_in = x.size(-1), tokens = x.numel() / d_in;
  }
  const void* data() const { return x.const_data_ptr(); }
};

// The most products whose sum has room in int32.
constexpr int64_t WIDEST = 1 << 16;

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

Int8Router router_of(const Input& in, ROUTER, Operands& operands) {
  auto function = find_hidden(hidden);
  auto score = find_output(output);
  operands.need(function && score && fc2.dim() == 2 && fc1.has_value() == fc1_scale.has_value() && (fc1 || !fc1_bias));
  if (!operands.fits()) return {};
  int64_t experts = fc2.size(0), width = fc2.size(1);
  operands.need(experts > 0 && width > 0 && (fc1 || width == in.d_in));
  return {
      in.d_in, width, experts, operands.floats(x_scale, {in.d_in}),
      operands.panels<int16_t>(fc1, {ceil_of(width, LANES), ceil_of(in.d_in, 2), LANES, 2}),
      operands.floats(fc1_scale, {width}), operands.floats(fc1_bias, {width}),
      operands.floats(fc2, {experts, width}), operands.floats(fc2_bias, {experts}), *function, *score};
}

// How many groups the factors are for, if they have a shape that factors can have; otherwise another number.
int64_t groups_of(const Optional& factors, int64_t columns) {
  if (!factors) return 0;
  return groups_there(columns, factors->dim() == 4 && factors->size(2) > 0 ? factors->size(2) : 1);
}

Int8Layer layer_of(ARGUMENTS, const Input& in, Operands& operands) {
  Int8Router router = router_of(in, ROUTER_GIVEN, operands);
  auto selects = find_rule(rule);
  bool relu_up = activation == "relu_relu";
  auto function = find_activation(relu_up ? "relu" : std::string_view(activation.data(), activation.size()));
  operands.need(
      selects && function && tau.dim() == 0 && tau.is_floating_point() && w1_scale.dim() == 2 && y_scale.dim() == 1 &&
      gate.has_value() == gate_scale.has_value() && (gate || !b_gate));
  if (!operands.fits()) return {};
  int64_t experts = w1_scale.size(0), s = w1_scale.size(1), d_out = y_scale.size(0);
  operands.need(shared >= 0 && experts == router.experts + shared && s > 0 && d_out > 0);
  operands.need(in.d_in <= WIDEST && s <= WIDEST);
  bool halves = w1_group.has_value();
  operands.need(w2_group.has_value() == halves && gate_group.has_value() == (halves && gate));
  if (!operands.fits()) return {};
  int64_t at_once = halves ? PLACES : 4, rows[] = {experts, s};
  int64_t ups[] = {experts, ceil_of(s, LANES), ceil_of(in.d_in, at_once), LANES, 4};
  int64_t downs[] = {experts, ceil_of(d_out, LANES), ceil_of(s, at_once), LANES, 4};
  auto panels = [&](const auto& tensor, at::IntArrayRef shape) {
    return halves ? reinterpret_cast<const int8_t*>(operands.panels<uint8_t>(tensor, shape))
                  : operands.panels<int8_t>(tensor, shape);
  };
  int64_t up_groups = groups_of(w1_group, in.d_in), down_groups = groups_of(w2_group, s);
  int64_t up_factors[] = {experts, ups[1], up_groups, LANES}, down_factors[] = {experts, downs[1], down_groups, LANES};
  const float* share = operands.floats(tau, {});
  return {
      router, *selects, share ? *share : 0.f, experts, shared, s, d_out, panels(w1, ups),
      operands.floats(w1_scale, rows), operands.floats(b1, rows), panels(gate, ups),
      operands.floats(gate_scale, rows), operands.floats(b_gate, rows), panels(w2, downs),
      operands.floats(w2_scale, rows), operands.floats(y_scale, {d_out}), operands.floats(b2, {d_out}), *function,
      relu_up && gate, operands.panels<uint8_t>(w1_group, up_factors), operands.panels<uint8_t>(gate_group, up_factors),
      operands.panels<uint8_t>(w2_group, down_factors), up_groups, down_groups};
}

const Int8Kernels& chosen_int8() {
  const Int8Kernels* found = int8_kernels(kernels().name);
  TORCH_INTERNAL_ASSERT(found);
  return *found;
}

template <class F>
void parallel(int64_t count, F f) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

Tensor result(const Tensor& x, int64_t width, at::ScalarType dtype) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.push_back(width);
  return at::empty(shape, x.options().dtype(dtype));
}

template <class Called>
auto general(const char* name) {
  auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(
      found, name, ": these arguments do not fit together, or the native kernels do not know their dtype or a name");
  return found->typed<Called>();
}

Tensor routed(ARGUMENTS) {
  Operands operands;
  Input in(x, operands);
  Int8Layer layer = operands.fits() ? layer_of(GIVEN, in, operands) : Int8Layer{};
  if (!operands.fits()) return general<Signature>("surgeon::routed_ffn_int8_torch").call(GIVEN);
  Tensor y = result(x, layer.d_out, x.scalar_type());
  if (in.tokens)
    routed_ffn_int8(
        chosen_int8(), layer, in.data(), in.tokens, y.mutable_data_ptr(), in.number, at::get_num_threads(),
        [](int64_t count, auto f) { parallel(count, f); });
  return y;
}

Tensor scores(const Tensor& x, ROUTER) {
  Operands operands;
  Input in(x, operands);
  Int8Router router = operands.fits() ? router_of(in, ROUTER_GIVEN, operands) : Int8Router{};
  if (!operands.fits())
    return general<ScoresSignature>("surgeon::router_scores_int8_torch").call(x, ROUTER_GIVEN);
  Tensor found = result(x, router.experts, at::kFloat);
  if (in.tokens)
    router_scores_int8(
        chosen_int8(), router, in.data(), in.tokens, found.mutable_data_ptr<float>(), in.number, at::get_num_threads(),
        [](int64_t count, auto f) { parallel(count, f); });
  return found;
}

// In Python a call with a gradient goes to an operator that has one, and calls this one below autograd.
Tensor routed_with_gradient(ARGUMENTS) {
  auto wants = [](const auto&... tensors) { return (... || tensors.requires_grad()); };
  auto may_want = [](const auto&... tensors) { return (... || (tensors && tensors->requires_grad())); };
  if (at::GradMode::is_enabled() &&
      (wants(x, tau, fc2, w1_scale, w2_scale, y_scale) ||
       may_want(x_scale, fc1_scale, fc1_bias, fc2_bias, b1, gate_scale, b_gate, b2)))
    return general<Signature>("surgeon::routed_ffn_int8_differentiable").call(GIVEN);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("surgeon::routed_ffn_int8", "").typed<Signature>();
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(GIVEN);
}

TORCH_LIBRARY_FRAGMENT(surgeon, library) {
  // Python declares them itself, before or after it loads this library; it has declared this operator before.
  if (c10::Dispatcher::singleton().findSchema({"surgeon::masked_ffn", ""})) return;
  library.def(SCHEMA);
  library.def(SCORES_SCHEMA);
}

TORCH_LIBRARY_IMPL(surgeon, CPU, library) {
  library.impl("routed_ffn_int8", &routed);
  library.impl("router_scores_int8", &scores);
}

TORCH_LIBRARY_IMPL(surgeon, AutogradCPU, library) {
  library.impl("routed_ffn_int8", &routed_with_gradient);
  // There is no gradient, and whoever asks for one is told so.
  library.impl("router_scores_int8", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace surgeon
