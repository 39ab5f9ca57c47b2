"""Reasons for refusing sites, like ones counted."""

from __future__ import annotations

from surgeon.text.reasons import count_reasons


def test_reasons_are_counted_without_their_particulars() -> None:
    rejected = [
        ("a", "gate and up read different inputs"),
        ("b", "the hidden values (gelu_1) are also used outside the FFN, by 'aux.1'"),
        ("c", "the hidden values (gelu_2) are also used outside the FFN, by 'aux.2'"),
    ]
    common, rare = count_reasons(rejected)
    assert (common.count, common.first) == (2, "b")
    assert common.text == rejected[1][1]
    assert (rare.count, rare.first) == (1, "a")
