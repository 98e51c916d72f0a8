// The same where the GPU has an instruction for fp8.
#define NBL_HAS_FP8_CONVERSION 1
#include "drive_weights.cpp"
