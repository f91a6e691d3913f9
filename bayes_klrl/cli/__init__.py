"""The command line `bayes-klrl`.

Read `application` first (the options that commands share, and how errors become messages), then `methods` (the values of
`--method`) and the room `commands`, one file per command. The room `demo` has the posteriors that are used when no file is
given.
"""

from bayes_klrl.cli.application import app as app
from bayes_klrl.cli.commands import (  # noqa: F401  (each adds its command)
    amortise,
    certify,
    compare,
    frontier,
    gallery,
    report,
    sample,
    suite,
    tune,
)


def main() -> None:
    """Run the command line."""
    app()
