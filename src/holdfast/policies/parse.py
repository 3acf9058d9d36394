"""Rules from text, such as `last(3) | best("val_loss", mode="min")`, without running code.

The text is parsed as a Python expression and only what a rule needs is understood: the names of the rule
constructors, literals, keyword arguments, `|`, `&`, `~`, and the methods `.after()`, `.until()` and
`.at_most()`. `repr` of a rule is such a text.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable

from holdfast.core.errors import PolicyError
from holdfast.policies.best import best
from holdfast.policies.grids import at, every, log_spaced
from holdfast.policies.moments import auto, on, when_idle
from holdfast.policies.retention import demote, last, limit, tagged, thin, within
from holdfast.policies.rules import Rule

__all__ = ["parse_rule"]

MAX_CHARS = 2000

_RULES: dict[str, Callable[..., Rule]] = {
    f.__name__: f
    for f in (at, auto, best, demote, every, last, limit, log_spaced, on, tagged, thin, when_idle, within)
}
_METHODS: dict[str, Callable[..., Rule]] = {
    "after": Rule.after,
    "until": Rule.until,
    "at_most": Rule.at_most,
}


def parse_rule(text: str) -> Rule:
    """Return the rule that `text` describes. Nothing in it is executed.

    Raises:
        PolicyError: it is not a rule; the message names the part that is not understood.
    """
    if len(text) > MAX_CHARS:
        raise PolicyError(f"the rule has {len(text)} characters; at most {MAX_CHARS} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\\d" in a string is none of our business
            tree = ast.parse(text.strip(), mode="eval")
        return _rule(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        if isinstance(e, PolicyError):
            raise
        why = e.msg if isinstance(e, SyntaxError) else "it is nested too deeply or holds a null byte"
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise PolicyError(
            f"rule {shown!r} cannot be read ({why}); write it as in last(3) | every(steps=1000)"
        ) from None


def _rule(node: ast.expr) -> Rule:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _rule(node.left) | _rule(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _rule(node.left) & _rule(node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_rule(node.operand)
    if isinstance(node, ast.Call):
        return _call(node)
    if isinstance(node, ast.Name) and node.id in _RULES:
        raise PolicyError(
            f"{node.id} needs its arguments in parentheses, as in {_EXAMPLES.get(node.id, node.id + '(...)')}"
        )
    raise PolicyError(f"{_show(node)} is not a rule; rules are {_names()}, joined with |, & and ~")


def _call(node: ast.Call) -> Rule:
    if isinstance(node.func, ast.Name):
        return _made(node, _constructor(node.func.id))
    if isinstance(node.func, ast.Attribute):
        if node.func.attr not in _METHODS:
            known = ", ".join(f".{name}()" for name in _METHODS)
            raise PolicyError(f"a rule has no method .{node.func.attr}(); it has {known}")
        return _made(node, _METHODS[node.func.attr], _rule(node.func.value))
    raise PolicyError(f"{_show(node)} is not a rule; rules are {_names()}, joined with |, & and ~")


def _constructor(name: str) -> Callable[..., Rule]:
    if name == "where":
        raise PolicyError("where(...) takes a Python function, which text cannot hold; use it in a program")
    if name not in _RULES:
        raise PolicyError(f"{name}() is not a rule; rules are {_names()}")
    return _RULES[name]


def _made(node: ast.Call, make: Callable[..., Rule], *first: Rule) -> Rule:
    positional = [_argument(a) for a in node.args]
    named: dict[str, object] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise PolicyError(f"{_show(node)}: ** is not understood in a rule")
        if keyword.arg in named:
            raise PolicyError(f"{_show(node)}: {keyword.arg}= is given twice")
        named[keyword.arg] = _argument(keyword.value)
    try:
        return make(*first, *positional, **named)
    except (TypeError, ArithmeticError) as e:  # a wrong parameter name, or a number too large for a float
        raise PolicyError(f"{_show(node)}: {e}") from None


def _argument(node: ast.expr) -> object:
    """Return the value of an argument: a number, text, None, a list of them, or a rule."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
        return node.value
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
    ):
        value = node.operand.value
        if isinstance(value, (int, float)):
            return -value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_argument(e) for e in node.elts]
    if isinstance(node, (ast.Call, ast.BinOp)) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert)
    ):
        return _rule(node)
    raise PolicyError(
        f"{_show(node)} is not understood as an argument; expected a number, text in quotes, a list or a rule"
    )


_EXAMPLES = {
    "last": "last(3)",
    "every": "every(steps=1000)",
    "tagged": "tagged()",
    "best": 'best("val_loss", mode="min")',
}


def _names() -> str:
    return ", ".join(name for name in _RULES if name not in ("auto", "on", "when_idle"))


def _show(node: ast.expr) -> str:
    text = ast.unparse(node)
    return repr(text if len(text) <= 80 else text[:77] + "...")
