"""Makes the modules of `examples/over_optimisation` importable, as they are when that folder is run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "over_optimisation"))
