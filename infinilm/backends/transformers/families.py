"""Which model class of transformers a config asks for: its own, or with leave that of the code beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infinilm.backends.transformers.support import unknown_quantization
from infinilm_hookspecs import BackendRequest, Config, DecoderConfig, UnavailableError

_AUTO_CONFIG = "AutoConfig"
_AUTO_MODEL = "AutoModelForCausalLM"


@dataclass(frozen=True, slots=True)
class Family:
    """A config of the lineage as transformers reads it, and the class of its model."""

    stated: Config
    config: Any  # transformers.PreTrainedConfig
    model_class: Any  # type[transformers.PreTrainedModel]

    @property
    def model_type(self) -> str:
        """The `model_type` that was stated."""
        return str(self.stated["model_type"])


def find_family(request: BackendRequest) -> Family:
    """Return the last raw config of the lineage that is a causal language model of transformers.

    Raises `UnavailableError` where there is none, or the config asks for something that transformers does not have.
    """
    raw = [config for config in request.lineage if not isinstance(config, DecoderConfig)]
    for stated in reversed(raw):
        # The code beside the weights is for the config as it was stored, not for what plugins made of it.
        family = (_remote_family(stated, request) if stated is raw[0] else None) or _family(stated)
        if family is not None:
            _check(family, request)
            return family
    model_types = ", ".join(repr(config.get("model_type")) for config in raw)
    raise UnavailableError(f"none of transformers' causal language models has the model_type {model_types}")


def missing_sizes(config: Config) -> dict[str, int]:
    """Return `vocab_size` and `max_position_embeddings` as transformers has them, where `config` does not say."""
    wanted = [key for key in ("vocab_size", "max_position_embeddings") if not isinstance(config.get(key), int)]
    if not wanted or "auto_map" in config:
        return {}
    try:
        family = _family(config)
    except UnavailableError:
        return {}  # provide_backend says why
    if family is None:
        return {}
    text = family.config.get_text_config(decoder=True)
    sizes = {key: getattr(text, key, None) for key in wanted}
    return {key: size for key, size in sizes.items() if isinstance(size, int) and size > 0}


def _family(stated: Config) -> Family | None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(stated.get("model_type"))
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    with _blaming(f"the config of model_type {model_type!r}"):
        config = CONFIG_MAPPING[model_type].from_dict(_thaw(stated))
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return Family(stated, *_of_text(config, model_class))


def _of_text(config: Any, model_class: Any) -> tuple[Any, Any]:
    """Return what `AutoModelForCausalLM` builds: of a config of several parts, the text model alone if the class is."""
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and getattr(model_class, "config_class", None) == text_class:
        return config.get_text_config(), model_class
    return config, model_class


def _remote_family(stated: Config, request: BackendRequest) -> Family | None:
    """Return what the code beside the weights says, where the user trusts it: the only place where such code runs."""
    named = stated.get("auto_map")
    if not request.trust_remote_code or not isinstance(named, Mapping) or _AUTO_MODEL not in named:
        return None
    from transformers import CONFIG_MAPPING
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    path = request.checkpoint.file("config.json")
    if path is None:
        raise UnavailableError(f"auto_map names {named[_AUTO_MODEL]!r}, and the checkpoint has no folder to find it in")
    elsewhere = [name for name in named.values() if isinstance(name, str) and "--" in name]
    if elsewhere:
        raise UnavailableError(f"auto_map names code of another repository, {elsewhere[0]!r}, which nobody trusted")
    folder = str(path.parent)
    with _blaming(f"the code of {folder!r}"):
        if _AUTO_CONFIG in named:
            config_class: Any = get_class_from_dynamic_module(named[_AUTO_CONFIG], folder)
        else:
            config_class = CONFIG_MAPPING[stated["model_type"]]
        model_class: Any = get_class_from_dynamic_module(named[_AUTO_MODEL], folder)
        model_class.register_for_auto_class(_AUTO_MODEL)
        config = config_class.from_dict(_thaw(stated))
        config.name_or_path = folder
        return Family(stated, config, add_generation_mixin_to_remote_model(model_class))  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- what a config asks for


def _check(family: Family, request: BackendRequest) -> None:
    reason = unknown_quantization(family.stated, request) or next(_reasons(family), None)
    if reason is not None:
        raise UnavailableError(reason)
    for config in _parts(family.config):
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the plan dequantizes what it knows
        if hasattr(config, "rescale_every"):
            config.rescale_every = 0  # halving parameters in place, and results with them: only float16 could gain


def _reasons(family: Family) -> Iterator[str]:
    what = f"transformers' {family.model_class.__name__}"
    for rope_type in _rope_types(family.stated):
        if rope_type not in _known_rope_types(family.model_class):
            yield f"{what} does not know the rope type {rope_type!r}"
    if getattr(family.config, "is_decoder", True) is False and not getattr(family.config, "is_encoder_decoder", False):
        yield f"{what} is no decoder here, every token sees those after it: the config has is_decoder=False"
    if getattr(family.config.get_text_config(decoder=True), "num_codebooks", 1) > 1:
        yield f"{what} makes several streams of tokens at once, and the engine has one"
    if not family.model_class.can_generate():
        yield f"{what} does not generate"


def _rope_types(value: Any) -> Iterator[str]:
    """Yield every rope type that a raw config states, also of nested configs and of single kinds of layers."""
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        if key in ("rope_parameters", "rope_scaling") and isinstance(item, Mapping):
            by_layer = [inner for inner in item.values() if isinstance(inner, Mapping)]
            for rope in by_layer or [item]:
                named = rope.get("rope_type", rope.get("type"))
                if named is not None:
                    yield str(named)
        else:
            yield from _rope_types(item)


def _known_rope_types(model_class: Any) -> set[str]:
    """Return the rope types that transformers has functions for, and those the model's own module brings along."""
    import inspect
    import re
    import sys

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    source = inspect.getsource(sys.modules[model_class.__module__])
    own = re.findall(r"def compute_(\w+)_rope_parameters", source)
    sections = ["mrope"] if "mrope" in source else []
    return {"default", *ROPE_INIT_FUNCTIONS, *own, *sections}


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


class _blaming:  # noqa: N801  # reads as what it is, a word before a block
    """Turn whatever transformers raises inside into an `UnavailableError` that says what could not be read."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, err: BaseException | None, trace: object) -> None:
        if isinstance(err, Exception):
            raise UnavailableError(f"transformers cannot read {self._what}: {describe(err)}") from err


def describe(err: BaseException) -> str:
    """Return an exception of somebody else's code as one line."""
    text = " ".join(str(err).split())
    return f"{type(err).__name__}: {text}"[:400]


def _thaw(value: Any) -> Any:
    """Return a config as plain dicts and lists, as transformers wants it. JSON has no infinity: it writes a mapping."""
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_thaw(item) for item in value]
    return value
