// Experts with weights of 8 or 4 bits on processors: the arguments, and what each instruction set offers. Nothing here or in the
// files of this folder needs torch. `surgeon.kernels.int8` describes the layouts and what is computed; `routed.h` computes
// it.
#pragma once

#include <cstdint>

#include "../layer.h"

namespace surgeon {

constexpr int64_t LANES = 16;  // outputs side by side in a panel

// The dtypes of x and y.
enum class Number { f32, bf16, f16 };
enum class TrunkActivation { relu, tanh };
enum class RouterOutput { abs, relu, softplus, exp, sigmoid };

// The arguments of surgeon::router_scores_int8. Tensors are contiguous, scales and biases are float; null: there is none.
struct Int8Router {
  int64_t d_in, width, experts;  // width: of the trunk; experts: that it scores
  const float* x_scale;
  const int16_t* fc1;  // null: no trunk
  const float *fc1_scale, *fc1_bias, *fc2, *fc2_bias;
  TrunkActivation hidden;
  RouterOutput output;
};

// The arguments of surgeon::routed_ffn_int8, likewise. relu_up: the activation is relu_relu.
struct Int8Layer {
  Int8Router router;
  Rule rule;
  float tau;
  int64_t experts, shared, neurons, d_out;
  const int8_t* w1;
  const float *w1_scale, *b1;
  const int8_t* gate;
  const float *gate_scale, *b_gate;
  const int8_t* w2;
  const float *w2_scale, *y_scale, *b2;
  Activation activation;
  bool relu_up;
  // Of weights of 4 bits, two of which are in a byte of w1, gate and w2: their factors, and how many groups an output has.
  const uint8_t *w1_group, *gate_group, *w2_group;  // null: the weights have 8 bits
  int64_t up_groups, down_groups;
};

// Tokens that go through all experts together: with more of them weights are read less often, with fewer what is read of
// the tokens stays in the cache.
constexpr int64_t INT8_BLOCK = 256;

// Inputs whose weights of 4 bits are in the halves of bytes side by side, and of which a group has a multiple.
constexpr int64_t PLACES = 8;

// How many groups there are if each has as many inputs as `groups` of them need.
inline int64_t groups_there(int64_t columns, int64_t groups) {
  int64_t places = (columns + PLACES - 1) / PLACES, size = (places + groups - 1) / groups;
  return (places + size - 1) / size;
}

inline int64_t padded_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The inputs of `count` tokens as integers, and which of them selected which expert: those of expert e are
// token[start[e]] to token[start[e + 1] - 1].
struct Int8Tokens {
  int64_t count;
  char* q;          // rows of `Int8Kernels::row` bytes
  float* scale;     // [count] s_x; NaN for a token that is not finite
  int32_t* offset;  // [count] where sums of products start
  const uint16_t* token;
  const int32_t* start;  // [experts + 1]
};

struct Int8Kernels {
  const char* name;
  // Bytes of a row of so many integers.
  int64_t (*row)(int64_t width);
  // Bytes of scratch memory for the functions below.
  int64_t (*scratch)(const Int8Layer&);
  // Read x [count, d_in]: q, scale and offset of `tokens` (if q is not null), and scores [count, router.experts].
  void (*enter)(
      const Int8Router&, const void* x, Number, int64_t count, const Int8Tokens* tokens, float* scores, char* scratch);
  // As in `Kernels` and `Functions<float>`.
  void (*thresholds)(const float* scores, int64_t rows, int64_t experts, Rule, float tau, float* row, float* out);
  void (*select)(const float* scores, const float* thresholds, int64_t tokens, int64_t experts, uint64_t* bits);
  // y [count, d_out rounded up to LANES] += what the `number` experts of the list give, without y_scale.
  void (*experts)(
      const Int8Layer&, const Int8Tokens&, const int32_t* list, int64_t number, float* y, char* scratch);
  // out [count, d_out] = the sum of `parts` such results, which lie `apart`, with y_scale and b2. NaN where scale is NaN.
  void (*leave)(
      const Int8Layer&, int64_t count, const float* scale, int64_t parts, int64_t apart, const float* y, void* out,
      Number);
};

// One for each instruction set, to be called only on processors that have it; null where the compiler does not know it.
const Int8Kernels* int8_portable();
const Int8Kernels* int8_avx2();
const Int8Kernels* int8_avx2_vnni();
const Int8Kernels* int8_avx512();
const Int8Kernels* int8_avx512_vnni();
const Int8Kernels* int8_amx();

}  // namespace surgeon
