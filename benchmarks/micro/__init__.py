"""`pytest --benchmark`: every kernel beside PyTorch and the limits of the machine."""
