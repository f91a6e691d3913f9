"""A local ray of two workers: the same bits, and deaths and absences that are named. `make ray` installs ray and runs this."""

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.runners.runner import Task, outcomes_of
from tests.runners.posteriors import differing, numbered_posterior
from tests.runners.test_blocks import ROWS
from tests.runners.test_processes import Deadly

ray: Any = pytest.importorskip("ray", reason="`make ray` tests this")

POSTERIOR = numbered_posterior()


@pytest.fixture(scope="module")
def runner() -> Iterator[bk.RayRunner]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield bk.RayRunner()
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")  # of ray itself
class TestRay:
    def test_every_algorithm_gives_the_same_bits(self, runner: bk.RayRunner) -> None:
        assert runner.num_workers == 2
        rows = {name: each for name, each in ROWS.items() if "number" not in name} | {
            "SVI": bk.SVI(2, 8, num_draws=300)
        }
        here, there = (bk.compare(POSTERIOR, rows, seed=1, repeats=2, runner=each) for each in (None, runner))
        assert not there.failures
        for name in rows:
            for one, other in zip(here.draws[name], there.draws[name], strict=True):
                assert not differing(one, other), name
        assert there.fits["SVI"].posterior is POSTERIOR
        assert there["SMC" if "SMC" in rows else "smc"].tokens.flags.writeable

    def test_certificates_and_islands_give_the_same_bits(self, runner: bk.RayRunner) -> None:
        options: dict[str, Any] = {"seed": 0, "num_draws": 300, "sampling_only": True, "num_runs": 8}
        here, there = (bk.certify(POSTERIOR, POSTERIOR.prior, runner=each, **options) for each in (None, runner))
        assert np.array_equal(here.log_evidence_bounds, there.log_evidence_bounds)
        smc = bk.SMC(64, num_islands=5)
        assert not differing(smc.run(POSTERIOR, seed=0), smc.run(POSTERIOR, seed=0, runner=runner))

    def test_a_worker_that_dies_twice_is_named(self, runner: bk.RayRunner) -> None:
        result = bk.compare(POSTERIOR, {"fine": bk.SMC(20), "always": Deadly()}, seed=0, runner=runner)
        assert set(result.draws) == {"fine"}
        assert "died twice at the task 'always'" in result.failures["always"]

    def test_a_package_that_workers_lack_is_named(self, runner: bk.RayRunner) -> None:
        (outcome,) = outcomes_of(runner, [Task("needs", lacking_task, (Lacking(),))])
        assert isinstance(outcome.error, bk.RunnerError)
        assert "cannot import 'no_such_package'" in str(outcome.error)

    def test_a_cluster_that_is_not_there_is_named_within_seconds(self, runner: bk.RayRunner) -> None:
        ray.shutdown()
        for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "auto"):
            start = time.monotonic()
            with pytest.raises(bk.RunnerError, match=r"There is no ray cluster at .*`ray start --head`"):
                bk.RayRunner(address)
            assert time.monotonic() - start < 20


class Lacking:
    """What cannot be loaded without a package."""

    def __reduce__(self) -> Any:
        return load_lacking, (os.getpid(),)


def load_lacking(number: int) -> Lacking:
    if os.getpid() != number:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
    return Lacking()


def lacking_task(value: Lacking, *, progress: bool) -> None:
    """Nothing: it is not reached."""
