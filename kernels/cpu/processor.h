// What suits this processor: the instruction set, and the share of the experts above which dense products are faster.
#pragma once

#include <c10/util/Exception.h>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "layer.h"

namespace surgeon {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
// A process has to ask Linux for the registers of AMX once, on behalf of all its threads.
inline bool may_use_tiles() {
  constexpr int REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
  return granted;
}
#endif

inline std::vector<Choice> choices() {
  std::vector<Choice> all;
  auto add = [&](const Kernels* kernels, bool supported) {
    if (kernels) all.push_back({kernels, supported});
  };
#if defined(__x86_64__)
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  add(amx_bf16_kernels(), bf16 && __builtin_cpu_supports("amx-bf16") && may_use_tiles());
  add(avx512_bf16_kernels(), bf16);
  add(avx512_kernels(), avx512);
  add(avx2_kernels(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#endif
  add(portable_kernels(), true);
  return all;
}

inline std::atomic<const Kernels*> chosen{nullptr};

inline const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_acquire);
  if (!found) {
    for (const Choice& choice : choices())
      if (choice.supported) {
        found = choice.kernels;
        break;
      }
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

// Names of the instruction sets that this processor has, the best first.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : choices())
    if (choice.supported) names.emplace_back(choice.kernels->name);
  return names;
}

inline void use_instruction_set(std::string name) {
  for (const Choice& choice : choices())
    if (choice.supported && name == choice.kernels->name) {
      chosen.store(choice.kernels, std::memory_order_release);
      return;
    }
  TORCH_CHECK_VALUE(false, "surgeon: this processor has no instruction set '", name, "'");
}

// --- where everything at once is faster ------------------------------------------------------------------------------

// Shares of the experts above which the dense product is faster, by dtype, tokens and neurons in an expert, measured on
// this machine (`surgeon.kernels.cpu.crossover`). Until then a guess: ours with every expert is as fast.
constexpr int TOKEN_STEPS = 4, NEURON_STEPS = 6;
inline std::atomic<float> crossovers[2][TOKEN_STEPS][NEURON_STEPS];

inline int step_of(int64_t value, int64_t first, int64_t factor, int steps) {
  int step = 0;
  for (double bound = double(first) * std::sqrt(double(factor)); step + 1 < steps && double(value) > bound; ++step)
    bound *= double(factor);
  return step;
}

inline std::atomic<float>& crossover(bool half, int64_t tokens, int64_t neurons) {
  // 1, 8, 64 and 512 tokens or more; 4, 8, 16, 32, 64 and 128 neurons or more. In bfloat16 a multiple of 32 goes a
  // faster way than other sizes, which are as 16.
  if (half && neurons > 16 && neurons % 32) neurons = 16;
  return crossovers[half][step_of(tokens, 1, 8, TOKEN_STEPS)][step_of(neurons, 4, 2, NEURON_STEPS)];
}

inline void set_crossover(bool half, int64_t tokens, int64_t neurons, double share) {
  crossover(half, tokens, neurons).store(float(share), std::memory_order_relaxed);
}

inline double get_crossover(bool half, int64_t tokens, int64_t neurons) {
  return crossover(half, tokens, neurons).load(std::memory_order_relaxed);
}

inline const bool guessed = [] {
  for (auto& dtype : crossovers)
    for (auto& tokens : dtype)
      for (auto& share : tokens) share.store(1.f);
  return true;
}();

}  // namespace surgeon
