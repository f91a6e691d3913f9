"""What `--method` takes: names of inference methods, and what they stand for at the sizes of the demonstration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from bayes_klrl.typing import Algorithm

__all__ = ["DEFAULT_METHODS", "DEFAULT_STEPS", "METHODS", "METHOD_HELP", "algorithm_of", "check_methods"]

# what --method takes, and what the table calls it
METHODS = {
    "prior-is": "prior IS",
    "best-of-n": "best of 16",
    "smc": "SMC",
    "svi": "SVI",
    "svi-is": "SVI, then IS",
    "exact": "exact",
}
DEFAULT_METHODS = ("prior-is", "best-of-n", "smc", "svi", "svi-is")
DEFAULT_STEPS = 120
METHOD_HELP = f"One of {', '.join(METHODS)}"


def algorithm_of(method: str, num_steps: int) -> Algorithm:
    """Return a method at the demo's sizes."""
    import bayes_klrl as bk

    algorithms: dict[str, Algorithm] = {
        "prior-is": bk.ImportanceSampling(2048),
        "best-of-n": bk.BestOfN(16, 64),
        "smc": bk.SMC(512),
        "svi": bk.SVI(num_steps),
        "svi-is": bk.ImportanceSampling(1000, proposal=bk.SVI(num_steps)),
        "exact": bk.Exact(),
    }
    return algorithms[method]


def check_methods(methods: list[str] | None) -> None:
    """Refuse unknown names before anything is loaded."""
    for name in methods or []:
        if name not in METHODS:
            raise typer.BadParameter(
                f"unknown method {name!r}; choose from {', '.join(METHODS)}", param_hint="--method"
            )
