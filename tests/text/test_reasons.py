"""Reasons for refusing sites, like ones counted."""

from __future__ import annotations

from surgeon.sites.rejection import Rejection
from surgeon.text.reasons import count_reasons


def test_reasons_are_counted_without_their_particulars() -> None:
    rejected = [
        Rejection("different-inputs", "gate and up read different inputs", "a"),
        Rejection("escapes", "the hidden values (gelu_1) are also used outside the FFN, by 'aux.1'", "b"),
        Rejection("escapes", "the hidden values (gelu_2) are also used outside the FFN, by 'aux.2'", "c"),
    ]
    common, rare = count_reasons(rejected)
    assert (common.count, common.first) == (2, "b")
    assert common.text == rejected[1].reason
    assert (rare.count, rare.first) == (1, "a")
