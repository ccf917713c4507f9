"""`check` must print one of three signs, catch every wrong answer, and never raise."""

import functools

import numpy as np
import pytest
import torch

from llmlib import exercises


@pytest.fixture(autouse=True)
def _exercises(monkeypatch):
    """Give the module three exercises that stand in no notebook."""

    @exercises.exercise
    def double():
        yield (2,), 4
        yield (-1.5,), -3.0

    @exercises.exercise
    def halves():
        yield (torch.tensor([2.0, 4.0]),), torch.tensor([1.0, 2.0])

    @exercises.exercise
    def any_even():
        yield (), lambda n: None if n % 2 == 0 else "an even number"

    for cases in (double, halves, any_even):
        monkeypatch.setattr(exercises, cases.__name__, cases, raising=False)


def printed(capsys, stub) -> str:
    exercises.check(stub)
    return capsys.readouterr().out


def test_an_untouched_stub_waits(capsys):
    def double(x):
        """Return twice `x`."""
        ...

    assert printed(capsys, double) == "○ double is waiting for you\n"


def test_a_right_answer_passes(capsys):
    def double(x):
        return 2 * x

    assert printed(capsys, double) == "✓ double: all checks passed\n"


def test_a_forgotten_return_is_no_untouched_stub(capsys):
    def double(x):
        2 * x

    assert printed(capsys, double) == "✗ double(2)\n  expected  4\n  got       None\n"


def test_an_answer_right_on_some_cases_fails_with_the_case_that_shows_it(capsys):
    def double(x):
        return x * x

    assert printed(capsys, double) == "✗ double(-1.5)\n  expected  -3.0\n  got       2.25\n"


def test_an_answer_that_raises_is_reported(capsys):
    def double(x):
        return x / 0

    assert "raised    ZeroDivisionError" in printed(capsys, double)


def test_an_unknown_name_is_reported(capsys):
    def treble(x):
        return 3 * x

    assert "no exercise named treble" in printed(capsys, treble)


@pytest.mark.parametrize("name", ["np", "check", "Case"])
def test_a_name_of_the_module_is_no_exercise(capsys, name):
    def stub(): ...

    stub.__name__ = name
    assert "no exercise" in printed(capsys, stub)


def test_a_solution_that_changes_its_input_fails(capsys):
    def halves(x):
        return x.div_(2)

    wanted = "expected  its inputs left as they were\n  got       (tensor([1., 2.]),)"
    assert wanted in printed(capsys, halves)
    assert wanted in printed(capsys, halves), "the first try must not have changed the cases"


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.1]), torch.tensor([[1.0, 2.0]]), [1.0, 2.0], None])
def test_a_wrong_tensor_fails(capsys, wrong):
    def halves(x):
        return wrong

    assert "✗" in printed(capsys, halves)


@pytest.mark.parametrize("odd", [np.array(["a", "b"]), torch.tensor([1.0, 2.0]).to_sparse()])
def test_a_result_that_cannot_be_compared_is_a_wrong_answer(capsys, odd):
    def halves(x):
        return odd

    assert "✗" in printed(capsys, halves)


def test_something_without_a_name_is_reported(capsys):
    assert "no exercise named functools.partial" in printed(capsys, functools.partial(print))


def test_a_predicate_judges(capsys):
    def any_even():
        return 3

    assert "expected  an even number\n  got       3" in printed(capsys, any_even)


def test_a_predicate_that_raises_is_a_wrong_answer(capsys):
    def any_even():
        return "two"

    assert "✗" in printed(capsys, any_even)


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        (3, 3.0, True),
        (np.float32(0.5), 0.5, True),
        (torch.tensor(0.5), 0.5, True),
        (True, 1, False),
        (1, True, False),
        ("3", 3, False),
        (float("nan"), 0.5, False),
        ([1, 2], (1, 2), False),
        ([1, [2.0]], [1, [2.000001]], True),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 0.1 + 0.2}, {"a": 0.3}, True),
        ({"a": 1}, {"b": 1}, False),
        ([("a", 1)], {"a": 1}, False),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0]), True),
        (np.array([1, 2]), torch.tensor([1, 2]), True),
    ],
)
def test_same(actual, expected, same):
    assert exercises._same(actual, expected) is same
