"""The command line `bayes-klrl`, one file per command.

Read `application` first (the options that commands share, and how errors become messages), then `methods` (the values of
`--method`) and any command: `compare`, `amortise`, `sample`, `tune`, `certify`, `frontier`, `suite`, `report`. The room `demo`
has the posteriors that are used when no file is given.
"""

from bayes_klrl.cli import amortise, certify, compare, frontier, report, sample, suite, tune  # noqa: F401  (each adds its command)
from bayes_klrl.cli.application import app as app


def main() -> None:
    """Run the command line."""
    app()
