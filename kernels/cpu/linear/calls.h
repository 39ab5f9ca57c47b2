// What the operators of this folder share: the choice of the kernels, thresholds, and the work of every thread.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../processor.h"
#include "linear.h"

namespace surgeon {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Whether the dense product of so many tokens is faster than the rows of a share of the inputs.
bool dense_linear_is_faster(at::ScalarType weights, int64_t tokens, double share);

// Products that a thread should have at least.
constexpr int64_t LEAST_PRODUCTS = 131072;
// Sums of a block of columns, for all tokens, that should stay in the fastest cache.
constexpr int64_t MOST_SUMS = 4096;

inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether there are instructions for float16; not every compiler knows them by name at run time.
inline bool has_f16c() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
#else
  return false;
#endif
}

// The kernels for the instruction set that is used.
inline const LinearKernels& chosen_linear() {
  auto starts = [name = kernels().name](const char* with) { return !std::strncmp(name, with, std::strlen(with)); };
  static const bool f16c = has_f16c();
  const LinearKernels* found = nullptr;
  if (starts("avx512") || starts("amx")) found = linear_avx512();
  if (starts("avx2") && f16c) found = linear_avx2();
  return found ? *found : *linear_portable();
}

inline Tensor floats_of(const Optional& tensor) { return tensor ? tensor->to(at::kFloat).contiguous() : Tensor(); }
inline const float* data_of(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

// As `threshold` in `surgeon.kernels.sparse_linear`.
inline float threshold_of(const Tensor& levels, const Tensor& tau) {
  Tensor values = levels.to(at::kFloat).contiguous();
  const float* level = values.const_data_ptr<float>();
  int64_t last = values.size(0) - 1;
  float share = tau.to(at::kFloat).item<float>(), place = std::clamp(share, 0.f, 1.f) * float(last);
  int64_t below = share == share ? std::min(int64_t(place), last - 1) : 0;
  float low = level[below], high = level[below + 1], part = place - float(below);
  return part < 0.5f ? low + part * (high - low) : high - (high - low) * (1.f - part);
}

template <class D>
const D* data(const Tensor& tensor) { return tensor.defined() ? static_cast<const D*>(tensor.const_data_ptr()) : nullptr; }

// y [tokens, d_out] = the rows of w [., d_out] in the list times the tokens' deviations, times w_scale, plus bias.
template <class T, class W>
void add_rows_of(
    const LinearKernels& kernels, const Rows& rows, const W* w, int64_t d_out, const float* w_scale, const T* bias, T* y) {
  // Whole vectors; the last one overlaps with the one before, which gives the same sums again.
  int64_t tokens = rows.tokens, lanes = std::min(kernels.lanes, d_out), vectors = ceil_of(d_out, lanes);
  int64_t least = ceil_of(LEAST_PRODUCTS, std::max<int64_t>(1, rows.count * tokens * lanes));
  int64_t most = std::max<int64_t>(1, MOST_SUMS / (lanes * tokens));
  at::parallel_for(0, vectors, least, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> sums;
    auto columns = [&](int64_t first, int64_t width) {
      sums.resize(std::max<size_t>(sums.size(), tokens * width));
      kernels.rows_of(W{})(rows, w + first, d_out, width, sums.data());
      kernels.of(T{}).finish(
          sums.data(), tokens, width, w_scale ? w_scale + first : nullptr, bias ? bias + first : nullptr, y + first,
          d_out);
    };
    for (int64_t v = begin, some; v < end; v += some) {
      some = std::min(most, end - v);
      int64_t whole = std::min(some, d_out / lanes - v);
      if (whole > 0) columns(v * lanes, whole * lanes);
      if (whole < some) columns(d_out - lanes, lanes);
    }
  });
}

}  // namespace surgeon
