// The kernels for CPUs with AMX's products of bfloat16 and everything that `avx512_bf16.cpp` needs.
#include "layer.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#define SURGEON_VECTOR_BYTES 64
#define SURGEON_VECTOR_REGISTERS 32
#define SURGEON_NAME "amx_bf16"
#define SURGEON_KERNELS amx_bf16_kernels
#define SURGEON_BF16_DOT
#define SURGEON_AMX
#include "kernels.inc"
#else
const surgeon::Kernels* surgeon::amx_bf16_kernels() { return nullptr; }
#endif
