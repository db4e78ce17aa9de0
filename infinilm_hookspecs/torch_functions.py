"""torch's functions on `Weight`s: `torch.cat([a, b])` and its kind, through `__torch_function__`.

What the algebra expresses stays symbolic. Any other function becomes one deferred step over whole tensors: its result's
shape and dtype come from torch's meta device now, its values at load. A function that needs values now is an error that
says what to do instead. torch is imported only here, and only once it has been used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from infinilm_hookspecs.dtypes import dtype_name
from infinilm_hookspecs.errors import WeightError
from infinilm_hookspecs.strided import Deferred, Piece, Source, join
from infinilm_hookspecs.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

Handler = Callable[..., Any]


def call(function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Return `function(*arguments, **options)`, weights among the arguments; see the module.

    Raises `WeightError` where the function needs values, or the tensors do not fit it.
    """
    handler = _handlers().get(function)
    if handler is not None:
        try:
            found = handler(*arguments, **options)
        except TypeError:  # options the symbolic form does not have, such as `out=`
            found = NotImplemented
        if found is not NotImplemented:
            return found
    return defer(function, arguments, options)


def defer(function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Return the result of a function as weights that are computed at load."""
    import torch

    name = getattr(function, "__name__", repr(function))
    inputs: list[Weight] = []

    def to_meta(value: Any) -> Any:
        if isinstance(value, Weight):
            inputs.append(value)
            return torch.empty(value.shape, dtype=getattr(torch, value.dtype_name), device="meta")
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return _map_containers(to_meta, value)

    meta_arguments, meta_options = to_meta(list(arguments)), to_meta(dict(options))
    try:
        shape_of = function(*meta_arguments, **meta_options)
    except RuntimeError as err:  # NotImplementedError is one: no kernel for the meta device
        raise WeightError(f"{name} of {_names(inputs)} cannot be planned: {err}. {_WAY_OUT}") from err

    def run(*values: Tensor) -> Any:
        given = iter(values)

        def to_value(value: Any) -> Any:
            return next(given) if isinstance(value, Weight) else _map_containers(to_value, value)

        return function(*to_value(list(arguments)), **to_value(dict(options)))

    return _as_weights(shape_of, run, tuple(inputs), name)


_WAY_OUT = "A rule runs on headers: wrap what needs values in weight.apply(function, shape=..., dtype=...)"


def needs_values(weight: Weight, what: str) -> WeightError:
    """Return the error for code that asks a weight for its values while the load is planned."""
    return WeightError(f"{weight!r}: {what} needs the tensor's values, and none is read yet. {_WAY_OUT}")


def method_of(weight: Weight, name: str) -> Any:
    """Return torch's method or attribute `name` of a tensor like `weight`. Raises `AttributeError` if it has none."""
    import torch

    found = getattr(torch.Tensor, name, None)
    if name.endswith("_"):
        raise WeightError(f"{weight!r} never changes; use {name.rstrip('_')} for {name}")
    if callable(found):
        return lambda *arguments, **options: call(found, (weight, *arguments), options)
    if found is None:
        raise AttributeError(f"neither a Weight nor a torch.Tensor has an attribute {name!r}")
    return (
        weight if name == "data" else getattr(torch.empty(weight.shape, dtype=getattr(torch, weight.dtype_name)), name)
    )


def constant(name: str, shape: Sequence[int], dtype: str, value: float) -> Weight:
    """Return a weight that is `value` everywhere and comes from no stored tensor."""

    def fill() -> Tensor:
        import torch

        return torch.full(tuple(shape), value, dtype=getattr(torch, dtype))

    source = Source(name, tuple(shape), dtype, Deferred((), fill, None, f"full of {value}", constant=value))
    return Weight(name, tuple(shape), dtype, (Piece(source),))


def as_constant(name: str, value: object) -> Weight:
    """Return a real tensor that a rule made, such as zeros for a bias that is not stored, as a weight.

    Raises `WeightError` for anything but a tensor.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise WeightError(f"it returned {value!r:.80} as {name!r}; a tensor is wanted")
    tensor = value.detach().cpu()
    source = Source(name, tuple(tensor.shape), dtype_name(tensor.dtype), Deferred((), lambda: tensor, None, "a tensor"))
    return Weight(name, source.shape, source.dtype, (Piece(source),))


def _as_weights(
    shape_of: Any, run: Callable[..., Any], inputs: tuple[Weight, ...], label: str, path: tuple[int, ...] = ()
) -> Any:
    """Return a weight for every tensor in a result from the meta device, each computing its own part of it."""
    import torch

    if isinstance(shape_of, torch.Tensor):

        def pick(*values: Tensor) -> Tensor:
            result = run(*values)
            for index in path:
                result = result[index]
            picked: Tensor = result
            return picked

        first = inputs[0]
        for weight in inputs:
            weight.require_whole(label)
        dtype = dtype_name(shape_of.dtype)
        source = Source(first.name, tuple(shape_of.shape), dtype, Deferred(inputs, pick, None, label))
        return Weight(first.name, source.shape, dtype, (Piece(source),), first.trail).like(first)
    if isinstance(shape_of, tuple | list) and any(isinstance(part, torch.Tensor) for part in shape_of):
        return tuple(_as_weights(part, run, inputs, label, (*path, index)) for index, part in enumerate(shape_of))
    return shape_of  # what the meta device can tell, such as a stride, needs no values


def _map_containers(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(function(item) for item in value)
    return value


def _names(weights: Sequence[Weight]) -> str:
    return ", ".join(repr(weight) for weight in weights)


# ---------------------------------------------------------------- what stays symbolic


def _cat(tensors: Sequence[Weight], dim: int = 0) -> Any:
    """Concatenate by parts of one target. Real tensors among them are left to a deferred step."""
    if not all(isinstance(tensor, Weight) for tensor in tensors):
        return NotImplemented
    first = tensors[0]
    axis = dim % first.ndim
    total = sum(tensor.shape[axis] for tensor in tensors)
    parts, start = [], 0
    for tensor in tensors:
        if tensor.ndim != first.ndim or any(
            a != b for d, (a, b) in enumerate(zip(tensor.shape, first.shape, strict=True)) if d != axis
        ):
            raise WeightError(f"cat of {_names(list(tensors))} along dimension {dim}: the other sizes differ")
        parts.append(tensor.part(axis, start, total).rename(first.name))
        start += tensor.shape[axis]
    return join(parts).like(first)


def _stack(tensors: Sequence[Weight], dim: int = 0) -> Any:
    if not all(isinstance(tensor, Weight) for tensor in tensors):
        return NotImplemented
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim if dim >= 0 else tensors[0].ndim + 1 + dim)


def _like(value: float) -> Handler:
    def make(weight: Weight, *, dtype: Any = None, device: Any = None) -> Weight:
        return constant(weight.name, weight.shape, dtype_name(dtype or weight.dtype_name), value).like(weight)

    return make


def _full_like(weight: Weight, fill_value: float, *, dtype: Any = None, device: Any = None) -> Weight:
    return constant(weight.name, weight.shape, dtype_name(dtype or weight.dtype_name), fill_value).like(weight)


def _pointwise(operator: str) -> Handler:
    """Return a handler for `a + b` and its kind, where one side is a number or constant everywhere."""

    def run(a: Any, b: Any, *, alpha: float = 1) -> Any:
        if alpha != 1:
            return NotImplemented
        if not isinstance(a, Weight) or constant_value(a) is not None:
            if operator == "sub":
                return NotImplemented
            a, b = b, a
        if isinstance(b, Weight):
            same = b.shape == a.shape and b.dtype_name == a.dtype_name
            b = constant_value(b) if same else None
        if not isinstance(a, Weight) or isinstance(b, bool) or not isinstance(b, int | float):
            return NotImplemented
        return {"add": a.plus, "sub": lambda value: a.plus(-value), "mul": a.times}[operator](b)

    return run


def constant_value(weight: Weight) -> float | None:
    """Return the number that `weight` is everywhere, or `None` where it is not known to be."""
    if len(weight.pieces) != 1 or weight.pieces[0].operations or weight.pieces[0].place is not None:
        return None
    deferred = weight.pieces[0].source.deferred
    return None if deferred is None else deferred.constant


def _method(name: str) -> Handler:
    def run(weight: Weight, *arguments: Any, **options: Any) -> Any:
        if not isinstance(weight, Weight):
            return NotImplemented
        return getattr(weight, name)(*arguments, **options)

    return run


@cache
def _handlers() -> Mapping[Callable[..., Any], Handler]:
    import torch

    table: dict[Callable[..., Any], Handler] = {
        torch.cat: _cat,
        torch.concat: _cat,
        torch.concatenate: _cat,
        torch.stack: _stack,
        torch.ones_like: _like(1.0),
        torch.zeros_like: _like(0.0),
        torch.full_like: _full_like,
    }
    for name in ("split", "chunk", "unbind", "transpose", "permute", "t", "reshape", "flatten", "squeeze", "unsqueeze",
                 "narrow", "clone", "swapaxes", "swapdims"):  # fmt: skip
        table[getattr(torch, name)] = _method(name)
    for name in ("add", "sub", "mul"):
        table[getattr(torch, name)] = table[getattr(torch.Tensor, name)] = _pointwise(name)
    table[torch.Tensor.__radd__] = _pointwise("add")
    table[torch.Tensor.__rmul__] = _pointwise("mul")
    return table
