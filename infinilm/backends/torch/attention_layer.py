"""`Attention`: the layer through which anybody's module uses the paged cache.

A module's layers are bound to the one backend that runs it. They find the running step there, and nowhere else: two
models never meet, in one thread or in several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from infinilm.backends.torch.attention import Plans, attend
from infinilm.backends.torch.cache import PagedCache
from infinilm_hookspecs import AttentionConfig, ConfigError, PluginError


class Attention(nn.Module):
    """Causal grouped-query attention over the paged cache of the engine. Has no parameters.

    `num_kv_heads` is `num_heads` where it is not given. `scale` multiplies the scores; `None` means
    `head_dim ** -0.5`. With a `sliding_window` of w a token sees itself and the w - 1 tokens before it. `softcap` c
    makes scaled scores s `c * tanh(s / c)`. Layers may differ in all of these.

    Make one for every place where the model attends: each has keys and values of its own, and is called exactly once in
    a forward pass. Raises `ConfigError` for sizes that do not go together.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, head_dim, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ConfigError(
                f"{num_heads} query heads of {head_dim} cannot share {num_kv_heads} key-value heads evenly"
            )
        if sliding_window is not None and sliding_window < 1:
            raise ConfigError(f"a sliding window of {sliding_window} hides every token from itself; None is no window")
        if softcap is not None and softcap <= 0:
            raise ConfigError(f"scores cannot be capped at {softcap!r}; None is no cap")
        self.config = AttentionConfig(
            num_heads, num_kv_heads, head_dim, None, scale=scale, sliding_window=sliding_window, softcap=softcap
        )
        self._bound: BoundLayers | None = None
        self._place = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return every token's attention over its own context, (num_tokens, num_heads, head_dim) as `query` is.

        `key` and `value` are (num_tokens, num_kv_heads, head_dim), positions already in them. All are of the dtype the
        model runs in. Raises `PluginError` for other shapes and dtypes.
        """
        if self._bound is None:
            raise PluginError("an Attention layer was called outside of a step; only a backend's forward runs it")
        step = self._bound.enter(self._place)
        self._check(step.cache, query, key, value)
        plan = step.plans[self.config.sliding_window]
        return attend(self.config, plan, step.cache, self._place, query, key, value)

    def extra_repr(self) -> str:
        """Return what `print(module)` shows of this layer."""
        config = self.config
        return f"num_heads={config.num_heads}, head_dim={config.head_dim}, num_kv_heads={config.num_kv_heads}"

    def _check(self, cache: PagedCache, query: Tensor, key: Tensor, value: Tensor) -> None:
        assert self._bound is not None
        config = self.config
        shared = len(query), config.num_kv_heads, config.head_dim
        wanted = {"query": (len(query), config.num_heads, config.head_dim), "key": shared, "value": shared}
        for (what, shape), tensor in zip(wanted.items(), (query, key, value), strict=True):
            if tensor.shape != shape or tensor.dtype != cache.dtype:
                raise PluginError(
                    f"the attention {self._bound.names[self._place]!r} was given a {what} {list(tensor.shape)} "
                    f"{tensor.dtype}, and {list(shape)} {cache.dtype} is wanted: (tokens, heads, head_dim)"
                )


@dataclass(slots=True)
class _Step:
    """What the layers of one backend look up while it runs a step. `called` are the places of those that have."""

    cache: PagedCache
    plans: Plans
    called: set[int] = field(default_factory=set)


class BoundLayers:
    """The `Attention` layers of some modules, bound to the backend that runs these.

    `modules` are named by the paths their parameters have. The first layer has the place `first` in the cache. Raises
    `PluginError` for a layer that another backend runs.
    """

    def __init__(self, modules: Mapping[str, nn.Module], first: int = 0) -> None:
        self._layers: list[Attention] = []
        self.names: dict[int, str] = {}
        self._step: _Step | None = None
        for path, module in modules.items():
            for name, layer in module.named_modules(prefix=path):
                if isinstance(layer, Attention) and layer not in self._layers:
                    self._bind(layer, name, first + len(self._layers))
        self.configs = tuple(layer.config for layer in self._layers)
        self.windows = frozenset(config.sliding_window for config in self.configs)

    def _bind(self, layer: Attention, name: str, place: int) -> None:
        if layer._bound is not None:
            raise PluginError(f"the attention {name!r} belongs to a module that another backend runs; build it anew")
        layer._bound, layer._place = self, place
        self._layers.append(layer)
        self.names[place] = name

    def release(self) -> None:
        """Let another backend have the layers."""
        for layer in self._layers:
            if layer._bound is self:
                layer._bound = None

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Release the layers where the body, which makes the rest of their backend, raises."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    @contextmanager
    def running(self, cache: PagedCache, plans: Plans) -> Iterator[None]:
        """Let the layers attend within the body. Raises `PluginError` naming those that it did not call.

        What such a layer keeps would have a hole, and every later token of the sequences would be wrong.
        """
        self._step = step = _Step(cache, plans)
        try:
            yield
        finally:
            self._step = None
        left_out = [name for place, name in self.names.items() if place not in step.called]
        if left_out:
            raise PluginError(f"a forward pass must call every attention, and this one left out {', '.join(left_out)}")

    def enter(self, place: int) -> _Step:
        """Return the running step, for the layer at `place`. Raises `PluginError` for its second call in one step."""
        name = self.names[place]
        if self._step is None:
            raise PluginError(f"the attention {name!r} was called outside of a step; only a backend's forward runs it")
        if place in self._step.called:
            raise PluginError(
                f"the attention {name!r} was called twice in one forward pass, and would overwrite its own keys and "
                "values; make one Attention for every place where the model attends"
            )
        self._step.called.add(place)
        return self._step
