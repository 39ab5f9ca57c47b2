// Kernels for CPUs with AMX's products of bytes and everything that `int8_avx512_vnni.cpp` needs.
#include "int8.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#define SURGEON_VECTOR_BYTES 64
#define SURGEON_VECTOR_REGISTERS 32
#define SURGEON_NAME "amx_int8"
#define SURGEON_KERNELS int8_amx
#define SURGEON_VNNI
#define SURGEON_AMX_INT8
#include "kernels.inc"
#else
const surgeon::Int8Kernels* surgeon::int8_amx() { return nullptr; }
#endif
