"""Compute gradients: a number that remembers how it was made, and the losses that are built from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Number = float | int


class Value:
    """Hold a number, its gradient, and the values it was made from.

    `parents` are those values; `local_grads` are the slopes of this one operation, one a parent.
    Slopes are taken when the operation runs: a later change of `data` does not touch them.
    """

    __slots__ = ("data", "grad", "local_grads", "op", "parents")

    def __init__(
        self,
        data: Number,
        parents: tuple[Value, ...] = (),
        local_grads: tuple[float, ...] = (),
        op: str = "",
    ):
        self.data, self.grad = float(data), 0.0
        self.parents, self.local_grads, self.op = parents, local_grads, op

    def __repr__(self) -> str:
        return f"Value({self.data:.6g}, grad={self.grad:.6g})"

    def __add__(self, other: Value | Number) -> Value:
        other = _as_value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0), "+")

    def __sub__(self, other: Value | Number) -> Value:
        other = _as_value(other)
        return Value(self.data - other.data, (self, other), (1.0, -1.0), "−")

    def __mul__(self, other: Value | Number) -> Value:
        other = _as_value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data), "×")

    def __truediv__(self, other: Value | Number) -> Value:
        other = _as_value(other)
        if other.data == 0:
            raise ValueError(f"{self.data} / 0: a division needs a divisor other than 0")
        quotient = self.data / other.data
        return Value(quotient, (self, other), (1 / other.data, -quotient / other.data), "÷")

    def __pow__(self, exponent: Number) -> Value:
        """Raise to a constant power, wherever value and slope are finite numbers."""
        x = self.data
        if (x < 0 and exponent != int(exponent)) or (x == 0 and exponent < 1 and exponent != 0):
            raise ValueError(f"{x} ** {exponent} has no finite value and slope: keep the base above 0")
        try:
            y, slope = x**exponent, exponent * x ** (exponent - 1) if exponent else 0.0
        except OverflowError:
            raise ValueError(f"{x} ** {exponent} is too large for a float: scale the base down") from None
        return Value(y, (self,), (slope,), f"^{exponent}")

    def __neg__(self) -> Value:
        return self * -1

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Number) -> Value:
        return Value(other) - self

    def __rtruediv__(self, other: Number) -> Value:
        return Value(other) / self

    def exp(self) -> Value:
        try:
            y = math.exp(self.data)
        except OverflowError:
            raise ValueError(
                f"exp({self.data}) is too large for a float: subtract the largest first, as log_sum_exp does"
            ) from None
        return Value(y, (self,), (y,), "exp")

    def log(self) -> Value:
        """Return the natural logarithm; ValueError unless the value is positive."""
        if self.data <= 0:
            raise ValueError(
                f"log({self.data}): only a positive number has a logarithm; look where it was made"
            )
        return Value(math.log(self.data), (self,), (1 / self.data,), "log")

    def tanh(self) -> Value:
        y = math.tanh(self.data)
        return Value(y, (self,), (1 - y * y,), "tanh")

    def relu(self) -> Value:
        """Return the value if it is positive, else 0; the slope at 0 is 0, as in torch."""
        return Value(max(self.data, 0.0), (self,), (float(self.data > 0),), "relu")

    def backward(self) -> None:
        """Add to the `grad` of every leaf the slope of this value with respect to it: the chain rule.

        Leaves accumulate over several calls, as in torch; what lies between starts at 0 in each.
        """
        order = topological_order(self)
        for value in order:
            if value.parents:
                value.grad = 0.0
        self.grad += 1.0
        for value in reversed(order):
            for parent, local_grad in zip(value.parents, value.local_grads, strict=True):
                parent.grad += local_grad * value.grad


def _as_value(number: Value | Number) -> Value:
    return number if isinstance(number, Value) else Value(number)


def topological_order(root: Value) -> list[Value]:
    """List all that `root` was made from, each value after its parents, `root` last.

    The stack is a list and not the interpreter's own, so a graph may be of any depth.
    """
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        value, parents_are_listed = stack.pop()
        if parents_are_listed:
            order.append(value)
        elif value not in seen:
            seen.add(value)
            stack.append((value, True))
            stack.extend((parent, False) for parent in reversed(value.parents))
    return order


def zero_grad(values: Iterable[Value]) -> None:
    """Set every gradient to 0, before the next `backward` adds to it."""
    for value in values:
        value.grad = 0.0


def log_sum_exp(logits: Sequence[Value]) -> Value:
    """Return log Σ exp(z), safe for any size: the largest logit is taken out of the sum first."""
    if not logits:
        raise ValueError("log_sum_exp of 0 logits: give at least one")
    largest = max(z.data for z in logits)
    return sum((z - largest).exp() for z in logits).log() + largest


def softmax(logits: Sequence[Value]) -> list[Value]:
    """Turn logits into probabilities: exp(z) / Σ exp(z)."""
    total = log_sum_exp(logits)
    return [(z - total).exp() for z in logits]


def cross_entropy(logits: Sequence[Value], target: int) -> Value:
    """Return −log p(target), in nats."""
    if not 0 <= target < len(logits):
        raise ValueError(
            f"target {target} with {len(logits)} logits: a target is a place from 0 to {len(logits) - 1}"
        )
    return log_sum_exp(logits) - logits[target]
