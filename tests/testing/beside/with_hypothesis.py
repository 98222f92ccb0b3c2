"""hypothesis: examples of one test share its isolation, unless each has its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from app_db.testing import isolated
from testing.beside.store import container, count_orders, count_sales, place_order

NUMBERS = st.lists(st.integers(0, 1000), max_size=3)


@pytest.mark.once
@pytest.mark.app_db
@given(numbers=NUMBERS)
def test_examples_see_the_rows_of_earlier_ones(numbers: list[int]) -> None:
    before = count_orders()
    for number in numbers:
        place_order(number)
    assert count_orders() == before + len(numbers)


@pytest.mark.once
@pytest.mark.app_db
@given(numbers=NUMBERS)
def test_an_example_can_be_isolated_inside_the_test(numbers: list[int]) -> None:
    with isolated(container):
        for number in numbers:
            place_order(number)
        assert count_orders() == count_sales() == len(numbers)


@pytest.mark.once
@pytest.mark.usefixtures("app_db_tables")
@given(numbers=NUMBERS)
def test_an_example_can_be_isolated_alone(numbers: list[int]) -> None:
    with isolated(container):
        for number in numbers:
            place_order(number)
        assert count_orders() == count_sales() == len(numbers)


class Store(RuleBasedStateMachine):
    """Orders are counted, whatever is done in which order. Each run of the machine is isolated."""

    def __init__(self) -> None:
        super().__init__()
        self.isolation = isolated(container)
        self.isolation.__enter__()
        self.expected = 0

    @rule(number=st.integers(0, 9))
    def place(self, number: int) -> None:
        place_order(number)
        self.expected += 1

    @precondition(lambda self: self.expected)
    @rule()
    def fail(self) -> None:
        with pytest.raises(LookupError), container.transaction():
            place_order(0)
            raise LookupError

    @invariant()
    def counted(self) -> None:
        assert count_orders() == self.expected

    def teardown(self) -> None:
        self.isolation.__exit__(None, None, None)


@pytest.mark.once
@pytest.mark.usefixtures("app_db_tables")
def test_a_state_machine() -> None:
    run_state_machine_as_test(Store, settings=settings(max_examples=5, stateful_step_count=10))
