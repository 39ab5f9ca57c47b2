// The OpenVINO operator RoutedFFNInt8: `surgeon::routed_ffn_int8` of `surgeon.kernels.int8`.
//
// Its inputs are the operator's tensors in the order of the schema. Those that are None are left out: the attribute
// `inputs` names the ones that are there. Floating ones may be of any floating type, since OpenVINO changes types.

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/core/type/bfloat16.hpp>
#include <openvino/core/type/float16.hpp>
#include <openvino/op/op.hpp>

#include "portable.h"

namespace {

enum Input {
  X, TAU, X_SCALE, FC1, FC1_SCALE, FC1_BIAS, FC2, FC2_BIAS, W1, W1_SCALE, B1, GATE, GATE_SCALE, B_GATE, W2, W2_SCALE,
  Y_SCALE, B2, INPUTS
};
constexpr std::array<const char*, INPUTS> NAMES = {
    "x",    "tau",      "x_scale", "fc1",  "fc1_scale",  "fc1_bias", "fc2", "fc2_bias", "w1",
    "w1_scale", "b1",   "gate",    "gate_scale", "b_gate", "w2",     "w2_scale", "y_scale", "b2"};

template <class T>
void widen(const ov::Tensor& from, std::vector<float>& to) {
  const T* data = from.data<const T>();
  to.assign(data, data + from.get_size());
}

// The values of a floating tensor. `kept` holds them if they are not float32 already.
const float* floats(const ov::Tensor& from, std::vector<float>& kept) {
  switch (ov::element::Type_t(from.get_element_type())) {
    case ov::element::Type_t::f32: return from.data<const float>();
    case ov::element::Type_t::bf16: widen<ov::bfloat16>(from, kept); break;
    default: widen<ov::float16>(from, kept);
  }
  return kept.data();
}

template <class T>
void narrow(const std::vector<float>& from, ov::Tensor& to) {
  std::transform(from.begin(), from.end(), to.data<T>(), [](float value) { return T(value); });
}

class RoutedFFNInt8 : public ov::op::Op {
 public:
  OPENVINO_OP("RoutedFFNInt8", "surgeon");

  RoutedFFNInt8() = default;

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    auto made = std::make_shared<RoutedFFNInt8>();
    made->set_arguments(inputs);
    made->rule = rule, made->hidden = hidden, made->output = output, made->activation = activation;
    made->shared = shared, made->inputs = inputs_of();
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
      bool fits = input == FC1 ? type == ov::element::u8 : input == W1 || input == GATE || input == W2 ? type == ov::element::i8 : type.is_real() && type != ov::element::f64;
      NODE_VALIDATION_CHECK(this, fits || type.is_dynamic(), "the input ", NAMES[input], " is of type ", type);
    }
    auto shape = get_input_partial_shape(at[X]);
    if (shape.rank().is_static()) shape[shape.size() - 1] = get_input_partial_shape(at[Y_SCALE])[0];
    set_output_type(0, get_input_element_type(at[X]), shape);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& given) const override {
    std::array<std::vector<float>, INPUTS> kept;
    auto real = [&](Input input) { return at[input] < 0 ? nullptr : floats(given[at[input]], kept[input]); };
    auto bytes = [&](Input input) { return at[input] < 0 ? nullptr : given[at[input]].data<const int8_t>(); };
    auto shape = given[at[X]].get_shape();
    auto scales = given[at[W1_SCALE]].get_shape(), fc2 = given[at[FC2]].get_shape();
    surgeon::Int8Layer layer{};
    layer.d_in = shape.back(), layer.d_out = given[at[Y_SCALE]].get_size();
    layer.experts = scales[0], layer.neurons = scales[1], layer.shared = shared, layer.width = fc2[1];
    layer.x_scale = real(X_SCALE), layer.fc1_scale = real(FC1_SCALE), layer.fc1_bias = real(FC1_BIAS);
    layer.fc2 = real(FC2), layer.fc2_bias = real(FC2_BIAS), layer.w1_scale = real(W1_SCALE), layer.b1 = real(B1);
    layer.gate_scale = real(GATE_SCALE), layer.b_gate = real(B_GATE), layer.w2_scale = real(W2_SCALE);
    layer.y_scale = real(Y_SCALE), layer.b2 = real(B2);
    layer.fc1 = at[FC1] < 0 ? nullptr : reinterpret_cast<const int16_t*>(given[at[FC1]].data<const uint8_t>());
    layer.w1 = bytes(W1), layer.gate = bytes(GATE), layer.w2 = bytes(W2);
    layer.rule = rule, layer.hidden = hidden, layer.output = output, layer.activation = activation;
    int64_t tokens = 1;
    for (size_t dim = 0; dim + 1 < shape.size(); ++dim) tokens *= shape[dim];
    shape.back() = layer.d_out;
    outputs[0].set_shape(shape);
    const float* x = real(X);
    float tau = *real(TAU);
    bool same = outputs[0].get_element_type() == ov::element::f32;
    std::vector<float> result(same ? 0 : tokens * layer.d_out);
    surgeon::run(layer, x, tau, tokens, same ? outputs[0].data<float>() : result.data(), [](int64_t n, const std::function<void(int64_t)>& f) { ov::parallel_for(n, [&](int64_t i) { f(i); }); });
    if (outputs[0].get_element_type() == ov::element::bf16) narrow<ov::bfloat16>(result, outputs[0]);
    if (outputs[0].get_element_type() == ov::element::f16) narrow<ov::float16>(result, outputs[0]);
    return true;
  }

 private:
  const std::vector<std::string>& inputs_of() const { return inputs; }

  std::vector<std::string> inputs;
  std::string rule, hidden, output, activation;
  int64_t shared = 0;
  std::array<int, INPUTS> at{};  // the place of every input, -1 where it is left out
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<RoutedFFNInt8>>()}));
