"""use_huge_pages: same values, same addresses, other pages; and a plain False where it cannot."""

import re
from pathlib import Path

import pytest
import torch

import nbl_kernels as nk

MIB = 1 << 20


def huge_bytes() -> int:
    """Of this process's memory, what the kernel says is in huge pages."""
    text = Path("/proc/self/smaps").read_text()
    return 1024 * sum(map(int, re.findall(r"^AnonHugePages:\s+(\d+) kB", text, re.MULTILINE)))


def test_contents_and_addresses_stay():
    tensor = torch.randn(3 * MIB)
    view, expected = tensor[1:], tensor.clone()
    address, before = tensor.data_ptr(), huge_bytes()
    done = nk.use_huge_pages(view)  # its whole storage
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, expected)
    if not done:
        pytest.skip("this system gave no huge pages")
    assert huge_bytes() - before >= 8 * MIB
    assert nk.use_huge_pages(tensor)  # again: nothing to do


@pytest.mark.parametrize("elements", [0, 1, 1000])
def test_too_little_for_a_huge_page(elements):
    assert nk.use_huge_pages(torch.zeros(elements)) is False


def test_other_devices():
    assert nk.use_huge_pages(torch.empty(4 * MIB, device="meta")) is False


def test_memory_of_a_file_is_left(tmp_path):
    path = tmp_path / "weights"
    torch.arange(2 * MIB, dtype=torch.int32).numpy().tofile(path)
    tensor = torch.from_file(str(path), shared=False, size=2 * MIB, dtype=torch.int32)
    nk.use_huge_pages(tensor)
    assert torch.equal(tensor, torch.arange(2 * MIB, dtype=torch.int32))


def test_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("NBL_HUGE_PAGES", "0")
    assert nk.use_huge_pages(torch.zeros(4 * MIB)) is False
