// surgeon::dynamic_k_ffn on CPUs: the choice of the way for a call, the work of every thread, and the registration.
//
// `surgeon.kernels.dynamic_k` describes what the operator computes. In a process without Python, this library also
// declares the operator, so that a compiled model that uses it runs there.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "activation_names.h"
#include "layer.h"
#include "processor.h"
#include "selection.h"

namespace surgeon {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr const char* SCHEMA =
    "dynamic_k_ffn(Tensor x, Tensor scores, Tensor threshold, Tensor w1, Tensor? b1, Tensor? gate, Tensor? b_gate, "
    "Tensor w2, Tensor? b2, str activation) -> Tensor";

// Experts of fewer neurons cost more for every token beside the reading of their weights.
constexpr int64_t SMALL = 16;

// Hidden values of a block, of which there are two, that should still fit into a cache.
constexpr int64_t MOST_HIDDEN = int64_t(1) << 21;

// So many floats of scratch memory at most are kept for a dense product.
constexpr int64_t MOST_FLOATS_KEPT = int64_t(1) << 24;

// --- a call ----------------------------------------------------------------------------------------------------------

std::vector<std::string> activations() { return {std::begin(ACTIVATIONS), std::end(ACTIVATIONS)}; }

struct Arguments {
  const Tensor &x, &scores, &threshold, &w1;
  const Optional &b1, &gate, &b_gate;
  const Tensor& w2;
  const Optional& b2;
  c10::string_view activation;

  // Whether this is a call that the kernels take. Others, wrong ones among them, are left to the general operator.
  bool fits() const {
    if (!find_activation(activation)) return false;
    if (x.dim() < 1 || w1.dim() != 3 || w2.dim() != 3 || (b_gate && !gate)) return false;
    if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) return false;
    int64_t experts = w1.size(0), neurons = w1.size(1);
    if (!experts || !neurons) return false;
    auto lead = x.sizes().slice(0, x.dim() - 1);
    auto shaped = [&](const Tensor& tensor, at::IntArrayRef shape) {
      return tensor.sizes() == shape && tensor.device() == x.device() && tensor.scalar_type() == x.scalar_type();
    };
    std::vector<int64_t> wanted(lead.begin(), lead.end());
    if (threshold.sizes() != lead) return false;
    wanted.push_back(experts);
    if (scores.sizes() != at::IntArrayRef(wanted)) return false;
    for (const Tensor* tensor : {&scores, &threshold})
      if (!tensor->is_floating_point() || tensor->device() != x.device()) return false;
    return shaped(w1, {experts, neurons, x.size(-1)}) && (!gate || shaped(*gate, w1.sizes())) &&
        (!b1 || shaped(*b1, {experts, neurons})) && (!b_gate || shaped(*b_gate, {experts, neurons})) &&
        shaped(w2, {experts, neurons, w2.size(2)}) && (!b2 || shaped(*b2, {w2.size(2)}));
  }
};

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of a thread that is kept from call to call.
float* scratch_of(int64_t floats) {
  static thread_local std::unique_ptr<float, decltype(&std::free)> memory(nullptr, &std::free);
  static thread_local int64_t size = 0;
  if (floats > size) {
    int64_t bytes = (floats * int64_t(sizeof(float)) + 4095) / 4096 * 4096;
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    TORCH_CHECK_WITH(OutOfMemoryError, memory, "surgeon: no ", bytes, " bytes of memory");
    size = bytes / int64_t(sizeof(float));
  }
  return memory.get();
}

// A call that fits: everything contiguous, tokens in one dimension.
template <class T>
struct Call {
  c10::MaybeOwned<Tensor> w1, w2;
  Tensor b1, gate, b_gate, b2, scores, threshold, x, y;
  Layer<T> layer;
  Selection selection;
  const Functions<T>& functions = kernels().of(T{});
  int64_t tokens = x.size(0);

  Call(const Arguments& given, Activation activation)
      : w1(given.w1.expect_contiguous()), w2(given.w2.expect_contiguous()), b1(contiguous(given.b1)),
        gate(contiguous(given.gate)), b_gate(contiguous(given.b_gate)), b2(contiguous(given.b2)),
        scores(given.scores.contiguous()), threshold(given.threshold.contiguous()),
        x(given.x.reshape({-1, w1->size(2)}).contiguous()),
        layer{w1->size(0), w1->size(1), w1->size(2), w2->size(2), activation, data(*w1), data(b1), data(gate),
              data(b_gate), data(*w2), data(b2)},
        selection(scores, threshold, layer.experts) {
    std::vector<int64_t> shape(given.x.sizes().begin(), given.x.sizes().end() - 1);
    shape.push_back(layer.d_out);
    y = at::empty(shape, x.options());
  }

  // For up to MOST_FEW_TOKENS it depends on how many of them an expert has on average; the numbers were measured.
  Tensor run() {
    if (y.numel() == 0) return y;
    int64_t pairs = selection.pairs();
    double share = double(pairs) / double(tokens * layer.experts);
    if (dense_is_faster(sizeof(T) == 2, tokens, layer.neurons, share)) {
      everything(share == 1);
    } else if (tokens <= MOST_FEW_TOKENS) {
      std::vector<Selected> selected = selection.experts_of(tokens);
      auto on_average = [&](int64_t least) { return pairs >= least * int64_t(selected.size()); };
      bool small = layer.neurons < SMALL;
      if (functions.together && on_average(small ? 3 : layer.neurons < 32 ? 5 : 8)) few(selected, pairs, true);
      else if (tokens > FEW_TOKENS && on_average(small ? 4 : 16)) many(pairs);
      else few(selected, pairs, false);
    } else {
      many(pairs);
    }
    return y;
  }

  // Dense products. What is not selected is set to zero between the two, unless all is.
  void everything(bool all) {
    int64_t hidden = layer.experts * layer.neurons, values = tokens * hidden;
    // The system would clear new memory, page after page, which takes a tenth of the time.
    int64_t wanted = (gate.defined() ? 2 : 1) * ceil_of(values * int64_t(sizeof(T)), sizeof(float));
    T* space = wanted <= MOST_FLOATS_KEPT ? reinterpret_cast<T*>(scratch_of(wanted)) : nullptr;
    // Without biases, which it would write into the result first: they are added where that is read.
    auto product = [&](const Tensor& weight, T* into) {
      Tensor to = space ? at::from_blob(into, {tokens, hidden}, x.options()) : at::empty({tokens, hidden}, x.options());
      return at::mm_out(to, x, weight.flatten(0, 1).t());
    };
    Tensor up = product(*w1, space), gates = gate.defined() ? product(gate, space + values) : Tensor();
    at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
      functions.finish(
          layer, end - begin, mutable_data(up) + begin * hidden,
          gates.defined() ? data(gates) + begin * hidden : nullptr,
          all ? nullptr : selection.bits.data() + begin * selection.words);
    });
    Tensor flat_y = y.view({tokens, layer.d_out}), flat_w2 = w2->flatten(0, 1);
    if (b2.defined()) at::addmm_out(flat_y, b2, up, flat_w2);
    else at::mm_out(flat_y, up, flat_w2);
  }

  // For few tokens: threads take experts, each about as many pairs, and their sums are added.
  void few(std::vector<Selected>& selected, int64_t pairs, bool together) {
    if (!together)  // those of the same tokens one after the other
      std::stable_sort(
          selected.begin(), selected.end(), [](const Selected& a, const Selected& b) { return a.tokens < b.tokens; });
    int64_t size = together ? functions.together_scratch(layer, tokens) : functions.few_scratch(layer);
    auto run = [&](size_t first, size_t last, float* to) {
      const Selected* list = selected.data() + first;
      if (together) functions.together(layer, data(x), tokens, list, last - first, to, scratch_of(size));
      else functions.few(layer, data(x), list, last - first, to, scratch_of(size));
    };
    int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), pairs)), seen = 0;
    std::vector<int64_t> bounds{0};
    for (size_t i = 0; i < selected.size() && int64_t(bounds.size()) < parts; ++i) {
      seen += __builtin_popcountll(selected[i].tokens);
      if (seen * parts >= int64_t(bounds.size()) * pairs) bounds.push_back(i + 1);
    }
    bounds.resize(parts + 1, selected.size());
    if constexpr (std::is_same_v<T, float>)
      if (parts == 1) {  // straight into the result
        functions.collect(layer, tokens, 0, nullptr, mutable_data(y));
        return run(0, selected.size(), mutable_data(y));
      }
    Tensor sums = at::zeros({parts, tokens, layer.d_out}, x.options().dtype(at::kFloat));
    float* sum = sums.mutable_data_ptr<float>();
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part)
        run(bounds[part], bounds[part + 1], sum + part * tokens * layer.d_out);
    });
    functions.collect(layer, tokens, parts, sum, mutable_data(y));
  }

  // Threads take blocks of tokens, each as many, small enough for what is kept of the hidden layer.
  void many(int64_t pairs) {
    int64_t threads = at::get_num_threads(), hidden = pairs * layer.neurons / tokens + 1;
    int64_t most = std::max<int64_t>(FEW_TOKENS, std::min(functions.block(layer.neurons), MOST_HIDDEN / hidden));
    int64_t rounds = ceil_of(tokens, most * threads), block = ceil_of(tokens, rounds * threads);
    T* out = mutable_data(y);
    at::parallel_for(0, ceil_of(tokens, block), 1, [&](int64_t first, int64_t last) {
      std::vector<uint16_t> token;
      std::vector<int32_t> start;
      for (int64_t number = first; number < last; ++number) {
        int64_t begin = number * block, count = std::min(block, tokens - begin);
        selection.lists(begin, begin + count, token, start);
        Tokens<T> in{count, data(x) + begin * layer.d_in, token.data(), start.data()};
        functions.many(
            layer, in, out + begin * layer.d_out,
            scratch_of(functions.scratch(layer, count, start[layer.experts])));
      }
    });
  }

  static Tensor contiguous(const Optional& tensor) { return tensor ? tensor->contiguous() : Tensor(); }
  static const T* data(const Tensor& tensor) {
    return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
  }
  static T* mutable_data(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }
};

// --- the operator ----------------------------------------------------------------------------------------------------

using Signature = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
    const Tensor&, const Optional&, c10::string_view);

c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor forward(
    const Tensor& x, const Tensor& scores, const Tensor& threshold, const Tensor& w1, const Optional& b1,
    const Optional& gate, const Optional& b_gate, const Tensor& w2, const Optional& b2, c10::string_view activation) {
  Arguments given{x, scores, threshold, w1, b1, gate, b_gate, w2, b2, activation};
  if (!given.fits()) {
    // In Python the general operator computes it or says what is wrong.
    auto general = c10::Dispatcher::singleton().findSchema({"surgeon::dynamic_k_ffn_torch", ""});
    TORCH_CHECK(
        general,
        "surgeon::dynamic_k_ffn: these arguments do not fit together, are neither float32 nor bfloat16, or the native "
        "kernels have no activation '", activation, "'");
    return general->typed<Signature>().call(x, scores, threshold, w1, b1, gate, b_gate, w2, b2, activation);
  }
  Activation function = *find_activation(activation);
  return x.scalar_type() == at::kFloat ? Call<float>(given, function).run() : Call<bf16>(given, function).run();
}

Tensor below_autograd(
    const Tensor& x, const Tensor& scores, const Tensor& threshold, const Tensor& w1, const Optional& b1,
    const Optional& gate, const Optional& b_gate, const Tensor& w2, const Optional& b2, c10::string_view activation) {
  static auto op = find("surgeon::dynamic_k_ffn");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, scores, threshold, w1, b1, gate, b_gate, w2, b2, activation);
}

// As `register_autograd` in `surgeon.kernels.dynamic_k`, without Python where nothing wants a gradient.
struct Differentiable : torch::autograd::Function<Differentiable> {
  static Tensor forward(
      torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& scores, const Tensor& threshold,
      const Tensor& w1, const Optional& b1, const Optional& gate, const Optional& b_gate, const Tensor& w2,
      const Optional& b2, const std::string& activation) {
    auto or_empty = [](const Optional& tensor) { return tensor ? *tensor : Tensor(); };
    context->save_for_backward(
        {x, scores, threshold, w1, or_empty(b1), or_empty(gate), or_empty(b_gate), w2, or_empty(b2)});
    context->saved_data["activation"] = activation;
    return below_autograd(x, scores, threshold, w1, b1, gate, b_gate, w2, b2, activation);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto optional = [&](int i) { return saved[i].defined() ? Optional(saved[i]) : Optional(); };
    const Tensor& gradient = gradients[0];
    std::vector<Tensor> found(10);
    bool need_x = context->needs_input_grad(0), need_weights = false;
    // Optional inputs that are not there have no place among the edges.
    std::vector<int> places;
    for (int i = 0; i < 9; ++i)
      if (saved[i].defined()) places.push_back(i);
    auto needs = [&](int input) {
      for (size_t edge = 0; edge < places.size(); ++edge)
        if (places[edge] == input) return context->needs_input_grad(edge);
      return false;
    };
    for (int input : {3, 4, 5, 6, 7}) need_weights |= needs(input);
    if (need_x || need_weights) {
      static auto op =
          c10::Dispatcher::singleton()
              .findSchemaOrThrow("surgeon::dynamic_k_ffn_backward", "")
              .typed<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
                  const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&,
                  const Optional&, const Optional&, const Tensor&, c10::string_view, bool, bool)>();
      auto [x, w1, b1, gate, b_gate, w2] = op.call(
          gradient, saved[0], saved[1], saved[2], saved[3], optional(4), optional(5), optional(6), saved[7],
          context->saved_data["activation"].toStringRef(), need_x, need_weights);
      found[0] = x, found[3] = w1, found[4] = b1, found[5] = gate, found[6] = b_gate, found[7] = w2;
    }
    if (needs(8)) found[8] = gradient.reshape({-1, gradient.size(-1)}).sum(0);
    for (int i = 0; i < 9; ++i)
      if (!needs(i)) found[i] = Tensor();
    return found;
  }
};

Tensor autograd(
    const Tensor& x, const Tensor& scores, const Tensor& threshold, const Tensor& w1, const Optional& b1,
    const Optional& gate, const Optional& b_gate, const Tensor& w2, const Optional& b2, c10::string_view activation) {
  auto has_tangent = [](const Optional& tensor) { return tensor && tensor->_fw_grad(0).defined(); };
  if (has_tangent(x) || has_tangent(w1) || has_tangent(w2) || has_tangent(b1) || has_tangent(gate) ||
      has_tangent(b_gate) || has_tangent(b2)) {
    // Forward-mode derivatives see through the masked operator.
    static auto masked = find("surgeon::masked_ffn");
    return masked.call(x, scores, threshold, w1, b1, gate, b_gate, w2, b2, activation);
  }
  auto wants = [](const Tensor& tensor) { return tensor.requires_grad(); };
  auto may_want = [](const Optional& tensor) { return tensor && tensor->requires_grad(); };
  bool any = wants(x) || wants(w1) || wants(w2) || may_want(b1) || may_want(gate) || may_want(b_gate) || may_want(b2);
  if (!at::GradMode::is_enabled() || !any)
    return below_autograd(x, scores, threshold, w1, b1, gate, b_gate, w2, b2, activation);
  return Differentiable::apply(
      x, scores, threshold, w1, b1, gate, b_gate, w2, b2, std::string(activation.data(), activation.size()));
}

TORCH_LIBRARY_FRAGMENT(surgeon, library) {
  // Python has declared it before it loads this library.
  if (!c10::Dispatcher::singleton().findSchema({"surgeon::dynamic_k_ffn", ""})) library.def(SCHEMA);
  library.def("cpu_activations() -> str[]", &activations);
  library.def("cpu_instruction_sets() -> str[]", &instruction_sets);
  library.def("cpu_use_instruction_set(str name) -> ()", &use_instruction_set);
  library.def("cpu_take_way(str name) -> ()", &take_way);
  library.def("cpu_set_crossover(bool half, int tokens, int neurons, float share) -> ()", &set_crossover);
  library.def("cpu_get_crossover(bool half, int tokens, int neurons) -> float", &get_crossover);
}

TORCH_LIBRARY_IMPL(surgeon, CPU, library) { library.impl("dynamic_k_ffn", &forward); }

TORCH_LIBRARY_IMPL(surgeon, AutogradCPU, library) { library.impl("dynamic_k_ffn", &autograd); }

}  // namespace
}  // namespace surgeon
