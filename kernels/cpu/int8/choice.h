// The choice of the instruction set for experts with weights of 8 or 4 bits.
#pragma once

#include <cstring>

#include "../tiles_permission.h"
#include "int8.h"

namespace surgeon {

// The kernels of the instruction set `name`, or for those that are called so elsewhere; "": the best of this processor.
// Null where the processor does not have it.
inline const Int8Kernels* int8_kernels(const char* name) {
  const Int8Kernels* found = nullptr;
  auto offer = [&](const char* called, bool supported, const Int8Kernels* (*get)()) {
    if (!found && supported && (!*name || !std::strcmp(name, called))) found = get();
  };
#if defined(__x86_64__)
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  bool amx = vnni && __builtin_cpu_supports("amx-int8") && may_use_tiles();
  for (const char* called : {"amx_bf16", "amx_int8"}) offer(called, amx, int8_amx);
  for (const char* called : {"amx_bf16", "avx512_bf16", "avx512_vnni"}) offer(called, vnni, int8_avx512_vnni);
  for (const char* called : {"amx_bf16", "avx512_bf16", "avx512"}) offer(called, avx512, int8_avx512);
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  offer("avx2_vnni", avx2 && __builtin_cpu_supports("avxvnni"), int8_avx2_vnni);
  offer("avx2", avx2, int8_avx2);
#endif
  offer("portable", true, int8_portable);
  return found;
}

}  // namespace surgeon
