"""The worth of an uncertain reward: `python examples/over_optimisation` (about 20 seconds; needs the extra jax).

A gold reward is known, a proxy is learned from 30 preferences by NUTS, and its posteriors are enumerated along alpha: with the
mean reward (plug-in), averaged over rewards (cut), averaged in favour of rewards that are easy to please (joint), and with the
mean reward minus its standard deviation (conservative). The problem is P13, over several data sets.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from study import GoldStudy, gold_study


def main(seeds: Sequence[int] = range(10), file: str | None = None, num_pairs: int = 30) -> GoldStudy:
    study = gold_study(num_pairs, seeds=seeds)
    print(study)
    for target in ("cut", "conservative"):
        gain, se = study.gain(target, "plug-in", kl=1.0)
        print(f"{target} against plug-in at a KL of 1 nat: {gain:+.2f} ± {se:.2f} of gold reward")
    if file is not None:
        print("picture:", study.plot(file))
    return study


if __name__ == "__main__":
    main(file=sys.argv[1] if len(sys.argv) > 1 else None)
