// The threshold of a row of scores that the kernels leave alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "layer.h"

namespace surgeon {

// A row with NaN, infinite or negative scores, step by step as torch does it.
inline float threshold_by_sorting(const float* scores, int64_t experts, Rule rule, float tau) {
  std::vector<float> ascending(scores, scores + experts);
  std::sort(ascending.begin(), ascending.end(), [](float a, float b) { return a < b || (b != b && a == a); });
  if (rule == Rule::max) return ascending.back() * tau;  // the largest, or NaN
  if (rule == Rule::top_k) {
    int64_t skipped = int64_t(std::floor(tau * float(experts) + 1e-4f));
    return ascending[std::min(skipped, experts - 1)];
  }
  auto amount = [&](float score) { return rule == Rule::energy ? score * score : score; };
  double total = 0, running = 0;
  for (float score : ascending) total += amount(score);
  float limit = (rule == Rule::energy ? tau * tau : tau) * float(total);
  int64_t skipped = 0;
  for (int64_t e = 0; e + 1 < experts; ++e) {
    running += amount(ascending[e]);
    skipped += float(running) < limit;
  }
  return ascending[skipped];
}

}  // namespace surgeon
