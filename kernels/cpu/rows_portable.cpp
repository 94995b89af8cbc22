#include "row_ops_impl.h"

const kbit::RowKernels* kbit::portable_row_kernels() { return &ROW_KERNELS; }
