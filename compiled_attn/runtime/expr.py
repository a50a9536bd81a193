"""Sizes as data: integer expressions over named symbols, small enough to be evaluated by the C++ runner as well.

An expression is an int, a symbol's name, or a tuple `(operator, operand, ...)`: `("mul", 2, "batch")`. In a contract it
is JSON (tuples are arrays). Operators: add, mul, floordiv, mod, max, min; conditions besides: eq, ne, lt, le, gt, ge,
and, or, not. Division rounds down, as Python's does. Values stay below 2**63; beyond that evaluation fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

Expr = int | str | tuple[Any, ...]

SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
LIMIT = 2**63
DEPTH = 32
VARIADIC = {"add": " + ", "mul": "*", "max": "", "min": "", "and": " and ", "or": " or "}
BINARY = {
    "floordiv": "//",
    "mod": "%",
    "eq": " == ",
    "ne": " != ",
    "lt": " < ",
    "le": " <= ",
    "gt": " > ",
    "ge": " >= ",
}
CONDITIONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"})

_FOLD: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "max": max,
    "min": min,
    "and": lambda a, b: int(bool(a) and bool(b)),
    "or": lambda a, b: int(bool(a) or bool(b)),
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "eq": lambda a, b: int(a == b),
    "ne": lambda a, b: int(a != b),
    "lt": lambda a, b: int(a < b),
    "le": lambda a, b: int(a <= b),
    "gt": lambda a, b: int(a > b),
    "ge": lambda a, b: int(a >= b),
}


class Undefined(ValueError):
    """An expression has no value: a symbol is unknown, a divisor is zero, or the value does not fit 64 bits."""


def evaluate(expr: Expr, symbols: Mapping[str, int]) -> int:
    """Value of an expression; conditions give 0 or 1. Raises Undefined."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, str):
        if expr not in symbols:
            raise Undefined(f"{expr} is not known")
        return symbols[expr]
    operator, *operands = expr
    values = [evaluate(e, symbols) for e in operands]
    if operator == "not":
        return int(not values[0])
    if operator in ("floordiv", "mod") and values[1] == 0:
        raise Undefined(f"{text(expr)} divides by zero")
    value = reduce(_FOLD[operator], values)
    if not -LIMIT <= value < LIMIT:
        raise Undefined(f"{text(expr)} does not fit 64 bits")
    return value


def symbols_of(expr: Expr) -> set[str]:
    """Names that an expression refers to."""
    if isinstance(expr, str):
        return {expr}
    return set().union(*(symbols_of(e) for e in expr[1:])) if isinstance(expr, tuple) else set()


def solve(expr: Expr, value: int, symbols: Mapping[str, int]) -> tuple[str, int] | None:
    """The one unknown symbol of `expr` and its size, given the value of the expression, which is linear in it.

    None where no size fits, the expression is not linear, or the number of unknown symbols is not one.
    """
    unknown = symbols_of(expr) - set(symbols)
    if len(unknown) != 1:
        return None
    name = unknown.pop()
    try:
        at_1, at_2, at_3 = (evaluate(expr, {**symbols, name: n}) for n in (1, 2, 3))
        slope = at_2 - at_1
        if slope == 0 or at_3 - at_2 != slope or (value - at_1) % slope:
            return None
        size = 1 + (value - at_1) // slope
        return (name, size) if evaluate(expr, {**symbols, name: size}) == value else None
    except Undefined:
        return None


def text(expr: Expr) -> str:
    """An expression as one writes it: `2*batch + 1`."""
    if not isinstance(expr, tuple):
        return str(expr)
    operator, *operands = expr
    if operator in ("max", "min"):
        return f"{operator}({', '.join(text(e) for e in operands)})"
    if operator == "not":
        return f"not {_part(operands[0])}"
    return (VARIADIC.get(operator) or BINARY[operator]).join(_part(e) for e in operands)


def _part(expr: Expr) -> str:
    atom = not isinstance(expr, tuple) or expr[0] in ("max", "min")
    return text(expr) if atom else f"({text(expr)})"


def well_formed(value: Any, depth: int = 0) -> Expr:
    """A JSON value as an expression. Raises ValueError with what is wrong."""
    if isinstance(value, bool) or depth > DEPTH:
        raise ValueError(f"{value!r} is no expression" if depth <= DEPTH else "an expression is nested too deep")
    if isinstance(value, int):
        if not -LIMIT <= value < LIMIT:
            raise ValueError(f"{value} does not fit 64 bits")
        return value
    if isinstance(value, str):
        if not SYMBOL.match(value):
            raise ValueError(f"{value!r} is no symbol")
        return value
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], str):
        raise ValueError(f"{value!r} is no expression")
    operator, count = value[0], len(value) - 1
    if operator not in VARIADIC and operator not in BINARY and operator != "not":
        raise ValueError(f"{operator!r} is no operator")
    wanted = {"not": count == 1}.get(operator, count == 2 if operator in BINARY else count >= 2)
    if not wanted:
        raise ValueError(f"{operator} has {count} operands")
    return (operator, *(well_formed(v, depth + 1) for v in value[1:]))


def from_sympy(expr: Any) -> Expr:
    """A sympy expression of torch's symbolic shapes. Raises ValueError naming the function that has no counterpart."""
    if isinstance(expr, int):
        return int(expr)
    if getattr(expr, "is_Integer", False):
        return int(expr)
    if getattr(expr, "is_Symbol", False):
        return str(expr)
    if expr in (True, False):
        return int(bool(expr))
    name = type(expr).__name__
    if name == "Pow":
        base, power = expr.args
        if not (power.is_Integer and 2 <= int(power) <= 8):
            raise ValueError(f"{expr} has no integer form")
        return ("mul", *[from_sympy(base)] * int(power))
    operator = _SYMPY.get(name)
    if operator is None:
        raise ValueError(f"{name} has no counterpart in a contract")
    operands = [from_sympy(a) for a in _ordered(expr)]
    return well_formed((operator, *operands))


_SYMPY = {
    "Add": "add",
    "Mul": "mul",
    "FloorDiv": "floordiv",
    "CleanDiv": "floordiv",
    "Mod": "mod",
    "PythonMod": "mod",
    "Max": "max",
    "Min": "min",
    "Equality": "eq",
    "Unequality": "ne",
    "StrictLessThan": "lt",
    "LessThan": "le",
    "StrictGreaterThan": "gt",
    "GreaterThan": "ge",
    "And": "and",
    "Or": "or",
    "Not": "not",
}


def _ordered(expr: Any) -> list[Any]:
    commutative = type(expr).__name__ in ("Add", "Mul", "Max", "Min", "And", "Or")
    if not commutative:
        return list(expr.args)
    constants_first = type(expr).__name__ == "Mul"
    return sorted(expr.args, key=lambda a: (bool(a.is_number) != constants_first, str(a)))


def renamed(expr: Expr, names: Mapping[str, str]) -> Expr:
    """The expression with its symbols renamed."""
    if isinstance(expr, str):
        return names.get(expr, expr)
    return (expr[0], *(renamed(e, names) for e in expr[1:])) if isinstance(expr, tuple) else expr
