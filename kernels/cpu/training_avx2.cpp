#include "training_impl.h"

const kbit::TrainingKernels* kbit::avx2_training_kernels() { return &TRAINING_KERNELS; }
