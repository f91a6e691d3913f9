"""What every test finds: one thread, no network, no display. Importable without torch (`make arviz1` has none)."""

import os
import sys
from pathlib import Path

# Before torch, transformers or matplotlib can be imported; subprocesses inherit it.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}

# What JAX compiles is kept from run to run: its second run takes a third of the time. `make clean` forgets it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import importlib.util
from collections.abc import Iterator

import pytest

from tests.helpers.backends import QUICK_AND_SLOW, quick_compilation

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("bayes_klrl", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("bayes_klrl")


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Sums depend on the number of threads, and a test may have changed it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(params=QUICK_AND_SLOW)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """On which backend the prior of a test is; see `tests.helpers.backends.on`."""
    if request.param != "jax":
        yield request.param
        return
    with quick_compilation():
        yield request.param


@pytest.fixture(scope="module")
def quick_jax() -> Iterator[None]:
    """JAX compiles with few optimisations, and forgets what it compiled when the module is done: programs take memory."""
    import jax

    with quick_compilation():
        yield
    jax.clear_caches()


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
