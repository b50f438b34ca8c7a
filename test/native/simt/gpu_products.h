// The kernels of the model runner that a test program gets, compiled as gpu_under_test.h says.
#pragma once

#include "simt/gpu_under_test.h"

#ifdef INNERKV_ON_GPU
#include "cuda/products.h"
#else
#include "cuda/gemm.cu"
#include "cuda/matvec.cu"
#include "cuda/rows.cu"
#endif
