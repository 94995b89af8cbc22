"""The packed tensor that stands in a model where its dense parameter stood: how it is made, what it serves.

Importing the room fills the table of functions that `KbitTensor` serves, so it is not lazy.
"""

from kbitc.tensor import functions as _functions  # noqa: F401
from kbitc.tensor import layers as _layers  # noqa: F401
from kbitc.tensor import reads as _reads  # noqa: F401
from kbitc.tensor.kbit_tensor import KbitTensor

__all__ = ["KbitTensor"]
