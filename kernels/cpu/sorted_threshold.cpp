// surgeon::sorted_threshold on CPUs. `surgeon.kernels.selection` describes what it computes.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "layer.h"
#include "processor.h"
#include "sorting.h"

namespace surgeon {
namespace {

using at::Tensor;

constexpr const char* SCHEMA = "sorted_threshold(Tensor scores, Tensor tau, str rule) -> Tensor";

std::optional<Rule> find_rule(c10::string_view name) {
  if (name == "cumulative") return Rule::cumulative;
  if (name == "energy") return Rule::energy;
  if (name == "top_k") return Rule::top_k;
  return std::nullopt;
}

Tensor sorted_threshold(const Tensor& scores, const Tensor& tau, c10::string_view name) {
  auto rule = find_rule(name);
  bool fits = rule && scores.scalar_type() == at::kFloat && scores.dim() > 0 && scores.size(-1) > 0 &&
      tau.scalar_type() == at::kFloat && tau.dim() == 0 && tau.device().is_cpu();
  if (!fits) {
    auto general = c10::Dispatcher::singleton().findSchema({"surgeon::sorted_threshold_torch", ""});
    TORCH_CHECK(general, "surgeon::sorted_threshold: scores and tau must be float32, and the rule a known one");
    return general->typed<Tensor(const Tensor&, const Tensor&, c10::string_view)>().call(scores, tau, name);
  }
  int64_t experts = scores.size(-1);
  Tensor rows = scores.contiguous(), out = at::empty(scores.sizes().slice(0, scores.dim() - 1), scores.options());
  const float *from = rows.const_data_ptr<float>(), share = *tau.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, out.numel(), std::max<int64_t>(1, 4096 / experts), [&](int64_t begin, int64_t end) {
    std::vector<float> row(experts + 16);
    kernels().thresholds(from + begin * experts, end - begin, experts, *rule, share, row.data(), to + begin);
    for (int64_t r = begin; r < end; ++r)
      if (to[r] != to[r]) to[r] = threshold_by_sorting(from + r * experts, experts, *rule, share);
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(surgeon, library) {
  // Python has declared it before it loads this library.
  if (!c10::Dispatcher::singleton().findSchema({"surgeon::sorted_threshold", ""})) library.def(SCHEMA);
}

TORCH_LIBRARY_IMPL(surgeon, CPU, library) { library.impl("sorted_threshold", &sorted_threshold); }

}  // namespace
}  // namespace surgeon
