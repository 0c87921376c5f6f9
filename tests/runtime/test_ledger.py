from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adainfer_runtime.ledger import Ledger, Pass, StageCost, WorkCount


@given(
    steps=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(0, 12)), max_size=20
    ),
    max_rows=st.integers(1, 6),
)
def test_filled_lengths_never_grow_with_depth_and_nothing_is_run_twice(steps, max_rows):
    ledger = Ledger(tuple(map(StageCost, (1, 2, 1, 3))))
    seen = [set() for _ in range(4)]
    for admitted, stages, cut in steps:
        ledger.admit(admitted)
        for todo in ledger.plan(stages, max_rows):
            assert 0 < todo.end - todo.start <= max_rows
            positions = set(range(todo.start, todo.end))
            for stage in todo.stages:
                assert todo.start == ledger.filled[stage]  # no gap
                assert not positions & seen[stage]
                if stage:
                    assert positions <= seen[stage - 1]
                seen[stage] |= positions
            ledger.record(todo)
            assert list(ledger.filled) == sorted(ledger.filled, reverse=True)
        assert all(filled == ledger.length for filled in ledger.filled[:stages])
        if cut < ledger.length:
            ledger.truncate(ledger.length - cut)
            for positions in seen:
                positions -= set(range(ledger.length, ledger.length + cut))


def test_counts():
    ledger = Ledger((StageCost(2, 10, 1), StageCost(3, 100, 1)))
    ledger.admit(4)
    ledger.record(Pass(0, 0, 0, 4))
    pairs = 1 + 2 + 3 + 4
    assert ledger.count == WorkCount(8, 20, 40 + pairs, 440 + 2 * pairs)
    assert ledger.count.layers_saved == 0.6
    ledger.record_probe(7, 5)
    assert ledger.count.compute_saved == 1 - (40 + pairs + 7) / (440 + 2 * pairs + 5)
    assert WorkCount(0, 0).layers_saved == WorkCount(0, 0).compute_saved == 0.0
    assert WorkCount(5, 9, 3, 3) - WorkCount(2, 4, 1, 2) == WorkCount(3, 5, 2, 1)


@given(st.integers(0, 50), st.integers(0, 50))
def test_attention_pairs_add_up(start, rows):
    cost = StageCost(1, 0, 1)
    assert cost.multiply_adds(start, start + rows) == sum(range(start + 1, start + rows + 1))
