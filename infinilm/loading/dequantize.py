"""Quantized checkpoints: the stored tensors of a group become one weight, dequantized where it is read.

First the formats, one pure function of values each. Then what headers say of them: the shape a group makes, and which
rows of every tensor a block of it needs, so that a piece of a weight reads whole blocks and no more. Knows no files;
torch is imported only where there are values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import lcm
from typing import TYPE_CHECKING, Final, NamedTuple

from infinilm.loading.stages import Walk
from infinilm_hookspecs import Quantization, Weight, WeightError
from infinilm_hookspecs.strided import Deferred, Piece, Region, Source
from infinilm_hookspecs.types import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

# ---------------------------------------------------------------- formats

_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_AWQ_COLUMNS: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight columns lies: stored are 0, 2, 4, 6, 1, 3, 5, 7
_ONES: Final = 0x11111111


def fp8_block(weight: Tensor, scale: Tensor, *, block: tuple[int, int]) -> Tensor:
    """Return `weight` (..., rows, columns) times the scale of each of its blocks, in bfloat16.

    `scale` is (..., blocks of rows, blocks of columns); the last ones may be cut short. As DeepSeek's `weight_dequant`:
    https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py
    """
    import torch

    values = weight.to(torch.float32)
    scales = scale.to(torch.float32).repeat_interleave(block[1], -1)[..., : values.shape[-1]]
    for index in range(scales.shape[-2]):
        values[..., index * block[0] : (index + 1) * block[0], :] *= scales[..., index : index + 1, :]
    return values.to(torch.bfloat16)


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values of `blocks` (..., blocks, 16), two e2m1 a byte, as (..., 32 * blocks) in bfloat16.

    The low half of a byte comes first. `scales` (..., blocks) are e8m0: exponents of two, 127 more than they are, and
    255 is not a number. OCP microscaling formats 1.0, section 5.
    """
    import torch

    table = torch.tensor([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)], dtype=torch.bfloat16)
    values = table[blocks.to(torch.int32)].flatten(-2)  # (..., blocks, 32)
    values *= scales.view(torch.float8_e8m0fnu).to(torch.bfloat16).unsqueeze(-1)  # exact, but for over- and underflow
    return values.flatten(-2)


def gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, group_size: int, is_v1: bool
) -> Tensor:
    """Return (inputs, outputs) of `qweight` (inputs / 8, outputs), in the dtype of `scales` (groups, outputs).

    Eight rows are packed in an int32, the first in the lowest bits, and in `qzeros` (groups, outputs / 8) eight
    columns. `g_idx` says the group of every row; without it `group_size` of them in a row make one. The first version
    stores zeros less one, by subtracting one from each of eight in a word: a zero borrows from its neighbour. The way
    back is to add, to the whole word: https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/utils/model.py
    """
    import torch

    num_outputs = qweight.shape[1]
    weight = _nibbles(qweight).reshape(-1, num_outputs, 8).transpose(1, 2).reshape(-1, num_outputs)
    zeros = _nibbles(qzeros + _ONES if is_v1 else qzeros)[:, :num_outputs]
    group = torch.arange(weight.shape[0]) // group_size if g_idx is None else g_idx
    if group.numel() and not 0 <= int(group.min()) <= int(group.max()) < len(scales):
        raise WeightError(f"g_idx names groups {int(group.min())} to {int(group.max())}, and there are {len(scales)}")
    return weight.sub_(zeros[group]).to(scales.dtype).mul_(scales[group])


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    """Return (inputs, outputs) of `qweight` (inputs, outputs / 8), in the dtype of `scales` (groups, outputs).

    Eight columns are packed in an int32, in `qzeros` (groups, outputs / 8) too: from the lowest bits on the columns 0,
    2, 4, 6, 1, 3, 5, 7. https://github.com/casper-hansen/AutoAWQ/blob/main/awq/utils/packing_utils.py
    """
    import torch

    weight, zeros = (
        _nibbles(packed).reshape(len(packed), -1, 8)[..., _AWQ_COLUMNS].flatten(-2) for packed in (qweight, qzeros)
    )
    group = torch.arange(weight.shape[0]) // group_size
    return weight.sub_(zeros[group]).to(scales.dtype).mul_(scales[group])


def _nibbles(packed: Tensor) -> Tensor:
    """Return the eight halves of bytes of every int32 of (rows, columns), lowest first, as (rows, 8 * columns)."""
    import torch

    halves = packed.contiguous().view(torch.uint8).view(torch.int8)  # little-endian
    return torch.stack((halves & 15, (halves >> 4) & 15), -1).flatten(-2)


# ---------------------------------------------------------------- what headers say of them


class _Along(NamedTuple):
    """A dimension of a stored tensor that follows dimension `dim` of the result, a row for every `rows` of it."""

    dim: int
    rows: int = 1


class _Member(NamedTuple):
    """A stored tensor of a group. A dimension that follows none of the result is a size, and always read whole."""

    weight: Weight
    dtypes: tuple[str, ...]
    axes: tuple[_Along | int, ...]


class _Packed(NamedTuple):
    """What a group makes: `function` of the members' rows of some blocks gives those blocks.

    `steps` is the shape of a block that can be computed alone.
    """

    shape: tuple[int, ...]
    dtype: str
    steps: tuple[int, ...]
    members: tuple[_Member, ...]
    function: Callable[..., Tensor]
    is_transposed: bool = False  # whether the model has the last two dimensions the other way round

    def parts(self, region: Region) -> tuple[Region, tuple[Region, ...]]:
        """Return the region of whole blocks around `region`, and the region of every member that makes it."""
        whole = tuple(
            slice(s.start // step * step, min(-(-s.stop // step) * step, size))
            for s, step, size in zip(region, self.steps, self.shape, strict=True)
        )
        return whole, tuple(tuple(_rows_of(axis, whole) for axis in member.axes) for member in self.members)


def _rows_of(axis: _Along | int, region: Region) -> slice:
    if isinstance(axis, int):
        return slice(0, axis)
    return slice(region[axis.dim].start // axis.rows, -(-region[axis.dim].stop // axis.rows))


_FLOATS: Final = ("float16", "bfloat16", "float32")


def _plan_fp8(group: Mapping[str, Weight], block_shape: Sequence[int]) -> _Packed:
    weight, scale = group["weight"], group["scale"]
    if weight.ndim < 2:
        raise WeightError(f"{weight!r} has no rows and columns to divide into blocks")
    rows, columns = (
        max(size, 1) if block < 0 else block for block, size in zip(block_shape, weight.shape[-2:], strict=True)
    )
    if max(block_shape) < 0 and scale.numel() == 1:
        scale = scale.reshape((1,) * weight.ndim)
    outer = tuple(_Along(dim) for dim in range(weight.ndim - 2))
    last = weight.ndim - 1
    members = (
        _Member(weight, ("float8_e4m3fn", "float8_e5m2"), tuple(_Along(dim) for dim in range(weight.ndim))),
        _Member(scale, (*_FLOATS, "float8_e8m0fnu"), (*outer, _Along(last - 1, rows), _Along(last, columns))),
    )
    steps = (*(1 for _ in outer), rows, columns)
    return _Packed(weight.shape, "bfloat16", steps, members, partial(fp8_block, block=(rows, columns)))


def _plan_mxfp4(group: Mapping[str, Weight], block_shape: Sequence[int]) -> _Packed:
    blocks = group["weight"]
    if blocks.ndim != 4:
        raise WeightError(f"{blocks!r} is wanted as (experts, rows, blocks, bytes of a block)")
    experts, rows, num_blocks, _ = blocks.shape
    axes = (_Along(0), _Along(1), _Along(2, 32))
    members = (
        _Member(blocks, ("uint8",), (*axes, 16)),
        _Member(group["scale"], ("uint8", "float8_e8m0fnu"), axes),
    )
    return _Packed((experts, rows, 32 * num_blocks), "bfloat16", (1, 1, 32), members, mxfp4, is_transposed=True)


def _plan_gptq(group: Mapping[str, Weight], block_shape: Sequence[int], *, is_v1: bool) -> _Packed:
    qweight, scales = _matrix(group["weight"]), group["scale"]
    num_inputs, num_outputs = 8 * qweight.shape[0], qweight.shape[1]
    group_size = _group_size(block_shape, num_inputs)
    more: tuple[_Member, ...] = ()
    if "group" in group:  # a row may be of any group: all of them are read, and only rows and columns are cut
        groups: _Along | int = -(-num_inputs // group_size)
        step, more = 8, (_Member(group["group"], ("int32", "int64"), (_Along(0),)),)
    else:
        groups = _Along(0, group_size)
        step = lcm(8, group_size)
    members = (
        _Member(qweight, ("int32",), (_Along(0, 8), _Along(1))),
        _Member(group["zero"], ("int32",), (groups, _Along(1, 8))),
        _Member(scales, _FLOATS, (groups, _Along(1))),
        *more,
    )
    function = partial(gptq, group_size=group_size, is_v1=is_v1)
    return _Packed((num_inputs, num_outputs), scales.dtype_name, (step, 8), members, function, is_transposed=True)


def _plan_awq(group: Mapping[str, Weight], block_shape: Sequence[int]) -> _Packed:
    qweight, scales = _matrix(group["weight"]), group["scale"]
    num_inputs, num_outputs = qweight.shape[0], 8 * qweight.shape[1]
    group_size = _group_size(block_shape, num_inputs)
    members = (
        _Member(qweight, ("int32",), (_Along(0), _Along(1, 8))),
        _Member(group["zero"], ("int32",), (_Along(0, group_size), _Along(1, 8))),
        _Member(scales, _FLOATS, (_Along(0, group_size), _Along(1))),
    )
    function = partial(awq, group_size=group_size)
    steps = (group_size, 8)
    return _Packed((num_inputs, num_outputs), scales.dtype_name, steps, members, function, is_transposed=True)


def _matrix(weight: Weight) -> Weight:
    if weight.ndim != 2:
        raise WeightError(f"{weight!r} is wanted as a matrix")
    return weight


def _group_size(block_shape: Sequence[int], num_inputs: int) -> int:
    return max(num_inputs, 1) if block_shape[-1] < 0 else block_shape[-1]


class _Scheme(NamedTuple):
    roles: tuple[str, ...]  # that a group must have
    plan: Callable[[Mapping[str, Weight], Sequence[int]], _Packed]


_SCHEMES: Final[Mapping[str, _Scheme]] = {
    "fp8_block": _Scheme(("weight", "scale"), _plan_fp8),
    "mxfp4": _Scheme(("weight", "scale"), _plan_mxfp4),
    "gptq": _Scheme(("weight", "zero", "scale"), partial(_plan_gptq, is_v1=True)),
    "gptq_v2": _Scheme(("weight", "zero", "scale"), partial(_plan_gptq, is_v1=False)),
    "awq": _Scheme(("weight", "zero", "scale"), _plan_awq),
}


# ---------------------------------------------------------------- weights


def start_walk(tensors: Mapping[str, StoredTensor], quantization: Quantization | None) -> Walk:
    """Return the weights that stages begin with: the stored tensors, those of a group as one under its logical name.

    A group that does not fit together is among the errors of the walk.
    """
    if quantization is None:
        return Walk({name: Weight.stored(name, stored.shape, stored.dtype) for name, stored in tensors.items()})
    walk = Walk({})
    groups = quantization.groups
    group_of = {stored: logical for logical, group in groups.items() for stored in group.values()}
    for name, stored in tensors.items():
        logical = group_of.get(name)
        if logical is None:
            walk.weights[name] = Weight.stored(name, stored.shape, stored.dtype)
        elif name == next(stored for stored in groups[logical].values() if stored in tensors):
            try:
                group = _stored_group(logical, quantization, tensors)
                weight = _dequantized(logical, quantization, group)
                if logical in tensors and logical not in group_of:
                    raise WeightError(f"{logical} is stored both as it is and quantized")
                walk.weights[logical] = weight
                walk.packed[id(weight.pieces)] = weight.pieces, group
            except WeightError as err:
                walk.errors.append(f"{logical}: {err}")
                walk.reported.update(groups[logical].values())
    return walk


def unpack(walk: Walk, parameters: Iterable[str]) -> None:
    """Take the weights apart again whose parts are asked for as they are stored, as `X:scale` and the like of an `X`.

    A weight that a rule has changed, other than its name, is not what its parts make: an error of the walk.
    """
    for name in dict.fromkeys(asked.partition(":")[0] for asked in parameters if ":" in asked):
        weight = walk.weights.get(name)
        if weight is None:
            continue  # as every weight that is missing
        if id(weight.pieces) not in walk.packed:
            walk.errors.append(
                f"{name} is asked for as it is packed, and {weight.origin()} is not, or a weight rule changed it; "
                "run it on another backend"
            )
            continue
        del walk.weights[name]
        for role, part in walk.packed[id(weight.pieces)][1].items():
            walk.weights[f"{name}:{role}"] = part.rename(f"{name}:{role}")


def _stored_group(
    logical: str, quantization: Quantization, tensors: Mapping[str, StoredTensor]
) -> Mapping[str, Weight]:
    """Return what is stored of a group, by role."""
    return {
        role: Weight.stored(name, tensors[name].shape, tensors[name].dtype)
        for role, name in quantization.groups[logical].items()
        if name in tensors
    }


def _dequantized(logical: str, quantization: Quantization, group: Mapping[str, Weight]) -> Weight:
    """Return the weight a group makes. Raises `WeightError` where something is missing or does not fit."""
    scheme = _SCHEMES.get(quantization.scheme)
    if scheme is None:
        raise WeightError(
            f"nothing dequantizes weights quantized as {quantization.scheme!r}; known: {', '.join(_SCHEMES)}"
        )
    missing = [role for role in scheme.roles if role not in group]
    if missing:
        beside = ", ".join(weight.name for weight in group.values())
        raise WeightError(
            f"quantized as {quantization.scheme!r}, and beside {beside} there is no {' and no '.join(missing)}"
        )
    packed = scheme.plan(group, quantization.block_shape)
    for member in packed.members:
        _check_member(member, packed.shape)
    deferred = Deferred(
        tuple(member.weight for member in packed.members),
        packed.function,
        None,
        f"{quantization.scheme} dequantization",
        loss=f"dequantized from {quantization.scheme}",
        parts=packed.parts,
    )
    weight = Weight(
        logical, packed.shape, packed.dtype, (Piece(Source(logical, packed.shape, packed.dtype, deferred)),)
    )
    return weight.transpose(-1, -2) if packed.is_transposed else weight


def _check_member(member: _Member, shape: tuple[int, ...]) -> None:
    wanted = tuple(axis if isinstance(axis, int) else -(-shape[axis.dim] // axis.rows) for axis in member.axes)
    if member.weight.shape != wanted or member.weight.dtype_name not in member.dtypes:
        raise WeightError(
            f"{member.weight.name} is {list(member.weight.shape)} {member.weight.dtype_name}, and "
            f"{list(wanted)} {' or '.join(member.dtypes)} would fit"
        )
