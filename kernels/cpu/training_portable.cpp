#include "training_impl.h"

const kbit::TrainingKernels* kbit::portable_training_kernels() { return &TRAINING_KERNELS; }
