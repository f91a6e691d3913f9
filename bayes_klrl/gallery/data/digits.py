"""Scikit-learn's handwritten digits, 1,797 images of 8 x 8 pixels, as prompts of 64 characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bayes_klrl.errors import needs
from bayes_klrl.typing import IntArray

__all__ = ["DIGITS", "LEVELS", "Images", "parts_of_digits"]

DIGITS = tuple("0123456789")
LEVELS = "0123456789ABCDEFG"
"""How a prompt writes the 17 grey levels of a pixel, white first."""


@dataclass(frozen=True, eq=False)
class Images:
    """Some of the digits.

    Parameters
    ----------
    numbers
        Their numbers in the data set, shape (P,).
    pixels
        Grey levels from 0, white, to 16, shape (P, 64).
    labels
        The digits that they show, (P,).
    """

    numbers: IntArray
    pixels: IntArray
    labels: IntArray

    @property
    def prompts(self) -> list[str]:
        """Each image as a text of 64 characters."""
        return ["".join(LEVELS[level] for level in row) for row in self.pixels]


def parts_of_digits(sizes: Mapping[str, int], rest: str, *, seed: int) -> dict[str, Images]:
    """Return parts of the images, drawn at random, which have no image in common.

    Parameters
    ----------
    sizes
        The number of images of each part, by its name.
    rest
        The name of the part that has all other images.
    seed
        Seed of the draw.

    Raises
    ------
    MissingPackageError
        If scikit-learn is not installed.
    """
    with needs("The data of the digits", "gallery", "sklearn"):
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen: Sequence[IntArray] = np.split(order, np.cumsum(list(sizes.values())))
    names = (*sizes, rest)
    return {
        name: Images(rows, pixels[rows].astype(np.int64), labels[rows])
        for name, rows in zip(names, chosen, strict=True)
    }
