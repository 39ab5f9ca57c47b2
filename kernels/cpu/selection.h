// Record which tokens selected which experts.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "layer.h"
#include "processor.h"

namespace surgeon {

// Which experts tokens select: all but those below a token's threshold, so that ties and NaN are selected.
struct Selection {
  int64_t experts, words;
  std::vector<uint64_t> bits;  // [tokens, words], a bit for every expert

  // scores [..., experts], threshold [...].
  Selection(const at::Tensor& scores, const at::Tensor& threshold, int64_t count)
      : experts(count), words((count + 63) / 64), bits(threshold.numel() * words) {
    if (scores.scalar_type() != threshold.scalar_type() || !(from<float>(scores, threshold) || from<bf16>(scores, threshold))) {
      at::Tensor runs = at::lt(scores.reshape({-1, experts}), threshold.reshape({-1, 1})).logical_not_().contiguous();
      const bool* run = runs.const_data_ptr<bool>();
      for (int64_t t = 0; t < threshold.numel(); ++t)
        for (int64_t e = 0; e < experts; ++e) bits[t * words + e / 64] |= uint64_t(run[t * experts + e]) << e % 64;
    }
  }

  template <class F>
  void each(int64_t token, F f) const {  // f(expert) for those that it selects
    for (int64_t w = 0; w < words; ++w)
      for (uint64_t left = bits[token * words + w]; left; left &= left - 1) f(w * 64 + __builtin_ctzll(left));
  }

  int64_t pairs() const {
    int64_t count = 0;
    for (uint64_t word : bits) count += __builtin_popcountll(word);
    return count;
  }

  // The experts that any of few tokens selected, in order.
  std::vector<Selected> experts_of(int64_t tokens) const {
    std::vector<uint64_t> by(experts, 0);
    for (int64_t t = 0; t < tokens; ++t) each(t, [&](int64_t e) { by[e] |= uint64_t(1) << t; });
    std::vector<Selected> found;
    for (int64_t e = 0; e < experts; ++e)
      if (by[e]) found.push_back({by[e], int32_t(e)});
    return found;
  }

  // The tokens from `begin` to `end` by expert.
  void lists(int64_t begin, int64_t end, std::vector<uint16_t>& token, std::vector<int32_t>& start) const {
    start.assign(experts + 1, 0);
    for (int64_t t = begin; t < end; ++t) each(t, [&](int64_t e) { ++start[e + 1]; });
    for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
    token.resize(start[experts]);
    std::vector<int32_t> next(start.begin(), start.end() - 1);
    for (int64_t t = begin; t < end; ++t) each(t, [&](int64_t e) { token[next[e]++] = uint16_t(t - begin); });
  }

 private:
  // Whether they are of this dtype; then the kernels compare them.
  template <class T>
  bool from(const at::Tensor& scores, const at::Tensor& threshold) {
    if (scores.scalar_type() != (sizeof(T) == 4 ? at::kFloat : at::kBFloat16)) return false;
    const T* score = static_cast<const T*>(scores.const_data_ptr());
    const T* least = static_cast<const T*>(threshold.const_data_ptr());
    auto select = kernels().of(T{}).select;
    at::parallel_for(0, threshold.numel(), std::max<int64_t>(1, 32768 / experts), [&](int64_t begin, int64_t end) {
      select(score + begin * experts, least + begin, end - begin, experts, bits.data() + begin * words);
    });
    return true;
  }
};

}  // namespace surgeon
