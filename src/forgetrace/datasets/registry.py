"""The dataset sources by name."""

from collections.abc import Callable, Iterator

from forgetrace.datasets import digits
from forgetrace.datasets.contract import Example

SOURCES: dict[str, Callable[[int], Iterator[Example]]] = {"digits": digits.examples}
