// Linear layers that skip inputs, for CPUs with AVX2, FMA and F16C.
#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")
#define SURGEON_VECTOR_BYTES 32
#define SURGEON_VECTOR_REGISTERS 16
#define SURGEON_KERNELS linear_avx2
#include "kernels.inc"
#else
const surgeon::LinearKernels* surgeon::linear_avx2() { return nullptr; }
#endif
