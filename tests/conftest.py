"""What every test finds: one thread, no network, no display. Importable without torch (`make arviz1` has none)."""

import gc
import importlib.metadata
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before torch, transformers, JAX or matplotlib can be imported; subprocesses inherit it.
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

# Compiling tiny models takes long, running them does not. These options make it five times as fast. XLA aborts at
# an option that it does not know, so they are given to the version that constraints.txt pins, and to no other.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if importlib.util.find_spec("jaxlib") and importlib.metadata.version("jaxlib").startswith("0.10.")
    else "",
)

import pytest

from tests.helpers.backends import QUICK_AND_SLOW

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("bayes_klrl", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("bayes_klrl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that the last files, which end a run of two workers, are short ones."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    size = Counter(item.path for item in items)
    items.sort(
        key=lambda item: (not slow[item.path], -size[item.path], str(item.path))
    )  # a stable sort keeps each file's order


def pytest_collection_finish() -> None:
    """Leave what was collected, half a million objects that live until the end, out of every search for garbage.

    The searches took a twelfth of the tests' time. They are now rarer, too: few tests leave large cycles behind.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Sums depend on the number of threads, and a test may have changed it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(params=QUICK_AND_SLOW)
def backend(request: pytest.FixtureRequest) -> str:
    """On which backend the prior of a test is; see `tests.helpers.backends.on`."""
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """JAX forgets what a module compiled: programs take memory."""
    yield
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.clear_caches()


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws do not depend on their blocks, but many equal prompts would make many blocks of few draws each."""
    monkeypatch.setattr("bayes_klrl.models.decoding.ROWS_PER_BLOCK", 2**16)


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
