// A linear layer that reads only the inputs that some token keeps: the functions that each instruction set offers.
// `surgeon.kernels.sparse_linear` describes what is computed.
#pragma once

#include <cstdint>

#include "../layer.h"

namespace surgeon {

// float16 as it lies in memory.
struct fp16 {
  uint16_t bits;
};

// Up to so many tokens go through the rows that they keep; with more, together they keep nearly every row.
constexpr int MOST_TOKENS = 16;

// What decides which of d_in inputs are kept: scale and centre [d_in], or null.
struct Keeping {
  int64_t d_in;
  const float *scale, *centre;
  float threshold;
};

// The rows that some token keeps, in order: their places [count], and how far every token's input is from the centre,
// [tokens, apart], zero where the token itself does not keep it.
struct Rows {
  int64_t tokens, count, apart;
  const int32_t* place;
  const float* deviation;
};

// For values of x and y of type T.
template <class T>
struct LinearValues {
  // Finds the rows for up to MOST_TOKENS tokens x [tokens, d_in], and returns how many. There is room for ROOM of them
  // more than d_in.
  int64_t (*select)(const Keeping&, const T* x, int64_t tokens, int32_t* place, float* deviation, int64_t apart);
  // out [tokens, d_in]: the deviations of inputs that are kept, and zeros.
  void (*mask)(const Keeping&, const T* x, int64_t tokens, T* out);
  // out [tokens, apart]: the products of the tokens x [tokens, d] with the rows of w [., d] in the list.
  void (*dot)(const Rows&, const T* x, const T* w, int64_t d, float* out);
  // out [tokens, d_out] = sums [tokens, width] times w_scale plus bias, null where there is none, for `width` columns.
  void (*finish)(
      const float* sums, int64_t tokens, int64_t width, const float* w_scale, const T* bias, T* out, int64_t d_out);
};

// For weights of type W: sums [tokens, width] of the rows of w, which lie d_out apart, times the deviations.
template <class W>
using AddRows = void (*)(const Rows&, const W* w, int64_t d_out, int64_t width, float* sums);

constexpr int64_t ROOM = 16;

struct LinearKernels {
  LinearValues<float> f32;
  LinearValues<bf16> bf16_;
  LinearValues<fp16> fp16_;
  AddRows<float> f32_rows;
  AddRows<bf16> bf16_rows;
  AddRows<fp16> fp16_rows;
  AddRows<int8_t> int8_rows;
  int64_t lanes;  // columns of a vector: a wide layer is best cut into multiples of it

  const LinearValues<float>& of(float) const { return f32; }
  const LinearValues<bf16>& of(bf16) const { return bf16_; }
  const LinearValues<fp16>& of(fp16) const { return fp16_; }
  AddRows<float> rows_of(float) const { return f32_rows; }
  AddRows<bf16> rows_of(bf16) const { return bf16_rows; }
  AddRows<fp16> rows_of(fp16) const { return fp16_rows; }
  AddRows<int8_t> rows_of(int8_t) const { return int8_rows; }
};

// One for each instruction set; null where the compiler does not know it.
const LinearKernels* linear_portable();
const LinearKernels* linear_avx2();
const LinearKernels* linear_avx512();

}  // namespace surgeon
