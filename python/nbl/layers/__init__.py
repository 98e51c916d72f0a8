"""What stands in the place of a decoder layer.

spec         what a layer without attention is, and how config.nbl says it
linearized   the layer whose attention is a linear map, or nothing
cache        what a transformers cache holds for it
fused        decoder layers on the fused kernels
quantized    linears in 8 or 4 bits
plain        which modules kernels may read instead of calling them
"""
