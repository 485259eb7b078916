"""Average the sites' updates as they arrive (hop 9): exact, so the order of arrival cannot matter.

Adding floats in another order gives another result. Here every product `delta * num_cases` is rounded
once, by itself, to an integer number of units, and then added as an integer; integer addition is exact
and associative, so the same set of updates gives the same bits in any order, on any machine.

Unit. A site of n cases, 2**e <= n < 2**(e + 1), counts in units of 2**(e - 29). Nothing but its own
update decides that: not who else takes part, not what was expected, not what came first. So a resumed
run, a simulation and a round with a site missing need no agreement about it, and no site can coarsen
another's. The sum has the finest unit seen so far; to go to a finer one is a shift of integers: exact.

Resolution. Two roundings move an element x of an update on its way into the mean:
  * x * n * 2**(29 - e) is rounded to float32, as x was at the site: by at most 2**-24 of x, and not at
    all when n is a power of two;
  * its fraction is cut off, towards zero: x loses less than 2**(e - 29) / n <= 2**-29.
The mean, an average of the sites weighted by n, moves by no more than its worst site, whether sites have
two cases or a million. 2**-29 (1.9e-9) is what rounding to float32 does to a model weight of 0.05.
Finally the mean is rounded to float64 and to float32.

Width. A block of at most 2**18 elements of one tensor has 32 bits an element while a bound on its sum
stays below 2**31 units: the largest integer of every update, summed. For ten sites of equal size that
admits updates up to 0.2 at least. A block that outgrows it gets 64 bits: a BatchNorm variance, or every
block after an update from a site with hundreds of times fewer cases than all sites together, for that
makes the unit fine. In the extreme it gets a second plane of 64 bits for what is carried out of the
first. Width is representation only: the integers are the same, and so is what `mean` makes of them.

Bound. With max_abs <= 2**10 and n < 2**(e + 1) an integer is at most 2**40 of its site's units, and at
most 2**63 of the finest, 2**-29, as n <= 2**24. 4096 of them are at most 2**75: in the second plane,
which counts 2**32 units, 2**43. Nothing overflows, and no update is refused for what came before it.

Memory. The sum takes 4 bytes an element, as the float32 model does, and `mean` turns it into the mean
where it lies. An update is read where it lies and may be dropped afterwards; the work space is 1 MiB a
thread. A block of 64 bits takes three times its 4 bytes, one of two planes five times.

Speed. Memory moves 12 bytes an element, as for `torch.add_`, in three passes over a block in cache:
product, integer, sum. The largest value of each tensor, which decides the width, admission has measured
already. tests/benchmarks/aggregation.py compares.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_common.errors import PayloadError
from fedward_common.weights import Layout, Weights, check

MAX_SITES = 2**12
_MAX_ABS = 2.0**10
_MAX_CASES = 2**24  # every count up to here is a float32
_FRACTION_BITS = 29
_BLOCK = 2**18  # elements; smaller blocks stay in a nearer cache, but Python's part per call then shows
_PLANE_BITS = 32
_LOWER_PLANE = 2**_PLANE_BITS - 1


@dataclass(frozen=True)
class _Grid:
    """How one site's update becomes integers.

    Attributes:
        scale: times an element of the update, it is the integer before its fraction is cut off.
        exponent: the integers count units of 2**(exponent - 29).
    """

    scale: np.float32
    exponent: int

    @classmethod
    def of(cls, num_cases: int) -> _Grid:
        """Grid of a site with so many cases; it may depend on nothing else, or the order would matter."""
        exponent = num_cases.bit_length() - 1
        return cls(np.float32(num_cases * 2.0 ** (_FRACTION_BITS - exponent)), exponent)

    def integer(self, value: float) -> int:
        """The integer that an element becomes."""
        return int(np.float32(value) * self.scale)


class _Block:
    """The sum over a stretch of one tensor, flattened: integers as wide as they need to be.

    Args:
        name: the tensor.
        start: where the stretch begins in the flattened tensor.
        home: where the stretch lies in the sum over the tensor, int32; what it holds before is ignored, and
            `average` leaves the mean there.
    """

    __slots__ = ("_bound", "_empty", "_exponent", "_home", "_low", "_upper", "name", "place")

    def __init__(self, name: str, start: int, home: NDArray[np.int32]) -> None:
        self.name = name
        self.place = slice(start, start + home.size)
        self._home = home
        self._low: NDArray[Any] = home  # int32 or int64
        self._upper: NDArray[np.int64] | None = None  # counts 2**32 units
        self._empty = True  # nothing has been added, `home` is not ours yet
        self._exponent = 0  # the unit is 2**(exponent - 29)
        self._bound = 0  # no element of the sum is larger, in units of 2**-29

    def add(
        self, values: NDArray[np.float32], grid: _Grid, largest: float, work: NDArray[np.float32]
    ) -> None:
        """Add one site's stretch, of which no element exceeds `largest`."""
        self._make_room(grid.integer(largest), grid.exponent)
        self._accumulate(values, grid, work)

    def average(self, num_cases: int, work: NDArray[np.float32]) -> None:
        """Overwrite the stretch's place in the sum with the mean, float32."""
        factor = 2.0 ** (self._exponent - _FRACTION_BITS) / num_cases
        wide = work[: work.size // 2 * 2].view(np.float64)
        for start in range(0, self._low.size, wide.size):
            part = slice(start, min(start + wide.size, self._low.size))
            mean = wide[: part.stop - start]
            mean[...] = self._low[part]
            if self._upper is not None:
                mean += self._upper[part] * 2.0**_PLANE_BITS  # the one rounding: both terms are exact
            np.multiply(mean, factor, out=mean)
            self._home[part].view(np.float32)[...] = mean

    def _make_room(self, largest: int, exponent: int) -> None:
        """Widen the sum and refine its unit as adding an integer of that size and unit needs it."""
        if not self._bound:
            self._exponent = exponent  # nothing but zeros so far: they have any unit
        self._bound += largest << exponent
        refine_by = max(0, self._exponent - exponent)
        self._exponent -= refine_by
        units = self._bound >> self._exponent
        if units >= 2**31 and self._low is self._home:
            self._low = np.zeros(self._home.size, np.int64) if self._empty else self._home.astype(np.int64)
        if units >= 2**63 and self._upper is None:
            self._upper = np.zeros_like(self._low)
            self._carry(self._upper)
        if refine_by:
            np.left_shift(self._low, refine_by, out=self._low)
        if refine_by and self._upper is not None:
            np.left_shift(self._upper, refine_by, out=self._upper)
            self._carry(self._upper)

    def _accumulate(self, values: NDArray[np.float32], grid: _Grid, work: NDArray[np.float32]) -> None:
        products = np.multiply(values, grid.scale, out=work[: values.size])
        finer_by = grid.exponent - self._exponent
        if self._low is self._home:
            integers = self._home if self._empty else products.view(np.int32)
            np.copyto(integers, products, casting="unsafe")  # cuts the fraction off
            if finer_by:
                np.left_shift(integers, finer_by, out=integers)
            if not self._empty:
                np.add(self._home, integers, out=self._home)
        elif self._upper is None:
            self._low += products.astype(np.int64) << finer_by
        else:
            wide = products.astype(np.int64)  # below 2**40; shifted, its upper part may not fit
            self._upper += wide >> (_PLANE_BITS - finer_by)
            self._low += (wide << finer_by) & _LOWER_PLANE
            self._carry(self._upper)
        self._empty = False

    def _carry(self, upper: NDArray[np.int64]) -> None:
        """Leave in the lower plane what is below one unit of the upper one."""
        upper += self._low >> _PLANE_BITS
        self._low &= _LOWER_PLANE


class RunningSum:
    """Mean of updates weighted by their numbers of cases, independent of the order of arrival.

    Args:
        layout: names and shapes of the tensors.
        max_abs: no element of an update may exceed this, > 0, at most 1024.
        max_cases: no update may claim more cases than this, 1 to 2**24.
        threads: how many threads add a large update; 0 means two, or one on a single core.
    """

    def __init__(self, layout: Layout, *, max_abs: float, max_cases: int, threads: int = 0) -> None:
        if not (0 < max_abs <= _MAX_ABS and 1 <= max_cases <= _MAX_CASES):
            raise ValueError(f"max_abs {max_abs} or max_cases {max_cases} out of range")
        self._layout = layout
        self._max_abs = max_abs
        self._max_cases = max_cases
        num_elements = sum(spec.size for spec in layout)
        num_threads = threads or (min(2, os.cpu_count() or 1) if num_elements > 4 * _BLOCK else 1)
        # One allocation, so that the system gives it in large pages: small ones cost as much as two updates.
        self._sum = np.empty(num_elements, dtype=np.int32)
        self._shares = _share_out(layout, self._sum, num_threads)
        size = max(2, min(_BLOCK, max((spec.size for spec in layout), default=0)))
        self._work = [np.empty(size, dtype=np.float32) for _ in self._shares]
        self._num_cases = 0
        self._num_sites = 0
        self._num_units = 0  # of 2**-29, that cutting may have moved an element of the sum

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
        """Bound on how far cutting has moved any element of the mean; infinite while it is empty."""
        if not self._num_sites:
            return math.inf
        return self._num_units * 2.0**-_FRACTION_BITS / self._num_cases

    def add(self, delta: Weights, num_cases: int, largest: Mapping[str, float] | None = None) -> None:
        """Add one site's update; on an error the sum is as it was before.

        Args:
            delta: change of every tensor of the layout; each element finite and at most `max_abs`.
            num_cases: training cases behind it, 1 to `max_cases`.
            largest: what `largest_of(delta)` gave, if it was asked before, as admission does; no element
                may be larger, or the sum is wrong.

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
        bounds = largest_of(delta) if largest is None else largest
        if not all(bounds[spec.name] <= self._max_abs for spec in self._layout):  # NaN fails too
            raise PayloadError(
                f"update holds a value that is not finite or beyond {self._max_abs}",
                remedy="Exclude the site, or raise privacy.max_abs in the plan.",
            )
        flat = {name: array.reshape(-1) for name, array in delta.items()}
        grid = _Grid.of(num_cases)
        self._in_threads(lambda index: self._add_share(index, flat, bounds, grid))
        self._num_cases += num_cases
        self._num_sites += 1
        self._num_units += 1 << grid.exponent

    def mean(self) -> Weights:
        """Weighted mean of the updates so far, float32, names and shapes of the layout.

        The mean takes the place of the sum in memory: nothing can be added or averaged any more.

        Raises:
            PayloadError: no update has been added.
        """
        if not self._num_sites:
            raise PayloadError("no update to average", remedy="Wait for at least one site.")
        self._in_threads(self._average_share)
        mean, self._sum, self._shares = self._sum.view(np.float32), np.empty(0, np.int32), []
        weights: Weights = {}
        start = 0
        for spec in self._layout:
            weights[spec.name] = mean[start : start + spec.size].reshape(spec.shape)
            start += spec.size
        return weights

    def _in_threads(self, task: Callable[[int], None]) -> None:
        """Call `task` for every share at once; NumPy works outside Python's lock."""
        if not self._shares:
            raise RuntimeError("this sum has been turned into its mean already")
        if len(self._shares) == 1:
            task(0)
            return
        with ThreadPoolExecutor(len(self._shares) - 1) as pool:
            others = [pool.submit(task, index) for index in range(1, len(self._shares))]
            task(0)
            for other in others:
                other.result()

    def _add_share(self, index: int, flat: Weights, largest: Mapping[str, float], grid: _Grid) -> None:
        work = self._work[index]
        for block in self._shares[index]:
            block.add(flat[block.name][block.place], grid, largest[block.name], work)

    def _average_share(self, index: int) -> None:
        for block in self._shares[index]:
            block.average(self._num_cases, self._work[index])


def largest_of(delta: Weights) -> dict[str, float]:
    """The largest absolute value in each tensor, 0 for an empty one; NaN when there is one in it."""
    return {name: _largest(array.reshape(-1)) for name, array in delta.items()}


def _largest(values: NDArray[np.float32]) -> float:
    found = 0.0
    for start in range(0, values.size, _BLOCK):  # the second reduction finds the block in the cache
        block = values[start : start + _BLOCK]
        largest = max(float(np.maximum.reduce(block)), -float(np.minimum.reduce(block)))
        if not largest <= found:  # NaN wins, and stays: nothing is larger
            found = largest
        if math.isnan(found):
            break
    return found


def _share_out(layout: Layout, total: NDArray[np.int32], num_shares: int) -> list[list[_Block]]:
    """Cut the sum into blocks and these, in order, into shares of about the same number of elements."""
    shares: list[list[_Block]] = [[] for _ in range(num_shares)]
    offset = 0
    for spec in layout:
        for start in range(0, spec.size, _BLOCK):
            home = total[offset + start : offset + min(start + _BLOCK, spec.size)]
            shares[(offset + start) * num_shares // total.size].append(_Block(spec.name, start, home))
        offset += spec.size
    return shares
