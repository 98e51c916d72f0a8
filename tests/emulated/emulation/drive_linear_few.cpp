// The linear driver with few instances of the kernel: for tests that compile it again and again.
#define NBL_FEW_TILES
#include "drive_linear.cpp"
