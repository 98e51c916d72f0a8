"""Huge pages for what is read at the speed of memory: ``csrc/cpu/huge_pages.h``."""

from __future__ import annotations

import os

from torch import Tensor

from nbl_kernels import _C


def use_huge_pages(tensor: Tensor) -> bool:
    """Moves a CPU tensor's storage into 2 MiB pages: its values and addresses stay the same.

    With pages of 4 KiB, what most systems give, reading a weight from memory waits for address
    translations, the more the longer the system has been running: weights are read 3 to 25 % faster
    from huge ones. Costs about a second for 2 GB, once.

    Returns:
        Whether it was done. False for other devices, for less than 2 MiB, where the system cannot
        (Linux before 6.1, other systems, no huge page free, memory mapped from a file: nothing is
        changed then), and under ``NBL_HUGE_PAGES=0``.
    """
    if tensor.device.type != "cpu" or os.environ.get("NBL_HUGE_PAGES") == "0":
        return False
    storage = tensor.untyped_storage()
    return _C.use_huge_pages(storage.data_ptr(), storage.nbytes())
