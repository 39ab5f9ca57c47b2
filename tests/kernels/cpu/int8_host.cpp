// The int8 kernels of one instruction set as functions of C, for kernels that were broken on purpose.
#include "int8/routed.h"

using namespace surgeon;

// operands: the tensors of the call in the order of surgeon::routed_ffn_int8, x and y (last) in float; null: none.
// sizes: tokens, d_in, width, experts, shared, neurons, d_out, rule, hidden, output, activation, threads, groups of the
// inputs and of the neurons.
extern "C" void run_int8(void** operands, const int64_t* sizes, float tau) {
  int i = 1;
  auto floats = [&] { return static_cast<const float*>(operands[i++]); };
  auto bytes = [&] { return static_cast<const int8_t*>(operands[i++]); };
  Int8Layer layer{};
  Int8Router& router = layer.router;
  router.d_in = sizes[1], router.width = sizes[2], router.experts = sizes[3] - sizes[4];
  router.x_scale = floats();
  router.fc1 = static_cast<const int16_t*>(operands[i++]);
  router.fc1_scale = floats(), router.fc1_bias = floats(), router.fc2 = floats(), router.fc2_bias = floats();
  router.hidden = TrunkActivation(sizes[8]), router.output = RouterOutput(sizes[9]);
  layer.rule = Rule(sizes[7]), layer.tau = tau;
  layer.experts = sizes[3], layer.shared = sizes[4], layer.neurons = sizes[5], layer.d_out = sizes[6];
  layer.w1 = bytes(), layer.w1_scale = floats(), layer.b1 = floats();
  layer.gate = bytes(), layer.gate_scale = floats(), layer.b_gate = floats();
  layer.w2 = bytes(), layer.w2_scale = floats(), layer.y_scale = floats(), layer.b2 = floats();
  auto factors = [&] { return static_cast<const uint8_t*>(operands[i++]); };
  layer.w1_group = factors(), layer.gate_group = factors(), layer.w2_group = factors();
  layer.up_groups = sizes[12], layer.down_groups = sizes[13];
  layer.activation = Activation(sizes[10]);
  routed_ffn_int8(
      *KERNELS(), layer, operands[0], sizes[0], operands[i], Number::f32, sizes[11], [](int64_t count, auto f) {
        for (int64_t part = count; part--;) f(part);
      });
}
