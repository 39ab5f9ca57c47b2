// Which tokens selected which experts.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "layer.h"

namespace surgeon {

// Which experts a token selects: all but those below its threshold, so that ties and NaN are selected.
struct Selection {
  int64_t experts;
  const float *scores = nullptr, *threshold = nullptr;
  const at::BFloat16 *half_scores = nullptr, *half_threshold = nullptr;
  const uint8_t* skipped = nullptr;  // in place of the two, for other dtypes
  at::Tensor holder;

  Selection(const at::Tensor& s, const at::Tensor& t, int64_t count) : experts(count) {
    if (s.scalar_type() == at::kFloat && t.scalar_type() == at::kFloat) {
      scores = s.const_data_ptr<float>();
      threshold = t.const_data_ptr<float>();
    } else if (s.scalar_type() == at::kBFloat16 && t.scalar_type() == at::kBFloat16) {
      half_scores = s.const_data_ptr<at::BFloat16>();
      half_threshold = t.const_data_ptr<at::BFloat16>();
    } else {
      holder = at::lt(s.reshape({-1, count}), t.reshape({-1, 1})).contiguous();
      skipped = reinterpret_cast<const uint8_t*>(holder.const_data_ptr<bool>());
    }
  }

  template <class F>
  void each(int64_t token, F f) const {  // f(expert, whether it is selected)
    if (scores) compare(scores, threshold, token, f);
    else if (half_scores) compare(half_scores, half_threshold, token, f);
    else
      for (int64_t e = 0; e < experts; ++e) f(e, !skipped[token * experts + e]);
  }

  template <class S, class F>
  void compare(const S* all, const S* thresholds, int64_t token, F f) const {
    const S* row = all + token * experts;
    float least = thresholds[token];
    for (int64_t e = 0; e < experts; ++e) f(e, !(float(row[e]) < least));
  }

  int64_t pairs(int64_t begin, int64_t end) const {
    int64_t count = 0;
    for (int64_t token = begin; token < end; ++token) each(token, [&](int64_t, bool runs) { count += runs; });
    return count;
  }

  // The experts that any of few tokens selected, those of the same tokens one after the other.
  std::vector<Selected> experts_of(int64_t tokens) const {
    std::vector<uint16_t> by(experts, 0);
    for (int64_t t = 0; t < tokens; ++t) each(t, [&](int64_t e, bool runs) { by[e] |= uint16_t(runs) << t; });
    std::vector<Selected> found;
    for (int64_t e = 0; e < experts; ++e)
      if (by[e]) found.push_back({by[e], int32_t(e)});
    if (tokens > 1)
      std::stable_sort(found.begin(), found.end(), [](const Selected& a, const Selected& b) { return a.tokens < b.tokens; });
    return found;
  }

  // The tokens from `begin` to `end` by expert.
  void lists(int64_t begin, int64_t end, std::vector<uint16_t>& token, std::vector<int32_t>& start) const {
    start.assign(experts + 1, 0);
    for (int64_t t = begin; t < end; ++t) each(t, [&](int64_t e, bool runs) { start[e + 1] += runs; });
    for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
    token.resize(start[experts] + 1);  // the last place takes what is not selected
    std::vector<int32_t> next(start.begin(), start.end() - 1);
    int32_t spare = start[experts];
    for (int64_t t = begin; t < end; ++t)
      each(t, [&](int64_t e, bool runs) {
        token[runs ? next[e] : spare] = uint16_t(t - begin);
        next[e] += runs;
      });
  }
};

}  // namespace surgeon
