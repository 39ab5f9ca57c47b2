// Linear layers that skip inputs, for every CPU.
#include "linear.h"

#define SURGEON_VECTOR_BYTES 16
#define SURGEON_VECTOR_REGISTERS 16
#define SURGEON_KERNELS linear_portable
#include "kernels.inc"
