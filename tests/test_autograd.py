import math
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlib.autograd import (
    Value,
    cross_entropy,
    log_sum_exp,
    softmax,
    topological_order,
    zero_grad,
)

# Each works on Values and on torch's scalars alike, and is defined everywhere.
OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: a / (b * b + 0.5),
    "neg": lambda a, b: -a,
    "square": lambda a, b: a**2,
    "cube": lambda a, b: a**3,
    "root": lambda a, b: (a * a + 0.5) ** 0.5,
    "inverse": lambda a, b: (a * a + 0.5) ** -1.5,
    "constants": lambda a, b: 2 / (3 - a.tanh()) + 1 - a * 0.5 + 2 * b - 1,
    "exp": lambda a, b: a.tanh().exp(),
    "log": lambda a, b: (a * a + 0.5).log(),
    "tanh": lambda a, b: a.tanh(),
    "relu": lambda a, b: a.relu(),
}
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 10**6), st.integers(0, 10**6)),
    min_size=1,
    max_size=15,
)
NUMBERS = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-6)


def run(program, leaves):
    """Apply each operation to two earlier results, so that values are used again and again."""
    results = list(leaves)
    for name, i, j in program:
        result = OPERATIONS[name](results[i % len(results)], results[j % len(results)])
        results.append(result * 1e-3 if abs(float(getattr(result, "data", result))) > 100 else result)
    return results[-1]


def torch_grads(function, numbers):
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in numbers]
    out = function(leaves)
    grads = torch.autograd.grad(out, leaves, allow_unused=True) if out.requires_grad else [None] * len(leaves)
    return out.item(), [0.0 if grad is None else grad.item() for grad in grads]


def our_grads(function, numbers):
    leaves = [Value(x) for x in numbers]
    out = function(leaves)
    out.backward()
    return out.data, [leaf.grad for leaf in leaves]


def same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6, abs=1e-9)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6, abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(PROGRAMS, st.lists(NUMBERS, min_size=1, max_size=4))
def test_gradients_of_random_expressions_equal_torch(program, numbers):
    same(our_grads(lambda xs: run(program, xs), numbers), torch_grads(lambda xs: run(program, xs), numbers))


@settings(deadline=None)
@given(st.lists(st.floats(-2000, 2000), min_size=1, max_size=6), st.data())
def test_cross_entropy_equals_torch_for_logits_of_any_size(numbers, data):
    target = data.draw(st.integers(0, len(numbers) - 1))
    theirs = torch_grads(lambda zs: torch.stack(zs).log_softmax(0)[target].neg(), numbers)
    same(our_grads(lambda zs: cross_entropy(zs, target), numbers), theirs)


@settings(deadline=None)
@given(st.lists(st.floats(-2000, 2000), min_size=1, max_size=6), st.data())
def test_softmax_and_log_sum_exp_equal_torch(numbers, data):
    i = data.draw(st.integers(0, len(numbers) - 1))
    same(
        our_grads(lambda zs: softmax(zs)[i], numbers),
        torch_grads(lambda zs: torch.stack(zs).softmax(0)[i], numbers),
    )
    same(our_grads(log_sum_exp, numbers), torch_grads(lambda zs: torch.stack(zs).logsumexp(0), numbers))


def test_uniform_logits_cost_the_logarithm_of_their_number():
    assert cross_entropy([Value(7.0)] * 50, 3).data == pytest.approx(math.log(50))


def test_a_value_used_twice_collects_both_gradients():
    x = Value(3.0)
    (x * x + x).backward()
    assert x.grad == 7.0


def test_relu_has_slope_zero_at_zero_and_power_zero_is_constant():
    x, y = Value(0.0), Value(0.0)
    (x.relu() + y**0).backward()
    assert (x.grad, y.grad) == (0.0, 0.0)


@pytest.mark.parametrize("depth", [50_000])
def test_a_deep_graph_needs_no_deep_stack(depth):
    x = Value(1.0)
    y = x
    for _ in range(depth):
        y = y + 1
    y.backward()
    assert (y.data, x.grad) == (depth + 1, 1.0)
    assert len(topological_order(y)) == 2 * depth + 1


def test_topological_order_lists_each_value_once_and_after_its_parents():
    x = Value(2.0)
    a = x * x
    b = a + x
    c = a * b
    order = topological_order(c)
    assert order == [x, a, b, c]


def test_leaves_accumulate_over_two_calls_and_inner_values_do_not():
    x = Value(3.0)
    y = x * x
    z = y + y
    z.backward()
    z.backward()
    assert (x.grad, y.grad, z.grad) == (24.0, 2.0, 1.0)


def test_two_losses_that_share_a_value_add_up_on_the_leaf():
    x = Value(3.0)
    shared = x * x
    (shared * 2).backward()
    (shared * 5).backward()
    assert x.grad == 42.0


def test_zero_grad_starts_afresh():
    x = Value(3.0)
    (x * x).backward()
    zero_grad([x])
    (x * 4).backward()
    assert x.grad == 4.0


def test_a_leaf_is_its_own_gradient():
    x = Value(3.0)
    x.backward()
    assert x.grad == 1.0


def test_augmented_assignment_makes_a_new_value():
    x = Value(3.0)
    y = x
    y += 1
    y *= 2
    y.backward()
    assert (x.data, x.grad, y.data) == (3.0, 2.0, 8.0)


def test_changing_data_after_the_operation_does_not_change_its_slope():
    x = Value(3.0)
    y = x * x
    x.data = 100.0
    y.backward()
    assert x.grad == 6.0


def test_numpy_numbers_work_on_both_sides():
    x = Value(3.0)
    y = np.float64(2.0) * x + np.float64(1.0)
    assert isinstance(y, Value)
    assert y.data == 7.0


def test_repr_shows_the_number_and_its_gradient():
    x = Value(3.0)
    (x * 2).backward()
    assert repr(x) == "Value(3, grad=2)"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Value(-2.0).log(), "log.*-2.0.*positive"),
        (lambda: Value(0.0).log(), "log.*0.0.*positive"),
        (lambda: Value(1.0) / Value(0.0), "1.0 / 0.*divisor other than 0"),
        (lambda: 1 / Value(0.0), "1.0 / 0.*divisor other than 0"),
        (lambda: Value(-1.0) ** 0.5, r"-1.0 \*\* 0.5.*above 0"),
        (lambda: Value(0.0) ** -1, r"0.0 \*\* -1.*above 0"),
        (lambda: Value(0.0) ** 0.5, r"0.0 \*\* 0.5.*above 0"),
        (lambda: Value(1e200) ** 2, r"1e\+200 \*\* 2.*scale"),
        (lambda: Value(1000.0).exp(), "exp.*1000.0.*log_sum_exp"),
        (lambda: log_sum_exp([]), "0 logits.*at least one"),
        (lambda: softmax([]), "0 logits.*at least one"),
        (lambda: cross_entropy([Value(1.0), Value(2.0)], 2), "target 2 with 2 logits.*0 to 1"),
        (lambda: cross_entropy([Value(1.0), Value(2.0)], -1), "target -1 with 2 logits.*0 to 1"),
    ],
)
def test_bad_numbers_give_a_clear_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
