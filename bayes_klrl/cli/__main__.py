"""`python -m bayes_klrl.cli` is `bayes-klrl`."""

from bayes_klrl.cli import main

main()
