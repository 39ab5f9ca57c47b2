// surgeon::sparse_linear on CPUs: the choice of the way for a call, the work of every thread, and the registration.
//
// `surgeon.kernels.sparse_linear` describes what the operator computes. In a process without Python, this library also
// declares the operator.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <string>
#include <vector>

#include "calls.h"

namespace surgeon {
namespace {

const std::string SCHEMA =
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? centre, Tensor levels, Tensor tau, "
    "Tensor? w_scale=None) -> Tensor";

#define ARGUMENTS \
  const Tensor &x, const Tensor &weight, const Optional &bias, const Optional &scale, const Optional &centre, \
      const Tensor &levels, const Tensor &tau, const Optional &w_scale
#define GIVEN x, weight, bias, scale, centre, levels, tau, w_scale

// --- where the dense product is faster --------------------------------------------------------------------------------

// Shares of the rows above which the dense product is faster, by the dtype of the weights and tokens, measured on this
// machine (`surgeon.kernels.cpu.linear_crossover`). Until then a guess: ours with all rows is as fast.
constexpr at::ScalarType WEIGHTS[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kChar};
constexpr int LINEAR_STEPS = 5;
constexpr int64_t LINEAR_TOKENS[LINEAR_STEPS] = {1, 2, 4, 8, MOST_TOKENS};
std::atomic<float> linear_crossovers[std::size(WEIGHTS)][LINEAR_STEPS];
const bool linear_guessed = [] {
  for (auto& weights : linear_crossovers)
    for (auto& share : weights) share.store(1.f);
  return true;
}();

// The one measured for so many tokens, or for the next more.
std::atomic<float>& linear_crossover(at::ScalarType weights, int64_t tokens) {
  auto known = std::find(std::begin(WEIGHTS), std::end(WEIGHTS), weights);
  TORCH_CHECK_VALUE(known != std::end(WEIGHTS), "surgeon: there are no kernels for weights in ", weights);
  int step = 0;
  while (step + 1 < LINEAR_STEPS && LINEAR_TOKENS[step] < tokens) ++step;
  return linear_crossovers[known - std::begin(WEIGHTS)][step];
}

}  // namespace

bool dense_linear_is_faster(at::ScalarType weights, int64_t tokens, double share) {
  Way taken = way.load(std::memory_order_relaxed);
  if (taken != Way::faster) return taken == Way::dense;
  return share > linear_crossover(weights, tokens).load(std::memory_order_relaxed);
}

namespace {

void set_linear_crossover(at::ScalarType weights, int64_t tokens, double share) {
  linear_crossover(weights, tokens).store(float(share), std::memory_order_relaxed);
}

double get_linear_crossover(at::ScalarType weights, int64_t tokens) {
  return linear_crossover(weights, tokens).load(std::memory_order_relaxed);
}

// --- a call ----------------------------------------------------------------------------------------------------------

// Whether this is a call that the kernels take. Others, wrong ones among them, are left to the general operator.
bool fits(ARGUMENTS) {
  auto type = x.scalar_type();
  if (x.dim() < 1 || weight.dim() != 2 || levels.dim() != 1 || levels.size(0) < 2 || tau.dim() != 0) return false;
  if (type != at::kFloat && type != at::kBFloat16 && type != at::kHalf) return false;
  if (weight.scalar_type() != (w_scale ? at::kChar : type) || (bias && bias->scalar_type() != type)) return false;
  int64_t d_in = weight.size(0), d_out = weight.size(1);
  if (x.size(-1) != d_in || !d_in || d_in > INT32_MAX - ROOM) return false;
  auto floats = [](const auto&... tensors) { return (... && tensors.is_floating_point()); };
  auto sized = [](const Optional& tensor, int64_t size) {
    return !tensor || (tensor->dim() == 1 && tensor->size(0) == size && tensor->is_floating_point());
  };
  auto here = [](const auto&... tensors) { return (... && tensors.device().is_cpu()); };
  auto may_be_here = [](const auto&... tensors) { return (... && (!tensors || tensors->device().is_cpu())); };
  return floats(levels, tau) && sized(bias, d_out) && sized(scale, d_in) && sized(centre, d_in) &&
      sized(w_scale, d_out) && here(x, weight, levels, tau) && may_be_here(bias, scale, centre, w_scale);
}

// A call that fits: everything contiguous, tokens in one dimension. T: of x; W: of the weights.
template <class T, class W>
struct LinearCall {
  Tensor x, weight, bias, scale, centre, w_scale, y;
  const LinearKernels& kernels = chosen_linear();
  const LinearValues<T>& values = kernels.of(T{});
  Keeping keeping;
  int64_t tokens, d_in, d_out;

  LinearCall(
      const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale, const Optional& centre,
      const Tensor& levels, const Tensor& tau, const Optional& w_scale)
      : x(x.reshape({-1, x.size(-1)}).contiguous()), weight(weight.contiguous()),
        bias(bias ? bias->contiguous() : Tensor()), scale(floats_of(scale)), centre(floats_of(centre)),
        w_scale(floats_of(w_scale)),
        keeping{weight.size(0), data_of(this->scale), data_of(this->centre), threshold_of(levels, tau)},
        tokens(this->x.size(0)), d_in(weight.size(0)), d_out(weight.size(1)) {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
    shape.push_back(d_out);
    y = at::empty(shape, x.options());
  }

  Tensor run() {
    if (!y.numel()) return y;
    if (tokens > MOST_TOKENS || !few()) dense();
    return y;
  }

  // Whether it computed the call: by the rows that some token keeps, unless there are too many of them.
  bool few() {
    int64_t apart = d_in + ROOM;
    static thread_local std::vector<int32_t> place;
    static thread_local std::vector<float> deviation;
    place.resize(apart), deviation.resize(apart * tokens);
    int64_t count = values.select(keeping, data<T>(x), tokens, place.data(), deviation.data(), apart);
    if (dense_linear_is_faster(weight.scalar_type(), tokens, double(count) / double(d_in))) return false;
    add_rows_of<T>(
        kernels, Rows{tokens, count, apart, place.data(), deviation.data()}, data<W>(weight), d_out,
        data_of(w_scale), data<T>(bias), static_cast<T*>(y.mutable_data_ptr()));
    return true;
  }

  void dense() {
    Tensor masked = at::empty_like(x);
    at::parallel_for(0, tokens, std::max<int64_t>(1, LEAST_PRODUCTS / d_in), [&](int64_t begin, int64_t end) {
      values.mask(
          keeping, data<T>(x) + begin * d_in, end - begin, static_cast<T*>(masked.mutable_data_ptr()) + begin * d_in);
    });
    Tensor flat = y.view({tokens, d_out}), wide = weight;
    // Sums of int8 would not fit into float16.
    if (w_scale.defined()) wide = weight.to(at::kFloat).mul_(w_scale).to(x.scalar_type());
    if (bias.defined()) at::addmm_out(flat, bias, masked, wide);
    else at::mm_out(flat, masked, wide);
  }
};

// --- the operator ----------------------------------------------------------------------------------------------------

using Signature = Tensor(ARGUMENTS);

auto general(const char* name) {
  auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(
      found, "surgeon::sparse_linear: these arguments do not fit together, or the native kernels do not know their dtype "
      "or derivative");
  return found->typed<Signature>();
}

template <class T>
Tensor run(ARGUMENTS) {
  return w_scale ? LinearCall<T, int8_t>(GIVEN).run() : LinearCall<T, T>(GIVEN).run();
}

Tensor sparse_linear(ARGUMENTS) {
  // In Python the general operator computes it or says what is wrong.
  if (!fits(GIVEN)) return general("surgeon::sparse_linear_torch").call(GIVEN);
  auto type = x.scalar_type();
  return type == at::kFloat ? run<float>(GIVEN) : type == at::kBFloat16 ? run<bf16>(GIVEN) : run<fp16>(GIVEN);
}

// In Python a call with a derivative goes to an operator that has one, and calls this one below autograd.
Tensor sparse_linear_with_derivative(ARGUMENTS) {
  bool backward = at::GradMode::is_enabled();
  auto wants = [&](const Tensor& tensor) {
    return (backward && tensor.requires_grad()) || tensor._fw_grad(0).defined();
  };
  auto may_want = [&](const Optional& tensor) { return tensor && wants(*tensor); };
  if (wants(x) || wants(weight) || may_want(bias) || may_want(centre))
    return general("surgeon::sparse_linear_differentiable").call(GIVEN);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("surgeon::sparse_linear", "").typed<Signature>();
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(GIVEN);
}

TORCH_LIBRARY_FRAGMENT(surgeon, library) {
  // Python declares it itself, before or after it loads this library; it has declared this operator before.
  if (!c10::Dispatcher::singleton().findSchema({"surgeon::masked_ffn", ""})) library.def(SCHEMA.c_str());
  // The same kernels by a name that is there before Python has declared the operator: they are measured when loaded.
  library.def(("cpu_" + SCHEMA).c_str());
  library.def("cpu_set_linear_crossover(ScalarType weights, int tokens, float share) -> ()", &set_linear_crossover);
  library.def("cpu_get_linear_crossover(ScalarType weights, int tokens) -> float", &get_linear_crossover);
}

TORCH_LIBRARY_IMPL(surgeon, CPU, library) {
  library.impl("sparse_linear", &sparse_linear);
  library.impl("cpu_sparse_linear", &sparse_linear);
}

TORCH_LIBRARY_IMPL(surgeon, AutogradCPU, library) { library.impl("sparse_linear", &sparse_linear_with_derivative); }

}  // namespace
}  // namespace surgeon
