// Kernels for CPUs with AVX-512 and its dot product of bytes.
#include "int8.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#define SURGEON_VECTOR_BYTES 64
#define SURGEON_VECTOR_REGISTERS 32
#define SURGEON_NAME "avx512_vnni"
#define SURGEON_KERNELS int8_avx512_vnni
#define SURGEON_VNNI
#include "kernels.inc"
#else
const surgeon::Int8Kernels* surgeon::int8_avx512_vnni() { return nullptr; }
#endif
