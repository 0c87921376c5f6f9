from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adainfer_runtime.ledger import LayerCount, Ledger, Pass


@given(
    steps=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(0, 12)), max_size=20
    ),
    max_rows=st.integers(1, 6),
)
def test_filled_lengths_never_grow_with_depth_and_nothing_is_run_twice(steps, max_rows):
    ledger = Ledger((1, 2, 1, 3))
    seen = [set() for _ in range(4)]
    for admitted, stages, cut in steps:
        ledger.admit(admitted)
        for todo in ledger.plan(stages, max_rows):
            assert 0 < todo.end - todo.start <= max_rows
            assert todo.start == ledger.filled[todo.stage]  # no gap
            positions = set(range(todo.start, todo.end))
            assert not positions & seen[todo.stage]
            if todo.stage:
                assert positions <= seen[todo.stage - 1]
            seen[todo.stage] |= positions
            ledger.record(todo)
            assert list(ledger.filled) == sorted(ledger.filled, reverse=True)
        assert all(filled == ledger.length for filled in ledger.filled[:stages])
        if cut < ledger.length:
            ledger.truncate(ledger.length - cut)
            for positions in seen:
                positions -= set(range(ledger.length, ledger.length + cut))


def test_counts():
    ledger = Ledger((2, 3))
    ledger.admit(4)
    ledger.record(Pass(0, 0, 4))
    assert ledger.count == LayerCount(8, 20)
    assert ledger.count.saved == 0.6
    assert LayerCount(0, 0).saved == 0.0
    assert LayerCount(5, 9) - LayerCount(2, 4) == LayerCount(3, 5)
