"""The parameters of modules in memory: the module's own, allocated when the loader first asks for them.

A module is built on torch's meta device, where tensors have shapes and no memory. Its parameters, and the buffers it
stores, are replaced one by one by real ones that keep their address from then on; what it computes itself is computed
after every load, and what would stay without a value is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infinilm.backends.torch.declarations import check_dtype, check_shard, resolve
from infinilm_hookspecs import ParameterSpec, PlanError, PluginError, Shard

COMPUTE_BUFFERS = "init_buffers"
"""The method in which a module computes its buffers that no checkpoint stores, and what follows from its weights."""


def build_module(factory: Callable[[], object], what: str) -> nn.Module:
    """Return the module that `factory` makes, on the meta device: it allocates nothing.

    Raises `PluginError`, naming `what` is built, where that is no module.
    """
    try:
        with torch.device("meta"):
            module = factory()
    except RuntimeError as err:  # NotImplementedError is one
        if "meta" in str(err):
            err.add_note(
                f"{what} is built on torch's meta device, where tensors have no values; compute what needs some in "
                f"{COMPUTE_BUFFERS}(), or under torch.device('cpu')"
            )
        raise
    if not isinstance(module, nn.Module):
        raise PluginError(f"{what} is to be a torch.nn.Module, and is {module!r:.80}")
    return module


@dataclass(frozen=True, slots=True)
class _Kept:
    """A parameter or stored buffer, and every (module, attribute) it stands at: more than one where it is tied."""

    name: str
    spec: ParameterSpec
    is_parameter: bool
    places: tuple[tuple[nn.Module, str], ...]

    def allocate(self, device: torch.device) -> Tensor:
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        return torch.empty(self.spec.shape, dtype=dtype, device=device)

    def put_placeholder(self) -> None:
        self.put(self.allocate(torch.device("meta")))

    def put(self, tensor: Tensor) -> None:
        value = nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor
        for module, attribute in self.places:
            setattr(module, attribute, value)


class ModuleParameters:
    """Parameters and stored buffers of `modules`, which are named by the paths that their names begin with.

    Floating ones that a module made in torch's default dtype are kept in `dtype`; another one, or what the module's
    `dtypes` say, stays. `shards` are declarations beside the modules' own. Raises `PluginError` for a declaration that
    fits nothing and for a buffer that nothing will compute.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        dtype: str,
        device: torch.device,
        shards: Mapping[str, Shard] | None = None,
    ) -> None:
        self._modules = modules
        self._device = device
        found = [(path, *_split(path, module)) for path, module in modules.items()]
        tensors = {name: tensor for _, stored, _ in found for name, tensor in stored.items()}
        places = {name: place for _, _, those in found for name, place in those.items()}
        self.specs = _specs(tensors, dtype, modules, shards or {})
        self._kept = {kept.name: kept for kept in _by_identity(tensors, places, self.specs)}
        self._tensors: dict[str, Tensor] = {}
        self._waiting = set(self._kept)
        for kept in self._kept.values():
            kept.put_placeholder()
        for module in modules.values():
            module.eval()
        _require_initialiser(self._without_value())

    def destination(self, name: str) -> Tensor:
        """Return the memory of the parameter `name`, allocated now where it was not asked for before."""
        if name not in self._tensors:
            kept = self._kept[name]
            self._tensors[name] = kept.allocate(self._device)
            kept.put(self._tensors[name])
        return self._tensors[name]

    def loaded(self, name: str) -> None:
        """Take note that `name` is full."""
        self._waiting.discard(name)

    def require_all(self) -> None:
        """Raise `PlanError` naming parameters that were never loaded."""
        if self._waiting:
            names = ", ".join(sorted(self._waiting)[:5])
            raise PlanError(f"{len(self._waiting)} of {len(self._kept)} parameters were not loaded: {names}, ...")

    def compute_buffers(self) -> None:
        """Have every module compute what is not stored. Raises `PluginError` naming what has no value afterwards."""
        with torch.no_grad(), self._device:
            for module in self._modules.values():
                for inner in module.modules():
                    if hasattr(inner, COMPUTE_BUFFERS):
                        getattr(inner, COMPUTE_BUFFERS)()
        for path, module in self._modules.items():
            for name, tensor, owners in _own_tensors(path, module, ()):
                if not tensor.is_meta:
                    setattr(owners[-1], name.rpartition(".")[2], tensor.to(self._device))
        left = [name for name, _ in self._without_value()]
        if left and self._device.type != "meta":
            raise PluginError(f"{COMPUTE_BUFFERS}() left these without a value: {', '.join(left[:5])}")

    def free(self) -> None:
        """Drop every parameter."""
        for name in self._tensors:
            self._kept[name].put_placeholder()
        self._tensors.clear()

    def _without_value(self) -> list[tuple[str, Sequence[nn.Module]]]:
        """Return the tensors that no checkpoint stores and that have no value, with the modules they stand in."""
        return [
            (name, owners)
            for path, module in self._modules.items()
            for name, tensor, owners in _own_tensors(path, module, ())
            if tensor.is_meta and name not in self.specs
        ]


# ---------------------------------------------------------------- what a module has


def _split(path: str, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, tuple[nn.Module, str]]]:
    """Return the parameters and stored buffers of a module by name, and the (module, attribute) of each."""
    stored: dict[str, Tensor] = {}
    places: dict[str, tuple[nn.Module, str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module is no tensor, and no checkpoint's
        owner, _, attribute = name.rpartition(".")
        full = f"{path}.{name}" if path else name
        stored[full], places[full] = tensor, (module.get_submodule(owner), attribute)
    return stored, places


def _specs(
    tensors: Mapping[str, Tensor], dtype: str, modules: Mapping[str, nn.Module], shards: Mapping[str, Shard]
) -> dict[str, ParameterSpec]:
    """Return what is wanted, in the module's order; a tied parameter is declared as the one it is tied to."""
    owners: dict[int, str] = {}  # by identity, the first name of a tensor
    first = {name: owners.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    cuts = resolve("shards", [*_declared(modules, "shards"), ("", shards)], first)
    pins = resolve("dtypes", _declared(modules, "dtypes"), first)
    specs: dict[str, ParameterSpec] = {}
    for name, tensor in tensors.items():
        shard = cuts.get(first[name])
        if shard is not None:
            check_shard(name, tensor.shape, shard)
        made_in = str(tensor.dtype).removeprefix("torch.")
        kept_in = pins.get(first[name], dtype if tensor.dtype == torch.get_default_dtype() else made_in)
        check_dtype(name, kept_in)
        tied_to = None if first[name] == name else first[name]
        specs[name] = ParameterSpec(tuple(tensor.shape), kept_in, shard, tied_to)
    return specs


def _declared(modules: Mapping[str, nn.Module], attribute: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path, module in modules.items():
        for inner_path, inner in module.named_modules(prefix=path):
            declared = getattr(inner, attribute, None)
            if isinstance(declared, Mapping):
                yield inner_path, declared


def _by_identity(
    tensors: Mapping[str, Tensor], places: Mapping[str, tuple[nn.Module, str]], specs: Mapping[str, ParameterSpec]
) -> list[_Kept]:
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    return [
        _Kept(first, specs[first], isinstance(tensors[first], nn.Parameter), tuple(places[n] for n in (first, *others)))
        for first, *others in names.values()
    ]


def _own_tensors(
    path: str, module: nn.Module, above: Sequence[nn.Module]
) -> Iterator[tuple[str, Tensor, Sequence[nn.Module]]]:
    """Yield buffers and plain attributes that are tensors, with the modules around them, innermost last."""
    owners = (*above, module)
    prefix = f"{path}." if path else ""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    for name, tensor in (dict(module.named_buffers(recurse=False)) | plain).items():
        yield f"{prefix}{name}", tensor, owners
    for name, child in module.named_children():
        yield from _own_tensors(f"{prefix}{name}", child, owners)


def _require_initialiser(without_value: Sequence[tuple[str, Sequence[nn.Module]]]) -> None:
    """Raise `PluginError` naming tensors that no module around them will compute."""
    lost = [name for name, owners in without_value if not any(hasattr(owner, COMPUTE_BUFFERS) for owner in owners)]
    if lost:
        raise PluginError(
            f"{', '.join(lost[:5])} would have no value: modules are built on torch's meta device, and no checkpoint "
            f"stores what is no persistent buffer; compute it in a method {COMPUTE_BUFFERS}() of its module"
        )
