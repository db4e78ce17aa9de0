"""A model of transformers that begins on the meta device: its parameters, their buffers, and what is computed of them.

A parameter gets its memory when it is asked for. What a checkpoint does not hold, such as rotary frequencies, is
computed at the end as transformers itself computes it, and whatever nobody computed is an error that names it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from infinilm.backends.transformers.families import Family, describe
from infinilm_hookspecs import ParameterSpec, PlanError, UnavailableError
from infinilm_hookspecs.dtypes import dtype_name


class LoadedModel:
    """The model of `family` in `dtype`, without memory at first. Raises `UnavailableError` where it cannot be built."""

    def __init__(self, family: Family, dtype: torch.dtype, device: torch.device) -> None:
        self.module = _build(family, dtype)
        self._device = device
        self._ties = _ties(self.module)
        self._specs = _specs(self.module, dtype, self._ties)
        self._placed: set[str] = set()
        self._waiting = {name for name, spec in self._specs.items() if spec.tied_to is None}

    @property
    def parameters(self) -> Mapping[str, ParameterSpec]:
        """Parameters, and the buffers that checkpoints hold, by transformers' names."""
        return self._specs

    def destination(self, name: str) -> Tensor:
        """Return the memory of a parameter that is not tied, allocated when it is first asked for."""
        if name not in self._placed:  # some were never on the meta device, but made by a function that ignores it
            self._placed.add(name)
            spec = self._specs[name]
            self._set(name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device))
        return self._get(name).detach()

    def loaded(self, name: str) -> None:
        """Take note that `name` is full."""
        self._waiting.discard(name)

    def finish(self) -> None:
        """Tie what is tied and compute what is not stored. Raises `PlanError` where a tensor is left without values."""
        if self._waiting:
            names = ", ".join(sorted(self._waiting)[:5])
            raise PlanError(f"{len(self._waiting)} of {len(self._specs)} parameters were not loaded: {names}, ...")
        for name, source in self._ties.items():
            module, leaf = self._owner(name)
            setattr(module, leaf, self._get(source))
        computed = [name for name, buffer in self.module.named_buffers() if buffer.is_meta]
        for name in computed:
            buffer = self._get(name)
            self._set(name, _unset_like(buffer, self._device), is_done=False)
        with torch.device(self._device):
            self.module.initialize_weights()
        _require_values(self.module, computed)
        self.module.eval().requires_grad_(False)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.module.get_submodule(path), leaf

    def _get(self, name: str) -> Tensor:
        module, leaf = self._owner(name)
        found: Tensor = getattr(module, leaf)
        return found

    def _set(self, name: str, tensor: Tensor, *, is_done: bool = True) -> None:
        module, leaf = self._owner(name)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = tensor = nn.Parameter(tensor, requires_grad=False)
        if is_done:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark: do not initialize


def initial_value(model: Any, name: str) -> Tensor:
    """Return what transformers initializes a parameter of a meta model to, for one that need not be stored."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    module = copy.deepcopy(owner).to_empty(device="cpu")
    parents: list[Any] = [part for part in _parents(model, path) if hasattr(part, "_init_weights")]
    with torch.no_grad():
        parents[-1]._init_weights(module)
    value: Tensor = getattr(module, leaf).detach()
    return value


def _parents(model: nn.Module, path: str) -> Iterator[nn.Module]:
    yield model
    module = model
    for part in path.split(".") if path else ():
        module = module.get_submodule(part)
        yield module


def _build(family: Family, dtype: torch.dtype) -> Any:
    import transformers

    config = copy.deepcopy(family.config)
    config.dtype = dtype
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the others are for low precision
    try:
        with ExitStack() as stack:
            for context in family.model_class.get_init_context(dtype, False, False, None):
                stack.enter_context(context)
            module = family.model_class(config)
    except Exception as err:  # whatever the code of a model raises is the reason why it cannot be run
        raise UnavailableError(
            f"transformers {transformers.__version__} cannot build a {family.model_class.__name__} of model_type "
            f"{family.model_type!r}: {describe(err)}"
        ) from err
    return module.eval()


def _ties(module: Any) -> dict[str, str]:
    """Return every tied parameter with the one whose memory it shares."""
    ties: dict[str, str] = dict(module.all_tied_weights_keys)
    held = set(module.state_dict())
    return {name: _root(source, ties) for name, source in ties.items() if name in held}


def _root(name: str, ties: Mapping[str, str]) -> str:
    while name in ties:
        name = ties[name]
    return name


def _specs(module: Any, dtype: torch.dtype, ties: Mapping[str, str]) -> dict[str, ParameterSpec]:
    kept = module._get_dtype_plan(dtype)
    pattern = re.compile("|".join(f"({re.escape(name)})".replace(r"\*", ".*") for name in kept)) if kept else None
    specs: dict[str, ParameterSpec] = {}
    for name, tensor in module.state_dict().items():
        is_kept = pattern is not None and pattern.search(name) is not None
        wanted = torch.float32 if is_kept else tensor.dtype
        specs[name] = ParameterSpec(tuple(tensor.shape), dtype_name(wanted), tied_to=ties.get(name))
    return specs


# ---------------------------------------------------------------- what is computed, not stored


def _unset_like(buffer: Tensor, device: torch.device) -> Tensor:
    """Return memory in which a value that nobody wrote can be told, as far as the dtype has such a value."""
    if buffer.is_floating_point() or buffer.is_complex():
        return torch.full_like(buffer, torch.nan, device=device)
    if buffer.dtype == torch.bool:
        return torch.zeros_like(buffer, device=device)
    return torch.full_like(buffer, torch.iinfo(buffer.dtype).min, device=device)


def _is_unset(buffer: Tensor) -> bool:
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().any())
    if buffer.dtype in (torch.bool, torch.uint8):
        return False
    return bool((buffer == torch.iinfo(buffer.dtype).min).any())


def _require_values(module: nn.Module, computed: list[str]) -> None:
    buffers = dict(module.named_buffers())
    left = [name for name in computed if _is_unset(buffers[name])]
    left += [name for name, tensor in (*module.named_parameters(), *buffers.items()) if tensor.is_meta]
    for path, part in module.named_modules():
        left += [f"{path}.{key}" for key, value in vars(part).items() if isinstance(value, Tensor) and value.is_meta]
    if left:
        raise PlanError(
            f"{type(module).__name__} leaves {len(left)} tensors without values that no checkpoint holds: "
            f"{', '.join(left[:5])}; transformers does not compute them either"
        )
