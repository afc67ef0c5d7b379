"""Products of parameters in the normal run: the cases that have every pair of values; `-m matrix` runs the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def matrix_unless(normal: bool) -> Any:
    """The marks of a case."""
    return () if normal else pytest.mark.matrix


def every_pair(indirect: Sequence[str] = (), **values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by half of a product: each value of a parameter meets each value of any other.

    Every parameter has two values at least.
    """
    cases = []
    for place in itertools.product(*(range(len(several)) for several in values.values())):
        case = [several[i] for several, i in zip(values.values(), place, strict=True)]
        cases.append(pytest.param(*case, marks=matrix_unless(sum(place) % 2 == 0)))
    return pytest.mark.parametrize(list(values), cases, indirect=list(indirect))
