"""Average the sites' updates as they arrive (hop 9): exact, so the order of arrival cannot matter.

Adding floats in another order gives another result. Here every product `delta * num_cases` is rounded
once, by itself, to a fixed grid, and then added as an integer; integer addition is exact and
associative, so the same set of updates gives the same bits in any order, on any machine.

Grid. With B = max_abs * max_cases (no product is larger), the grid is the power of two g for which
2**50 * g <= B < 2**51 * g. A product of a float32 and a count up to 2**29 is exact in float64 and
below 2**51 grid units, so the sum of 2**12 sites fits into 64 bits with a sign.

Resolution. A product moves by at most g/2, the mean therefore by at most g / (2 * a), where a is the
mean number of cases a site. With a plan's default bounds (64 and 1,000,000) g is 2**-25: a mean over
sites of 100 cases is exact to 1.5e-10, of 1,000 cases to 1.5e-11. A float32 weight of 0.05 is itself
only known to 1.9e-9, so the grid is finer than the weights that the mean is added to.

Memory. The sum holds one 64-bit integer per element: twice the bytes of the float32 model. An update
is read where it lies and may be dropped afterwards; the work space is 2 MiB a thread.

Speed. Reading 4 and changing 8 bytes per element moves 20 bytes where a float32 sum moves 12: once
memory is the limit, 1.6 times `torch.add_` is the floor of any 64-bit sum, and a compiled kernel comes
to that floor. NumPy makes six passes over a block in cache and takes about three times `torch.add_`,
less than Flower's average, which holds all updates at once; tests/benchmarks/aggregation.py measures
it. A float32 sum is no alternative: 24 bits leave no room for a grid.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedward_common.errors import PayloadError
from fedward_common.weights import Layout, Weights, check

MAX_SITES = 2**12
_MAX_CASES = 2**29
_BLOCK = 2**18  # elements; smaller blocks stay in a nearer cache, but Python's part per call then shows
# 1.5 * 2**52: adding it to |x| <= 2**51 rounds x to an integer (ties to even) and leaves that integer
# in the low bits, so the bits of the sum less the bits of the constant are the rounded number.
_ROUNDER = 1.5 * 2.0**52
_ROUNDER_BITS = int(np.array(_ROUNDER).view(np.uint64))


@dataclass(frozen=True)
class _Block:
    """A stretch of one tensor, flattened, and where it begins in the sum."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def place(self) -> slice:
        """Where the stretch lies in the sum."""
        return slice(self.offset, self.offset + self.stop - self.start)


class RunningSum:
    """Mean of updates weighted by their numbers of cases, independent of the order of arrival.

    Args:
        layout: names and shapes of the tensors.
        max_abs: no element of an update may exceed this, > 0.
        max_cases: no update may claim more cases than this, 1 to 2**29.
        threads: how many threads add a large update; 0 means two, or one on a single core.
    """

    def __init__(self, layout: Layout, *, max_abs: float, max_cases: int, threads: int = 0) -> None:
        if not (0 < max_abs < math.inf and 1 <= max_cases <= _MAX_CASES):
            raise ValueError(f"max_abs {max_abs} or max_cases {max_cases} out of range")
        self._layout = layout
        self._max_abs = max_abs
        self._max_cases = max_cases
        self._grid = 2.0 ** (math.frexp(max_abs * max_cases)[1] - 51)
        num_elements = sum(spec.size for spec in layout)
        num_threads = threads or (min(2, os.cpu_count() or 1) if num_elements > 4 * _BLOCK else 1)
        self._shares = _split(list(_blocks_of(layout)), num_elements, num_threads)
        # Unsigned, because the rounder's bits are added with every site: sums wrap, modulo 2**64.
        self._sum = np.zeros(num_elements, dtype=np.uint64)
        self._work = [np.empty(_BLOCK) for _ in self._shares]
        self._num_cases = 0
        self._num_sites = 0

    @property
    def num_cases(self) -> int:
        """Cases behind the sum so far."""
        return self._num_cases

    @property
    def num_sites(self) -> int:
        """Updates in the sum so far."""
        return self._num_sites

    @property
    def resolution(self) -> float:
        """Bound on how far rounding has moved any element of the mean; infinite while it is empty."""
        if not self._num_sites:
            return math.inf
        return self._grid / 2 * self._num_sites / self._num_cases

    def add(self, delta: Weights, num_cases: int) -> None:
        """Add one site's update; on an error the sum is as it was before.

        Args:
            delta: change of every tensor of the layout; each element finite and at most `max_abs`.
            num_cases: training cases behind it, 1 to `max_cases`.

        Raises:
            PayloadError: names, shapes, a value or the number of cases are out of bounds.
        """
        check(delta, self._layout)
        if not 1 <= num_cases <= self._max_cases:
            raise PayloadError(
                f"update of {num_cases} cases, 1 to {self._max_cases} allowed",
                remedy="Raise privacy.max_cases in the plan if a site really has so many.",
            )
        if self._num_sites == MAX_SITES:
            raise PayloadError(
                f"{MAX_SITES} updates are in the sum already", remedy="Use fewer sites in a round."
            )
        flat = {name: array.reshape(-1) for name, array in delta.items()}
        done = self._in_threads(lambda index: self._add_share(index, flat, num_cases))
        if sum(done) < sum(map(len, self._shares)):
            self._undo(flat, num_cases, done)
            raise PayloadError(
                f"update holds a value that is not finite or beyond {self._max_abs}",
                remedy="Exclude the site, or raise privacy.max_abs in the plan.",
            )
        self._num_cases += num_cases
        self._num_sites += 1

    def mean(self) -> Weights:
        """Weighted mean of the updates so far, float32, names and shapes of the layout.

        Raises:
            PayloadError: no update has been added.
        """
        if not self._num_sites:
            raise PayloadError("no update to average", remedy="Wait for at least one site.")
        mean = np.empty(self._sum.size, dtype=np.float32)
        self._in_threads(lambda index: self._average_share(index, mean))
        weights: Weights = {}
        start = 0
        for spec in self._layout:
            weights[spec.name] = mean[start : start + spec.size].reshape(spec.shape)
            start += spec.size
        return weights

    def _in_threads(self, task: Callable[[int], int]) -> list[int]:
        """Call `task` for every share at once; NumPy works outside Python's lock."""
        if len(self._shares) == 1:
            return [task(0)]
        with ThreadPoolExecutor(len(self._shares)) as pool:
            return list(pool.map(task, range(len(self._shares))))

    def _add_share(self, index: int, flat: Weights, num_cases: int) -> int:
        """Add the blocks of one share; give how many went in before a value out of bounds."""
        work, factor = self._work[index], num_cases / self._grid
        for done, block in enumerate(self._shares[index]):
            values = flat[block.name][block.start : block.stop]
            if not (values.max() <= self._max_abs and values.min() >= -self._max_abs):  # NaN fails too
                return done
            total = self._sum[block.place]
            np.add(total, _in_grid_units(values, factor, work), out=total)
        return len(self._shares[index])

    def _undo(self, flat: Weights, num_cases: int, done: list[int]) -> None:
        for blocks, work, count in zip(self._shares, self._work, done, strict=True):
            for block in blocks[:count]:
                values = flat[block.name][block.start : block.stop]
                total = self._sum[block.place]
                np.subtract(total, _in_grid_units(values, num_cases / self._grid, work), out=total)

    def _average_share(self, index: int, mean: NDArray[np.float32]) -> int:
        bias = np.uint64(self._num_sites * _ROUNDER_BITS % 2**64)
        factor = self._grid / self._num_cases
        for block in self._shares[index]:
            work = self._work[index][: block.stop - block.start]
            units = np.subtract(self._sum[block.place], bias, out=work.view(np.uint64)).view(np.int64)
            np.multiply(units, factor, out=work)
            mean[block.place] = work
        return len(self._shares[index])


def _in_grid_units(
    values: NDArray[np.float32], factor: float, work: NDArray[np.float64]
) -> NDArray[np.uint64]:
    """Round `values * factor` to integers, each plus the rounder's bits; a view of `work`."""
    product = work[: values.size]
    product[...] = values
    np.multiply(product, factor, out=product)
    np.add(product, _ROUNDER, out=product)
    return product.view(np.uint64)


def _blocks_of(layout: Layout) -> Iterator[_Block]:
    offset = 0
    for spec in layout:
        for start in range(0, spec.size, _BLOCK):
            yield _Block(spec.name, start, min(start + _BLOCK, spec.size), offset + start)
        offset += spec.size


def _split(blocks: list[_Block], num_elements: int, num_shares: int) -> list[list[_Block]]:
    """Cut the blocks, in order, into shares of about the same number of elements."""
    shares: list[list[_Block]] = [[] for _ in range(num_shares)]
    for block in blocks:
        shares[block.offset * num_shares // num_elements].append(block)
    return shares
