// The arguments of the kernels for each instruction set, and the functions that each instruction set offers.
#pragma once

#include <cstdint>

namespace surgeon {

enum class Activation {
#define ACTIVATION(name, ...) name,
#include "activations.inc"
#undef ACTIVATION
};

// bfloat16 as it lies in memory: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

// A feed-forward layer of `experts` experts with `neurons` neurons each, every tensor contiguous; null where there is
// none: w1, gate [experts, neurons, d_in], b1, b_gate [experts, neurons], w2 [experts, neurons, d_out], b2 [d_out].
template <class T>
struct Layer {
  int64_t experts, neurons, d_in, d_out;
  Activation activation;
  const T *w1, *b1, *gate, *b_gate, *w2, *b2;
};

// Tokens, and which of them selected which expert: those of expert e are token[start[e]] to token[start[e + 1] - 1].
template <class T>
struct Tokens {
  int64_t count;
  const T* x;  // [count, d_in]
  const uint16_t* token;
  const int32_t* start;  // [experts + 1]
};

// Up to so many tokens the time goes into reading weights; up to so many it may, if few of them select the same expert.
constexpr int FEW_TOKENS = 16, MOST_FEW_TOKENS = 64;

// An expert, and which of up to MOST_FEW_TOKENS selected it: bit t for token t.
struct Selected {
  uint64_t tokens;
  int32_t expert;
};

// The rules that select experts, see `surgeon.kernels.selection`.
enum class Rule { max, cumulative, energy, top_k };

template <class T>
struct Functions {
  // bits [tokens, experts in words of 64]: which experts every token selects, by scores [tokens, experts] and
  // thresholds [tokens] of this dtype. Those that are no experts' are zero.
  void (*select)(const T* scores, const T* thresholds, int64_t tokens, int64_t experts, uint64_t* bits);
  // Tokens that should go through all experts of so many neurons together: with more of them weights are read less often,
  // with fewer what is read of the tokens stays in the cache.
  int64_t (*block)(int64_t neurons);
  // Floats of scratch memory that `many` needs; pairs: how many (token, expert) pairs it is called with.
  int64_t (*scratch)(const Layer<T>&, int64_t tokens, int64_t pairs);
  // y [count, d_out] = what the selected experts give, plus b2.
  void (*many)(const Layer<T>&, const Tokens<T>&, T* y, float* scratch);
  // Floats of scratch memory that `few` needs.
  int64_t (*few_scratch)(const Layer<T>&);
  // y [tokens, d_out] += what `count` experts give, those of the same tokens together one after the other. Weights are
  // read once. Columns of y are in an order of the kernels' own.
  void (*few)(const Layer<T>&, const T* x, const Selected*, int64_t count, float* y, float* scratch);
  // The same, with all tokens going through every expert of the list, which is better in order; null where processors
  // have nothing that makes it worth while.
  int64_t (*together_scratch)(const Layer<T>&, int64_t tokens);
  void (*together)(
      const Layer<T>&, const T* x, int64_t tokens, const Selected*, int64_t count, float* y, float* scratch);
  // Of every neuron's input `up` [count, experts · neurons], without its bias, what goes out of the hidden layer, in
  // place; `gate` likewise or null. Zero for experts that are not `selected`, bits as from `select`; null: all are.
  void (*finish)(const Layer<T>&, int64_t count, T* up, const T* gate, const uint64_t* selected);
  // out [count, d_out] = the sum of `parts` results of `few`, which lie one after the other, plus b2.
  void (*collect)(const Layer<T>&, int64_t count, int64_t parts, const float* y, T* out);
};

struct Kernels {
  const char* name;
  Functions<float> f32;
  Functions<bf16> bf16_;
  // out [rows] = the threshold for every row of scores [rows, experts]; NaN for a row with NaN, infinite or negative
  // ones. `row` has room for `experts` rounded up to whole vectors.
  void (*thresholds)(const float* scores, int64_t rows, int64_t experts, Rule, float tau, float* row, float* out);

  const Functions<float>& of(float) const { return f32; }
  const Functions<bf16>& of(bf16) const { return bf16_; }
};

// One for each instruction set, to be called only on processors that have it; null where the compiler does not know it.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_bf16_kernels();

}  // namespace surgeon
