"""`Weight`: a tensor that has not been read, which speaks torch.

The algebra is `StridedTensor`'s. Here are torch's other names for it, its operators, and the door for torch's
functions; what the algebra does not express becomes a deferred step, computed at load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from infinilm_hookspecs.dtypes import ITEM_SIZES
from infinilm_hookspecs.errors import WeightError
from infinilm_hookspecs.strided import StridedTensor, infer_size

if TYPE_CHECKING:
    import torch


class Weight(StridedTensor):
    """A tensor that has not been read. Methods are torch's, return new weights, and compute shapes at once.

    Made by the core for every stored tensor; a rule returns what it made of it. torch's functions take weights too; see
    `infinilm_hookspecs.torch_functions`.
    """

    __slots__ = ()

    # ------------------------------------------------------------ sizes

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[self._dimension(dim)]

    def numel(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements in this dtype."""
        return prod(self.shape) * ITEM_SIZES[self.dtype_name]

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"len() of {self!r}, which has no dimensions")
        return self.shape[0]

    # ------------------------------------------------------------ torch's other names for the algebra

    def narrow(self, dim: int, start: int, length: int) -> Weight:
        """Return rows [start, start + length) of `dim`."""
        dim = self._dimension(dim)
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise WeightError(f"{self!r}: rows {start} to {start + length} of dimension {dim}")
        return self._slice(dim, slice(start, start + length))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Weight, ...]:
        """Return `chunks` slices along `dim`, the last one smaller where it does not divide."""
        if chunks < 1:
            raise WeightError(f"{self!r}: {chunks} chunks")
        total = self.shape[self._dimension(dim)]
        return self.split(-(-total // chunks) if total else [0] * chunks, dim)

    def unbind(self, dim: int = 0) -> tuple[Weight, ...]:
        """Return every row of `dim` as a weight with one dimension less."""
        dim = self._dimension(dim)
        return tuple(self[(slice(None),) * dim + (row,)] for row in range(self.shape[dim]))

    def t(self) -> Weight:
        """Return the transpose of a matrix; a vector is its own."""
        if self.ndim > 2:
            raise WeightError(f"{self!r}: t() of more than two dimensions; use transpose")
        return self.transpose(0, 1) if self.ndim == 2 else self

    @property
    def T(self) -> Weight:  # noqa: N802  # torch's name
        """The transpose of a matrix."""
        return self.t()

    view = StridedTensor.reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Weight:
        """Return the tensor with dimensions [start_dim, end_dim] made one."""
        a, b = self._dimension(start_dim), self._dimension(end_dim)
        return self.reshape(*self.shape[:a], prod(self.shape[a : b + 1]), *self.shape[b + 1 :])

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Weight:
        """Return the tensor with one dimension made several."""
        dim = self._dimension(dim)
        sizes = infer_size(self.shape[dim], sizes, repr(self))
        return self.reshape(*self.shape[:dim], *sizes, *self.shape[dim + 1 :])

    def squeeze(self, dim: int | None = None) -> Weight:
        """Return the tensor without its dimensions of size 1, or without `dim` if that is one."""
        at = range(self.ndim) if dim is None else [self._dimension(dim)]
        return self.reshape([size for d, size in enumerate(self.shape) if size != 1 or d not in at])

    def unsqueeze(self, dim: int) -> Weight:
        """Return the tensor with a dimension of size 1 put in at `dim`."""
        if not -self.ndim - 1 <= dim <= self.ndim:
            raise WeightError(f"{self!r}: no dimension can be put in at {dim}")
        at = dim if dim >= 0 else self.ndim + 1 + dim
        return self.reshape([*self.shape[:at], 1, *self.shape[at:]])

    def contiguous(self) -> Weight:
        """Return the weight itself: layouts are carried out when it is read."""
        return self

    def clone(self) -> Weight:
        """Return the weight itself: weights never change."""
        return self

    detach = cpu = clone
    swapaxes = swapdims = StridedTensor.transpose

    # ------------------------------------------------------------ operators

    def __add__(self, value: Any) -> Weight:
        return self.plus(value) if _is_number(value) else self._call("add", value)

    def __sub__(self, value: Any) -> Weight:
        return self.plus(-value) if _is_number(value) else self._call("sub", value)

    def __mul__(self, value: Any) -> Weight:
        return self.times(value) if _is_number(value) else self._call("mul", value)

    def __radd__(self, value: Any) -> Weight:
        return self.__add__(value)

    def __rmul__(self, value: Any) -> Weight:
        return self.__mul__(value)

    def __truediv__(self, value: Any) -> Weight:
        return self._call("div", value)

    def __neg__(self) -> Weight:
        return self._call("neg")

    def __lt__(self, value: Any) -> Weight:
        return self._call("lt", value)

    def __le__(self, value: Any) -> Weight:
        return self._call("le", value)

    def __gt__(self, value: Any) -> Weight:
        return self._call("gt", value)

    def __ge__(self, value: Any) -> Weight:
        return self._call("ge", value)

    def __matmul__(self, value: Any) -> Weight:
        return self._call("matmul", value)

    # ------------------------------------------------------------ torch's functions

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from infinilm_hookspecs.torch_functions import call

        return call(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Return one of torch's other methods of tensors, as a deferred step."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        from infinilm_hookspecs.torch_functions import method_of

        return method_of(self, name)

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.unbind(0))

    def __setitem__(self, index: object, value: object) -> None:
        raise WeightError(f"{self!r} never changes; make a new weight with slices and torch.cat")

    def __bool__(self) -> bool:
        raise self._needs_values("bool()")

    def __float__(self) -> float:
        raise self._needs_values("float()")

    def __int__(self) -> int:
        raise self._needs_values("int()")

    def _needs_values(self, what: str) -> WeightError:
        from infinilm_hookspecs.torch_functions import needs_values

        return needs_values(self, what)

    def _call(self, name: str, *arguments: Any) -> Weight:
        import torch

        found: Weight = self.__torch_function__(getattr(torch, name), (), (self, *arguments))
        return found


class SymbolicTensor(Weight):
    """A weight whose dtype is torch's, for remappers that are written for tensors."""

    __slots__ = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as a `torch.dtype`."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype_name)
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
