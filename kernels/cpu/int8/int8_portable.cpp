// Kernels for every CPU. They use vectors of 16 bytes, which every CPU has in some form.
#include "int8.h"

#define SURGEON_VECTOR_BYTES 16
#define SURGEON_VECTOR_REGISTERS 16
#define SURGEON_NAME "portable"
#define SURGEON_KERNELS int8_portable
#include "kernels.inc"
