"""Mutants of the package, each of which must be killed: proof that the tests bite.

    python -m tests.mutants              the whole table: mutant | killed by | seconds
    python -m tests.mutants EOS tau      those whose name holds one of the words

A mutant is the package with one mistake in it that people make (`tests.mutants.table`). It lives in a copy of the package and
its tests in a temporary folder, and is killed if every test named beside it fails there by an assertion of its own: neither an
import that broke nor a test that is gone counts. The unmutated copy must pass the same tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutants.later import LATER
from tests.mutants.table import MUTANTS, Mutant
from tests.mutants.verdicts import FILE, FOLDER

__all__ = ["Copy", "Outcome", "killers_of", "mutated_text", "run_mutant"]

ROOT = Path(__file__).parents[2]
_WEIGHTS = "shipped"  # linked, not copied: no mutant changes it
_OPTIONS = (
    *("-q", "-p", "tests.mutants.verdicts", "-p", "no:cacheprovider"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # plugins that the server has imported already
)
_TIMEOUT = 300  # seconds; a mutant that hangs is not killed by an assertion


def mutated_text(mutant: Mutant, root: Path = ROOT) -> str:
    """The mutant's file with the mistake in it; the text that is replaced must be there exactly once."""
    original = (root / "bayes_klrl" / mutant.file).read_text(encoding="utf-8")
    count = original.count(mutant.text)
    if count != 1:
        raise ValueError(f"Mutant {mutant.name!r}: its text occurs {count} times in {mutant.file}, not once.")
    if mutant.replacement == mutant.text:
        raise ValueError(f"Mutant {mutant.name!r} changes nothing.")
    return original.replace(mutant.text, mutant.replacement)


def killers_of(mutants: Sequence[Mutant]) -> list[str]:
    """All tests that are named beside some mutants, each once."""
    return list(dict.fromkeys(killer for mutant in mutants for killer in mutant.killers))


class Copy:
    """The package and its tests in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        ignore = shutil.ignore_patterns("*.pyc.*", _WEIGHTS)  # not the byte code that others are writing just now
        for name in ("bayes_klrl", "tests"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignore)
        shutil.copy2(ROOT / "pyproject.toml", self.folder)
        weights = Path("bayes_klrl", "models", _WEIGHTS)
        (self.folder / weights).symlink_to(ROOT / weights, target_is_directory=True)
        self._server: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the process that runs the tests."""
        if self._server is not None:
            self._server.communicate()  # its input ends, and so does it
            self._server = None

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the server answers; it is started by the first request."""
        if self._server is None:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
            environment |= {FOLDER: str(self.folder), FILE: str(self.folder / "verdicts.json")}
            environment |= {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.mutants.server"],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """The copy with the mistake in it, for a while."""
        path = self.folder / "bayes_klrl" / mutant.file
        text, changed = path.read_text(encoding="utf-8"), mutated_text(mutant, self.folder)
        times = path.stat().st_atime, path.stat().st_mtime
        try:
            path.write_text(changed, encoding="utf-8")
            os.utime(
                path, (times[0], times[1] + 10)
            )  # so that the byte code of the unmutated file is not taken for its own
            yield
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, times)

    def verdicts(self, tests: Sequence[str], *, keep_bytecode: bool = False) -> dict[str, str]:
        """How each test ends here: "passed", "failed" by an assertion, or what else happened.

        With `keep_bytecode` later runs start faster; only for the unmutated copy.
        """
        file = self.folder / "verdicts.json"
        file.unlink(missing_ok=True)
        answer = self._asked(
            {
                "arguments": [*_OPTIONS, *tests],
                "keep_bytecode": keep_bytecode,
                "log": str(self.folder / "pytest.log"),
                "seconds": _TIMEOUT,
            }
        )
        if answer["code"] not in (0, 1) or not file.exists():
            raise RuntimeError(f"pytest ended with {answer['code']}:\n{answer['said']}")
        found: dict[str, str] = json.loads(file.read_text())
        return {test: found.get(test, "did not run") for test in tests}


@dataclass(frozen=True)
class Outcome:
    """How a mutant's tests ended, and how long that took."""

    verdicts: dict[str, str]
    seconds: float

    @property
    def survivors(self) -> dict[str, str]:
        """The tests that should have failed by an assertion and did not, with what they did."""
        return {test: verdict for test, verdict in self.verdicts.items() if verdict != "failed"}


def run_mutant(mutant: Mutant, copy: Copy) -> Outcome:
    """Run the tests that must kill a mutant, on it."""
    start = time.perf_counter()
    with copy.mutated(mutant):
        verdicts = copy.verdicts(mutant.killers)
    return Outcome(verdicts, time.perf_counter() - start)


def main(words: Sequence[str]) -> int:
    """Print the table, and return 1 if a mutant survived or the unmutated copy failed."""
    chosen = [mutant for mutant in (*MUTANTS, *LATER) if not words or any(word in mutant.name for word in words)]
    width = max(len(mutant.name) for mutant in chosen) if chosen else 0
    start, ok = time.perf_counter(), bool(chosen)
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        unmutated = copy.verdicts(killers_of(chosen), keep_bytecode=True) if chosen else {}
        for test, verdict in unmutated.items():
            if verdict != "passed":
                print(f"WITHOUT A MUTATION, {test}: {verdict}")
                ok = False
        for mutant in chosen:
            outcome = run_mutant(mutant, copy)
            for i, (test, verdict) in enumerate(outcome.verdicts.items()):
                name, seconds = (mutant.name, f"{outcome.seconds:5.1f}") if i == 0 else ("", " " * 5)
                said = "" if verdict == "failed" else f"  SURVIVED: {verdict}"
                print(f"{name:{width}} | {seconds} | {test.removeprefix('tests/')}{said}", flush=True)
            ok = ok and not outcome.survivors
        copy.close()
    print(f"{len(chosen)} mutants in {time.perf_counter() - start:.0f} s: {'all killed' if ok else 'NOT ALL KILLED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
