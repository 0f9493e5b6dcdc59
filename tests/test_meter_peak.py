"""The peak of memory, started anew."""

from __future__ import annotations

import sys

import pytest

from pennyweight.meter.peak import peak_memory, start_peak

MB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is started anew on Linux only")
def test_what_was_let_go_is_no_part_of_a_later_peak():
    start_peak()
    before = peak_memory()
    blocks = [bytearray(b"1" * (MB // 16)) for _ in range(16 * 200)]  # small enough for the allocator to keep them
    last = bytearray(b"1" * (MB // 16))
    assert peak_memory() - before > 190 * MB
    del blocks
    start_peak()
    assert peak_memory() - before < 20 * MB
    assert last[0] == ord("1")  # it was held: memory behind it cannot be given back by lowering its end
