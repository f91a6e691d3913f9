"""A process that has imported what the package builds on, but not the package, and forks to run pytest on some tests.

Most of a mutant's seconds would else go into importing torch, Pyro and JAX again. A request is a line of JSON on standard
input, its answer a line on standard output.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

__all__ = ["main"]

_LIBRARIES = (
    "numpy",
    "scipy.stats",
    "pytest",
    "torch",
    "pyro",
    "transformers.models.gpt2.modeling_gpt2",  # with most of what other modules of transformers import
    "jax",
    "optax",
    "numpyro.infer",
    "arviz",
    "hypothesis",
)


def _in_a_child(request: dict[str, Any]) -> None:
    """Run the tests; never returns."""
    import pytest

    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.dont_write_bytecode = not request["keep_bytecode"]
        code = int(pytest.main(request["arguments"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(process: int, seconds: float) -> int | None:
    """How a child ended; None: it was killed, being too slow."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def main() -> None:
    """Answer requests until standard input ends."""
    for library in _LIBRARIES:
        if importlib.util.find_spec(library.partition(".")[0]) is not None:
            importlib.import_module(library)
    assert not any(name.partition(".")[0] == "bayes_klrl" for name in sys.modules)
    warnings.simplefilter("ignore")  # JAX and Python warn of forks; nothing runs beside this thread
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            _in_a_child(request)
        code = _exit_code(process, request["seconds"])
        log = Path(request["log"])
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        print(json.dumps({"code": code, "said": said[-6000:]}), flush=True)


if __name__ == "__main__":
    main()
