// Choices for this CPU: the instruction set, and the share of the experts above which dense products are faster.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "layer.h"
#include "tiles_permission.h"

namespace surgeon {

#if defined(__x86_64__)
// Sets with other instructions for experts with 8-bit weights only (see `int8/choice.h`).
inline const Kernels* called(const char* name, const Kernels* kernels) {
  return kernels ? new Kernels{name, kernels->f32, kernels->bf16_, kernels->thresholds} : nullptr;
}
inline const Kernels* avx512_vnni_kernels() {
  static const Kernels* found = called("avx512_vnni", avx512_kernels());
  return found;
}
inline const Kernels* avx2_vnni_kernels() {
  static const Kernels* found = called("avx2_vnni", avx2_kernels());
  return found;
}
#endif

// What this processor has, the best first. Kernels are asked for only there: what gives them is compiled like they are.
inline std::vector<const Kernels*> choices() {
  std::vector<const Kernels*> all;
  auto add = [&](const Kernels* (*get)(), bool supported) {
    const Kernels* kernels = supported ? get() : nullptr;
    if (kernels) all.push_back(kernels);
  };
#if defined(__x86_64__)
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  add(amx_bf16_kernels, bf16 && __builtin_cpu_supports("amx-bf16") && may_use_tiles());
  add(avx512_bf16_kernels, bf16);
  add(avx512_vnni_kernels, avx512 && __builtin_cpu_supports("avx512vnni"));
  add(avx512_kernels, avx512);
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  add(avx2_vnni_kernels, avx2 && __builtin_cpu_supports("avxvnni"));
  add(avx2_kernels, avx2);
#endif
  add(portable_kernels, true);
  return all;
}

inline std::atomic<const Kernels*> chosen{nullptr};

inline const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_acquire);
  if (!found) {
    found = choices().front();
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

// Names of the instruction sets that this processor has, the best first.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : choices()) names.emplace_back(kernels->name);
  return names;
}

inline void use_instruction_set(std::string name) {
  for (const Kernels* kernels : choices())
    if (name == kernels->name) {
      chosen.store(kernels, std::memory_order_release);
      return;
    }
  TORCH_CHECK_VALUE(false, "surgeon: this CPU does not have the instruction set '", name, "'");
}

// --- where everything at once is faster ------------------------------------------------------------------------------

// Shares of the experts above which the dense product is faster, by dtype, tokens and neurons in an expert, measured on
// this machine (`surgeon.kernels.cpu.crossover`). Until then a guess: ours with every expert is as fast.
constexpr int TOKEN_STEPS = 5, NEURON_STEPS = 6;
constexpr int64_t TOKENS[TOKEN_STEPS] = {1, 8, 64, 512, 2048}, NEURONS[NEURON_STEPS] = {4, 8, 16, 32, 64, 128};
inline std::atomic<float> crossovers[2][TOKEN_STEPS][NEURON_STEPS];

// Where `value` lies, by its logarithm, among the steps from `least` to `most`.
inline double step_of(int64_t value, const int64_t* steps, int least, int most) {
  if (value <= steps[least]) return least;
  while (least < most && steps[least + 1] < value) ++least;
  if (least == most) return most;
  double low = std::log(double(steps[least])), high = std::log(double(steps[least + 1]));
  return least + (std::log(double(value)) - low) / (high - low);
}

// Whether bfloat16 is multiplied by AMX.
inline bool by_tiles() { return kernels().bf16_.together; }

// What was measured for tokens that go one way is of no use for those that go another.
inline double token_step(bool half, int64_t tokens) {
  bool together = half && by_tiles();
  bool few = tokens <= (together ? MOST_FEW_TOKENS : FEW_TOKENS);
  int last = together ? 2 : 1;
  return step_of(tokens, TOKENS, few ? 0 : last + 1, few ? last : TOKEN_STEPS - 1);
}

// In bfloat16 a multiple of 32 goes a faster way than other sizes, which are as 16. By AMX those below 32 lie between, and
// of those above dense products are taken somewhat too early.
inline double neuron_step(bool half, int64_t neurons) {
  if (half && neurons > (by_tiles() ? 32 : 16) && neurons % 32) neurons = 16;
  return step_of(neurons, NEURONS, 0, NEURON_STEPS - 1);
}

// The one measured for these sizes or the nearest.
inline std::atomic<float>& crossover(bool half, int64_t tokens, int64_t neurons) {
  return crossovers[half][std::lround(token_step(half, tokens))][std::lround(neuron_step(half, neurons))];
}

inline void set_crossover(bool half, int64_t tokens, int64_t neurons, double share) {
  crossover(half, tokens, neurons).store(float(share), std::memory_order_relaxed);
}

// Between measured ones in proportion.
inline double get_crossover(bool half, int64_t tokens, int64_t neurons) {
  double token = token_step(half, tokens), neuron = neuron_step(half, neurons), sum = 0;
  for (int t : {0, 1})
    for (int n : {0, 1}) {
      double weight = (t ? token - std::floor(token) : 1 - (token - std::floor(token))) *
          (n ? neuron - std::floor(neuron) : 1 - (neuron - std::floor(neuron)));
      if (weight > 0)
        sum += weight * crossovers[half][int(token) + t][int(neuron) + n].load(std::memory_order_relaxed);
    }
  return sum;
}

// Which way all calls go, whatever was measured.
enum class Way { faster, kernels, dense };
inline std::atomic<Way> way{Way::faster};

inline void take_way(std::string name) {
  TORCH_CHECK_VALUE(
      name.empty() || name == "kernels" || name == "dense", "surgeon: there is no way '", name, "', only kernels, dense or ''");
  way.store(name.empty() ? Way::faster : name == "dense" ? Way::dense : Way::kernels, std::memory_order_relaxed);
}

// Whether a call that selects this share of the experts should be left to the dense product.
inline bool dense_is_faster(bool half, int64_t tokens, int64_t neurons, double share) {
  Way taken = way.load(std::memory_order_relaxed);
  return taken == Way::faster ? share > get_crossover(half, tokens, neurons) : taken == Way::dense;
}

inline const bool guessed = [] {
  for (auto& dtype : crossovers)
    for (auto& tokens : dtype)
      for (auto& share : tokens) share.store(1.f);
  return true;
}();

}  // namespace surgeon
