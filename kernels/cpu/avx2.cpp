// The kernels for CPUs with AVX2 and FMA.
#include "layer.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define SURGEON_VECTOR_BYTES 32
#define SURGEON_VECTOR_REGISTERS 16
#define SURGEON_NAME "avx2"
#define SURGEON_KERNELS avx2_kernels
#include "kernels.inc"
#else
const surgeon::Kernels* surgeon::avx2_kernels() { return nullptr; }
#endif
