// Linear layers that skip inputs, for CPUs with AVX-512 (F, BW, DQ, VL).
#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#define SURGEON_VECTOR_BYTES 64
#define SURGEON_VECTOR_REGISTERS 32
#define SURGEON_KERNELS linear_avx512
#include "kernels.inc"
#else
const surgeon::LinearKernels* surgeon::linear_avx512() { return nullptr; }
#endif
