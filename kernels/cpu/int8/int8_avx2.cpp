// Kernels for CPUs with AVX2 and FMA.
#include "int8.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define SURGEON_VECTOR_BYTES 32
#define SURGEON_VECTOR_REGISTERS 16
#define SURGEON_NAME "avx2"
#define SURGEON_KERNELS int8_avx2
#include "kernels.inc"
#else
const surgeon::Int8Kernels* surgeon::int8_avx2() { return nullptr; }
#endif
