"""What the filters remember of the rows that they kept."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.data import keyindex


def test_number_set_holds_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyindex, "RECENT", 16)
    rng = np.random.default_rng(0)
    numbers = [int(x) for x in rng.integers(0, 1 << 64, 1000, dtype=np.uint64)] + [0, (1 << 64) - 1]
    found = keyindex.NumberSet()
    for count, number in enumerate(numbers):
        assert number not in found
        found.add(number)
        found.add(number)
        assert number in found and (not count or numbers[count // 2] in found)
    assert all(number in found for number in numbers)
    sizes = [len(part) for part in found._sorted]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) < 10
