// The OpenVINO operator RoutedFFNInt8: `surgeon::routed_ffn_int8` of `surgeon.kernels.int8`.
//
// Its inputs are the operator's tensors in the order of the schema. Those that are None are left out: the attribute
// `inputs` names the ones that are there. Floating ones may be of any floating type, since OpenVINO changes types.

#include <algorithm>
#include <array>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/core/type/bfloat16.hpp>
#include <openvino/core/type/float16.hpp>
#include <openvino/op/op.hpp>

#include "../cpu/activation_names.h"
#include "../cpu/int8/choice.h"
#include "../cpu/int8/routed.h"

namespace surgeon {

enum Input {
  X, TAU, X_SCALE, FC1, FC1_SCALE, FC1_BIAS, FC2, FC2_BIAS, W1, W1_SCALE, B1, GATE, GATE_SCALE, B_GATE, W2, W2_SCALE,
  Y_SCALE, B2, W1_GROUP, GATE_GROUP, W2_GROUP, INPUTS
};
constexpr std::array<const char*, INPUTS> NAMES = {
    "x",    "tau",      "x_scale", "fc1",  "fc1_scale",  "fc1_bias", "fc2", "fc2_bias", "w1",
    "w1_scale", "b1",   "gate",    "gate_scale", "b_gate", "w2",     "w2_scale", "y_scale", "b2",
    "w1_group", "gate_group", "w2_group"};

// The values of a floating tensor. `kept` holds them if they are not float32 already.
const float* floats(const ov::Tensor& from, std::vector<float>& kept) {
  auto widen = [&](auto* data) { kept.assign(data, data + from.get_size()); };
  switch (ov::element::Type_t(from.get_element_type())) {
    case ov::element::Type_t::f32: return from.data<const float>();
    case ov::element::Type_t::bf16: widen(from.data<const ov::bfloat16>()); break;
    default: widen(from.data<const ov::float16>());
  }
  return kept.data();
}

Number number_of(const ov::element::Type& type) {
  return type == ov::element::f32 ? Number::f32 : type == ov::element::bf16 ? Number::bf16 : Number::f16;
}

template <class Value>
std::optional<Value> find(const std::string& name, std::initializer_list<std::pair<const char*, Value>> known) {
  for (auto& [called, value] : known)
    if (name == called) return value;
  return std::nullopt;
}

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The kernels for this processor, or those that SURGEON_CPU names.
const Int8Kernels* kernels() {
  static const Int8Kernels* found = [] {
    const char* wanted = std::getenv("SURGEON_CPU");
    const Int8Kernels* named = wanted ? int8_kernels(wanted) : nullptr;
    return named ? named : int8_kernels("");
  }();
  return found;
}

class RoutedFFNInt8 : public ov::op::Op {
 public:
  OPENVINO_OP("RoutedFFNInt8", "surgeon");

  RoutedFFNInt8() = default;

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    auto made = std::make_shared<RoutedFFNInt8>();
    made->set_arguments(inputs);
    made->rule = rule, made->hidden = hidden, made->output = output, made->activation = activation;
    made->shared = shared, made->inputs = this->inputs;
    made->constructor_validate_and_infer_types();
    return made;
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("inputs", inputs);
    visitor.on_attribute("rule", rule);
    visitor.on_attribute("shared", shared);
    visitor.on_attribute("hidden", hidden);
    visitor.on_attribute("output", output);
    visitor.on_attribute("activation", activation);
    return true;
  }

  void validate_and_infer_types() override {
    at.fill(-1);
    NODE_VALIDATION_CHECK(this, inputs.size() == get_input_size(), "there are ", get_input_size(), " inputs, but ", inputs.size(), " names of inputs");
    for (size_t place = 0; place < inputs.size(); ++place) {
      auto name = std::find(NAMES.begin(), NAMES.end(), inputs[place]);
      NODE_VALIDATION_CHECK(this, name != NAMES.end(), "no input is named ", inputs[place]);
      at[name - NAMES.begin()] = int(place);
    }
    for (auto needed : {X, TAU, FC2, W1, W1_SCALE, W2, W2_SCALE, Y_SCALE})
      NODE_VALIDATION_CHECK(this, at[needed] >= 0, "the input ", NAMES[needed], " is missing");
    for (int input = 0; input < INPUTS; ++input) {
      if (at[input] < 0) continue;
      auto type = get_input_element_type(at[input]);
      bool panels = input == W1 || input == GATE || input == W2;
      bool bytes = input == FC1 || input >= W1_GROUP || (panels && at[W1_GROUP] >= 0);
      bool fits = bytes   ? type == ov::element::u8
                  : panels ? type == ov::element::i8
                           : type.is_real() && type != ov::element::f64;
      NODE_VALIDATION_CHECK(this, fits || type.is_dynamic(), "the input ", NAMES[input], " is of type ", type);
    }
    bool known = find_words();
    NODE_VALIDATION_CHECK(
        this, known, "no such rule, router or activation: ", rule, ", ", hidden, ", ", output, ", ", activation);
    auto shape = get_input_partial_shape(at[X]);
    if (shape.rank().is_static()) shape[shape.size() - 1] = get_input_partial_shape(at[Y_SCALE])[0];
    set_output_type(0, get_input_element_type(at[X]), shape);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& given) const override {
    std::array<std::vector<float>, INPUTS> kept;
    auto real = [&](Input input) { return at[input] < 0 ? nullptr : floats(given[at[input]], kept[input]); };
    auto bytes = [&](Input input) {
      return at[input] < 0 ? nullptr : static_cast<const int8_t*>(given[at[input]].data());
    };
    auto factors = [&](Input input) { return at[input] < 0 ? nullptr : given[at[input]].data<const uint8_t>(); };
    auto groups = [&](Input input) { return at[input] < 0 ? 0 : int64_t(given[at[input]].get_shape()[2]); };
    auto shape = given[at[X]].get_shape();
    int64_t d_in = shape.back(), d_out = given[at[Y_SCALE]].get_size();
    check_shapes(given, d_in, d_out);
    auto scales = given[at[W1_SCALE]].get_shape(), fc2 = given[at[FC2]].get_shape();
    Int8Layer layer{};
    layer.router = {
        d_in, int64_t(fc2[1]), int64_t(fc2[0]), real(X_SCALE),
        at[FC1] < 0 ? nullptr : static_cast<const int16_t*>(given[at[FC1]].data()), real(FC1_SCALE), real(FC1_BIAS),
        real(FC2), real(FC2_BIAS), trunk, score};
    layer.rule = selects, layer.tau = *real(TAU);
    layer.experts = scales[0], layer.shared = shared, layer.neurons = scales[1], layer.d_out = d_out;
    layer.w1 = bytes(W1), layer.w1_scale = real(W1_SCALE), layer.b1 = real(B1);
    layer.gate = bytes(GATE), layer.gate_scale = real(GATE_SCALE), layer.b_gate = real(B_GATE);
    layer.w2 = bytes(W2), layer.w2_scale = real(W2_SCALE), layer.y_scale = real(Y_SCALE), layer.b2 = real(B2);
    layer.w1_group = factors(W1_GROUP), layer.gate_group = factors(GATE_GROUP), layer.w2_group = factors(W2_GROUP);
    layer.up_groups = groups(W1_GROUP), layer.down_groups = groups(W2_GROUP);
    layer.activation = function, layer.relu_up = activation == "relu_relu" && layer.gate;
    int64_t tokens = d_in ? given[at[X]].get_size() / d_in : 0;
    shape.back() = d_out;
    outputs[0].set_shape(shape);
    if (tokens == 0) return true;
    routed_ffn_int8(
        *kernels(), layer, given[at[X]].data(), tokens, outputs[0].data(), number_of(given[at[X]].get_element_type()),
        parallel_get_max_threads(),
        [](int64_t count, auto&& part) { ov::parallel_for(count, [&](int64_t index) { part(index); }); });
    return true;
  }

 private:
  std::vector<std::string> inputs;
  std::string rule, hidden, output, activation;
  int64_t shared = 0;
  std::array<int, INPUTS> at{};  // the place of every input, -1 where it is left out
  Rule selects{};
  TrunkActivation trunk{};
  RouterOutput score{};
  Activation function{};

  bool find_words() {
    using O = RouterOutput;
    auto a = find<Rule>(
        rule,
        {{"max", Rule::max}, {"cumulative", Rule::cumulative}, {"energy", Rule::energy}, {"top_k", Rule::top_k}});
    auto b = find<TrunkActivation>(hidden, {{"relu", TrunkActivation::relu}, {"tanh", TrunkActivation::tanh}});
    auto c = find<O>(
        output,
        {{"abs", O::abs}, {"relu", O::relu}, {"softplus", O::softplus}, {"exp", O::exp}, {"sigmoid", O::sigmoid}});
    auto d = find_activation(activation == "relu_relu" ? "relu" : activation);
    if (!a || !b || !c || !d) return false;
    selects = *a, trunk = *b, score = *c, function = *d;
    return true;
  }

  // The kernels read as far as these shapes say.
  void check_shapes(const ov::TensorVector& given, int64_t d_in, int64_t d_out) const {
    auto sizes = [&](Input input) { return given[at[input]].get_shape(); };
    auto has = [&](Input input, std::initializer_list<int64_t> wanted) {
      if (at[input] < 0) return;
      auto found = sizes(input);
      OPENVINO_ASSERT(
          std::equal(found.begin(), found.end(), wanted.begin(), wanted.end()), NAMES[input], " has shape ", found,
          ", expected ", ov::Shape(wanted.begin(), wanted.end()));
    };
    OPENVINO_ASSERT(sizes(W1_SCALE).size() == 2 && sizes(FC2).size() == 2, "w1_scale and fc2 need 2 dimensions");
    int64_t experts = sizes(W1_SCALE)[0], s = sizes(W1_SCALE)[1], scored = sizes(FC2)[0], width = sizes(FC2)[1];
    OPENVINO_ASSERT(
        scored > 0 && s > 0 && d_in > 0 && d_out > 0 && shared >= 0 && scored + shared == experts,
        "there are ", experts, " experts, ", shared, " of them shared, and scores for ", scored);
    OPENVINO_ASSERT(
        (at[FC1] < 0) == (at[FC1_SCALE] < 0) && (at[GATE] < 0) == (at[GATE_SCALE] < 0), "panels need their scales");
    has(TAU, {}), has(X_SCALE, {d_in}), has(FC1_SCALE, {width}), has(FC1_BIAS, {width}), has(FC2_BIAS, {scored});
    has(FC1, {ceil_of(width, LANES), ceil_of(d_in, 2), LANES, 4});
    if (at[FC1] < 0) has(FC2, {scored, d_in});
    bool halves = at[W1_GROUP] >= 0;
    OPENVINO_ASSERT(
        halves == (at[W2_GROUP] >= 0) && (at[GATE_GROUP] >= 0) == (halves && at[GATE] >= 0),
        "the factors of all matrices belong together");
    int64_t at_once = halves ? PLACES : 4, ups = ceil_of(s, LANES), downs = ceil_of(d_out, LANES);
    for (Input input : {W1, GATE}) has(input, {experts, ups, ceil_of(d_in, at_once), LANES, 4});
    has(W2, {experts, downs, ceil_of(s, at_once), LANES, 4});
    // Any number of groups that some size gives; w1 and the gate have the same.
    auto groups = [&](Input input, int64_t columns) {
      if (at[input] < 0) return int64_t(0);
      OPENVINO_ASSERT(sizes(input).size() == 4 && sizes(input)[2] > 0, NAMES[input], " has shape ", sizes(input));
      return groups_there(columns, sizes(input)[2]);
    };
    int64_t up_groups = groups(W1_GROUP, d_in), down_groups = groups(W2_GROUP, s);
    for (Input input : {W1_GROUP, GATE_GROUP}) has(input, {experts, ups, up_groups, LANES});
    has(W2_GROUP, {experts, downs, down_groups, LANES});
    for (Input input : {W1_SCALE, B1, GATE_SCALE, B_GATE, W2_SCALE}) has(input, {experts, s});
    has(Y_SCALE, {d_out}), has(B2, {d_out});
  }
};

}  // namespace surgeon

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<surgeon::RoutedFFNInt8>>()}));
