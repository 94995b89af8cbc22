#include "row_ops_impl.h"

const kbit::RowKernels* kbit::avx2_row_kernels() { return &ROW_KERNELS; }
