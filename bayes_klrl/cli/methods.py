"""The values of `--method`: a short name, or a call of any algorithm of the package with literal arguments.

A call such as `SMC(512)` or `ImportanceSampling(1000, proposal=SVI(60))` is read as a syntax tree and never evaluated as code:
only public classes of the package are called, and only with literals or with such calls. So a new algorithm can be used from
the command line as soon as it has a public name.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from bayes_klrl.typing import Algorithm

__all__ = ["DEFAULT_METHODS", "DEFAULT_STEPS", "METHOD_HELP", "SHORT_NAMES", "algorithms_of"]


class ShortName(NamedTuple):
    """The row's name in the table, and the call that a short name stands for; `{steps}` is the value of `--steps`."""

    row: str
    call: str


SHORT_NAMES = {
    "prior-is": ShortName("prior IS", "ImportanceSampling(2048)"),
    "best-of-n": ShortName("best of 16", "BestOfN(16, 64)"),
    "smc": ShortName("SMC", "SMC(512)"),
    "svi": ShortName("SVI", "SVI({steps})"),
    "svi-is": ShortName("SVI, then IS", "ImportanceSampling(1000, proposal=SVI({steps}))"),
    "exact": ShortName("exact", "Exact()"),
}
DEFAULT_METHODS = ("prior-is", "best-of-n", "smc", "svi", "svi-is")
DEFAULT_STEPS = 120
_NAMES = ", ".join(SHORT_NAMES)
METHOD_HELP = (
    f"An inference method: {_NAMES}, or a call of any algorithm of the package with literal arguments, such as "
    '"AnnealedSMC(256)"'
)


def algorithms_of(methods: Sequence[str], num_steps: int) -> dict[str, Algorithm]:
    """Return the algorithms that values of `--method` stand for, by the name of their row in the table.

    Raises
    ------
    typer.BadParameter
        If a value is neither a short name nor a call of an algorithm with arguments that it accepts.

    Examples
    --------
    >>> algorithms_of(["exact", "ImportanceSampling(100, proposal=SVI(60))"], num_steps=120)["exact"]
    Exact(num_draws=None, max_sequences=2000000)
    """
    found: dict[str, Algorithm] = {}
    for method in methods:
        text = method.strip()
        row, call = SHORT_NAMES.get(text, (text.replace("/", " "), text))  # "/" separates groups in draws.nc
        found[row] = _algorithm(call.replace("{steps}", str(num_steps)) if text in SHORT_NAMES else call)
    return found


def _algorithm(text: str) -> Algorithm:
    """Return the algorithm that a call makes."""
    import bayes_klrl as bk
    from bayes_klrl.typing import is_algorithm

    node = _parsed(text)
    if not isinstance(node, ast.Call):
        name = text if text in bk.__all__ else "SMC"
        raise _refusal(text, f"it is neither a short name ({_NAMES}) nor a call. Write {name}(...) with its arguments")
    kind = _public_class(node, text)
    if not is_algorithm(kind):
        raise _refusal(
            text,
            f"{kind.__name__} is not an algorithm, which has run(posterior, seed=...). Call one that is, such as SMC",
        )
    algorithm: Algorithm = _made(node, text)
    return algorithm


def _parsed(text: str) -> ast.expr:
    """Return the syntax tree of one expression."""
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _refusal(
            text, f"it is neither a short name ({_NAMES}) nor a call in Python's syntax. Write SMC(512), for example"
        ) from None


def _made(node: ast.Call, text: str) -> Any:
    """Return what a call makes, its arguments first."""
    kind = _public_class(node, text)
    positional = [_value(argument, text) for argument in node.args]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in named:
            given = "**" if keyword.arg is None else f"{keyword.arg}= twice"
            raise _refusal(text, f"it has {given}. Give every argument once, by position or by name")
        named[keyword.arg] = _value(keyword.value, text)
    try:
        return kind(*positional, **named)
    except Exception as error:  # whatever a class makes of arguments that are not for it
        raise _refusal(text, f"{kind.__name__} does not accept these arguments: {error}") from None


def _public_class(node: ast.Call, text: str) -> type:
    """Return the class of the package that a call names."""
    import bayes_klrl as bk

    name = ast.unparse(node.func)
    if name not in bk.__all__:
        near = difflib.get_close_matches(name, bk.__all__, n=1)
        cure = (
            f"Did you mean {near[0]}?" if near else "The algorithms are listed in bayes_klrl.__all__, for example SMC"
        )
        raise _refusal(text, f"bayes_klrl has no public name {name!r}. {cure}")
    try:
        kind = getattr(bk, name)
    except ImportError as error:  # an extra that is not installed; says how to install it
        raise _refusal(text, str(error)) from None
    if not isinstance(kind, type):
        raise _refusal(text, f"{name} is a function. Only classes can be called here, such as SMC")
    return kind


def _value(node: ast.expr, text: str) -> Any:
    """Return an argument: what a nested call makes, or a literal."""
    if isinstance(node, ast.Call):
        return _made(node, text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise _refusal(
            text,
            f"the argument {ast.unparse(node)} is neither a literal nor a call of a public class. Define an algorithm that "
            "needs more in the file, in `algorithms`",
        ) from None


def _refusal(text: str, reason: str) -> typer.BadParameter:
    """Return the error for a value of `--method`."""
    ending = "" if reason.endswith((".", "?")) else "."
    return typer.BadParameter(f"cannot use {text!r}: {reason}{ending}", param_hint="--method")
