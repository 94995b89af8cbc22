#include "row_ops_impl.h"

const kbit::RowKernels* kbit::avx512_row_kernels() { return &ROW_KERNELS; }
