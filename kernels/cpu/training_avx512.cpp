#include "training_impl.h"

const kbit::TrainingKernels* kbit::avx512_training_kernels() { return &TRAINING_KERNELS; }
