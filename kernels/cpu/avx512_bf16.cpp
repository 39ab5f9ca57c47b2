// The kernels for CPUs with AVX-512 and its dot product of bfloat16.
#include "layer.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#define SURGEON_VECTOR_BYTES 64
#define SURGEON_VECTOR_REGISTERS 32
#define SURGEON_NAME "avx512_bf16"
#define SURGEON_KERNELS avx512_bf16_kernels
#define SURGEON_BF16_DOT
#include "kernels.inc"
#else
const surgeon::Kernels* surgeon::avx512_bf16_kernels() { return nullptr; }
#endif
