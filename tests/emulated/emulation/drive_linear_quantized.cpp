// The linear driver with the instances for quantized weights.
#define NBL_QUANTIZED
#include "drive_linear.cpp"
