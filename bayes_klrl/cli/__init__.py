"""The command line `bayes-klrl`, one file per command.

Read `application` first (the options that commands share, and how errors become messages), then `methods` (the values of
`--method`) and any command: `compare`, `sample`, `tune`, `certify`, `frontier`, `suite`. `demo_posterior` is the posterior
that is used when no file is given.
"""

from bayes_klrl.cli import certify, compare, frontier, sample, suite, tune  # noqa: F401  (each adds its command to `app`)
from bayes_klrl.cli.application import app as app


def main() -> None:
    """Run the command line."""
    app()
