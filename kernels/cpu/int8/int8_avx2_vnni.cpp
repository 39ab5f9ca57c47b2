// Kernels for CPUs with AVX2, FMA and the dot product of bytes for their vectors (AVX-VNNI).
#include "int8.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avxvnni,avx2,fma")
#define SURGEON_VECTOR_BYTES 32
#define SURGEON_VECTOR_REGISTERS 16
#define SURGEON_NAME "avx2_vnni"
#define SURGEON_KERNELS int8_avx2_vnni
#define SURGEON_VNNI
#include "kernels.inc"
#else
const surgeon::Int8Kernels* surgeon::int8_avx2_vnni() { return nullptr; }
#endif
