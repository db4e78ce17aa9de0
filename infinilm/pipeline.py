"""The one way through the house: a function for every stage, each the only caller of its hook.

`LLM` and `infinilm inspect` both walk them in this order; between the checkpoint and the backend comes the lineage,
`infinilm.plugins.trace_lineage`. Everything here reads headers only, and what is wrong is an error that names the
plugin, the file and what to do.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from infinilm import hub
from infinilm.checkpoint_view import CheckpointView
from infinilm.loading.collector import collector_paused
from infinilm.loading.dequantize import start_walk
from infinilm.loading.plan import LoadPlan, plan_load
from infinilm.loading.stages import Stage
from infinilm.plugins import Answer, Lineage, PluginManager
from infinilm.plugins.checks import did_you_mean
from infinilm.plugins.host import wrong_answer
from infinilm.plugins.lineage import freeze, model_type_of
from infinilm_hookspecs import (
    Backend,
    BackendRequest,
    Checkpoint,
    CheckpointError,
    Config,
    ConfigError,
    DecoderConfig,
    InfinilmError,
    LogitsProcessorFactory,
    Named,
    PlanError,
    Platform,
    PluginError,
    Processor,
    StoredTensor,
    UnavailableError,
)
from infinilm_hookspecs.state_dicts import RuleChain, StateDictRule

_log = logging.getLogger("infinilm")


@dataclass(frozen=True, slots=True)
class Decline:
    """A plugin that was asked for a backend, and why it has none for this model."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend that took the model, the plugin it comes from, and those that declined before it."""

    backend: Backend
    plugin: str
    declined: tuple[Decline, ...]


# ---------------------------------------------------------------- platform


def select_platform(pm: PluginManager, name: str = "auto") -> Answer[Platform]:
    """Return the platform of this machine, or that of the plugin `name`.

    Raises `UnavailableError` with the platform's own reason when it is not there.
    """
    exclude = pm.others(name) if name != "auto" else ()
    answer = pm.ask_one("provide_platform", exclude=exclude)
    if answer is None:
        raise UnavailableError(f"plugin {name!r} provides no platform on this machine.{pm.failures()}")
    kind = _import_dotted(answer) if isinstance(answer.value, str) else answer.value
    if not isinstance(kind, type) or not hasattr(kind, "availability"):
        raise wrong_answer(pm, answer, "provide_platform", "a Platform class or its dotted name")
    available, reason = kind.availability()
    if not available:
        raise UnavailableError(f"platform {answer.plugin!r} is not available: {reason}")
    return Answer(kind(), answer.plugin)


def _import_dotted(answer: Answer[str]) -> Any:
    module, _, attribute = answer.value.partition(":")
    if not attribute:
        module, _, attribute = answer.value.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as err:
        raise PluginError(f"plugin {answer.plugin!r} names the platform {answer.value!r}: {err}") from err


# ---------------------------------------------------------------- checkpoint


@collector_paused()
def open_checkpoint(pm: PluginManager, model: str, revision: str | None = None) -> Answer[Checkpoint]:
    """Return the checkpoint of `model`, a path, a URL or a Hub id, of which `revision` is a branch, tag or commit.

    Raises `CheckpointError` when there is no such model, or no plugin knows what lies there.
    """
    source = hub.resolve(model, revision)
    answer = pm.ask_one("open_checkpoint", source=source)
    if answer is None:
        where = repr(model) if source == model else f"{model!r}, in {source!r}"
        raise CheckpointError(f"no plugin opens {where}: {_what_lies_there(pm, Path(source))}.{pm.failures()}")
    if not isinstance(answer.value, Checkpoint):
        raise wrong_answer(pm, answer, "open_checkpoint", "a Checkpoint")
    model_type = answer.value.config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        answer.value.close()
        raise ConfigError(
            f"the config of {source!r} has the model_type {model_type!r}; a name such as 'llama' is wanted, by which "
            "plugins know the model"
        )
    return answer


def _what_lies_there(pm: PluginManager, path: Path) -> str:
    if not path.is_dir():
        return "it is no folder"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    formats = ", ".join(record.name for record in pm.records if "open_checkpoint" in record.hooks)
    return f"it holds {shown}; formats known: {formats or 'none'}" if names else "the folder is empty"


def _as_plugins_see(checkpoint: Checkpoint, lineage: Lineage) -> Checkpoint:
    """Return the checkpoint itself, or where its config named code, a view of it with the config that does not."""
    stored = lineage.configs[0]
    if isinstance(stored, DecoderConfig) or freeze(checkpoint.config) == stored:
        return checkpoint
    return CheckpointView(checkpoint, stored)


# ---------------------------------------------------------------- dtype and sizes


def choose_dtype(wanted: str, lineage: Lineage, checkpoint: Checkpoint, platform: Platform) -> str:
    """Return the dtype to run in: what is wanted, or for "auto" the checkpoint's own where the platform computes in it.

    Raises `UnavailableError` for a dtype that the platform does not support.
    """
    if wanted != "auto":
        if not platform.supports(wanted):
            raise UnavailableError(f"platform {platform.name!r} does not run models in dtype {wanted!r}")
        return wanted
    stored = _stored_dtype(lineage, checkpoint)
    if platform.supports(stored):
        return stored
    _log.warning("running in float32: platform %r does not compute in the checkpoint's %s", platform.name, stored)
    return "float32"


def _stored_dtype(lineage: Lineage, checkpoint: Checkpoint) -> str:
    for config in lineage.configs:
        named = None if isinstance(config, DecoderConfig) else config.get("dtype") or config.get("torch_dtype")
        if isinstance(named, str) and named != "auto":
            return named.removeprefix("torch.")
    sizes = Counter[str]()
    for weight in start_walk(checkpoint.tensors, checkpoint.quantization).weights.values():
        sizes[weight.dtype_name] += weight.numel()
    return sizes.most_common(1)[0][0] if sizes else "float32"


def vocabulary_size(lineage: Lineage) -> int:
    """Return how many token ids the model has. Raises `ConfigError` when no config of the lineage says."""
    size = _config_number(lineage, "vocab_size")
    if size is None:
        raise ConfigError("no config of the lineage has a vocab_size")
    return size


def _config_number(lineage: Lineage, key: str) -> int | None:
    """Return a size of the model from the last config that states it, or `None`."""
    for config in reversed(lineage.configs):
        number = getattr(config, key) if isinstance(config, DecoderConfig) else config.get(key)
        if isinstance(number, int):
            return number
    return None


# ---------------------------------------------------------------- backend


def make_request(
    lineage: Lineage,
    checkpoint: Checkpoint,
    platform: Platform,
    *,
    device: str,
    dtype: str,
    max_model_len: int | None,
    max_num_seqs: int,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> BackendRequest:
    """Return what is asked of backends, every "auto" settled.

    `max_model_len` is 0 where neither the user nor a config says how long a sequence may be.
    """
    length = max_model_len or _config_number(lineage, "max_position_embeddings") or 0
    return BackendRequest(
        lineage=lineage.configs,
        checkpoint=_as_plugins_see(checkpoint, lineage),
        platform=platform,
        device=platform.device(0) if device == "auto" else device,
        dtype=choose_dtype(dtype, lineage, checkpoint, platform),
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        rank=0,
        world_size=1,
        max_model_len=length,
        max_num_seqs=max_num_seqs,
    )


@collector_paused()
def choose_backend(
    pm: PluginManager, request: BackendRequest, name: str = "auto", *, without: Collection[str] = ()
) -> BackendChoice:
    """Return the first backend that takes the model, or that of the plugin `name`; plugins `without` are not asked.

    Raises `ConfigError` when no plugin knows the model, and `UnavailableError` with every reason when no backend takes
    it.
    """
    exclude = pm.others(name) if name != "auto" else without
    reasons: dict[str, str] = {}
    request = replace(
        request,
        is_named=name != "auto",
        on_decline=lambda reason: reasons.update({pm.asking or "?": reason}),
        torch_module=partial(_find_torch_module, pm),
        stored_weights=partial(_find_stored_weights, pm, request),
    )
    backend, heard = pm.call("provide_backend", exclude=exclude, request=request)
    declined = tuple(
        Decline(answer.plugin, reasons[answer.plugin])
        for answer in heard
        if answer.value is None and answer.plugin in reasons  # who says nothing has other models
    )
    if backend is None:
        raise _no_backend(pm, request, declined)
    answer = next(answer for answer in heard if answer.value is backend)
    if not isinstance(backend, Backend):
        raise wrong_answer(pm, answer, "provide_backend", "a Backend, or request.decline(reason)")
    if all(backend.config is not config for config in request.lineage):
        raise PluginError(f"the backend of plugin {answer.plugin!r} took a config that is not one of the lineage's")
    if not request.max_model_len:
        raise ConfigError("no config of the lineage has max_position_embeddings; give max_model_len")
    caveat = getattr(backend, "caveat", None)
    if caveat is not None:
        why = "".join(f"; {decline.name} declined it: {decline.reason}" for decline in declined)
        _log.log(logging.WARNING if name == "auto" else logging.INFO, "%s%s", caveat, why)
    return BackendChoice(backend, answer.plugin, declined)


def choose_backend_that_keeps(pm: PluginManager, request: BackendRequest, packing: BackendChoice) -> BackendChoice:
    """Return a backend that can give back what it was given, in place of one that packs it.

    Raises `PlanError` when no other backend takes the model.
    """
    packs = f"the backend {packing.backend.name!r} packs its parameters and cannot give them back"
    without = {packing.plugin}
    while True:
        try:
            choice = choose_backend(pm, request, without=without)
        except InfinilmError as err:
            raise PlanError(f"{packs}, and no other can be loaded to: {err}") from err
        if getattr(choice.backend, "keeps_parameters", False):
            _log.info("%s; they are read again, through %s", packs, choice.plugin)
            return choice
        without.add(choice.plugin)
        choice.backend.close()


def _find_torch_module(pm: PluginManager, part: Named, config: DecoderConfig) -> Any:
    """Return what makes the module of a `Named` part, or `None` where no plugin supplies it."""
    answer = pm.ask_first("provide_torch_module", part=part, config=config)
    if answer is not None and not callable(answer.value):
        raise wrong_answer(pm, answer, "provide_torch_module", "a function that makes a torch.nn.Module")
    return None if answer is None else answer.value


def _find_stored_weights(pm: PluginManager, request: BackendRequest) -> Mapping[str, Mapping[str, str]]:
    """Return the stored tensors by role of every quantized weight that no rule changed, by its last name."""
    walk = start_walk(request.checkpoint.tensors, request.checkpoint.quantization)
    for stage in chain.from_iterable(_collect_rules(pm, Lineage(request.lineage, ()), request.lineage[-1])):
        walk.run(stage)
    stored = ((name, walk.packed.get(id(weight.pieces))) for name, weight in walk.weights.items())
    return {name: {role: part.name for role, part in packed[1].items()} for name, packed in stored if packed}


def _no_backend(pm: PluginManager, request: BackendRequest, declined: Sequence[Decline]) -> InfinilmError:
    last = request.lineage[-1]
    model_type = last.model_type if isinstance(last, DecoderConfig) else model_type_of(last)
    known = sorted({known for record in pm.records for known in record.model_types})
    if isinstance(last, DecoderConfig) or model_type in known:
        reasons = "; ".join(f"{decline.name}: {decline.reason}" for decline in declined)
        return UnavailableError(f"no backend runs this {model_type}: {reasons or 'none is loaded'}.{pm.failures()}")
    reasons = "".join(f" {decline.name}: {decline.reason}." for decline in declined)
    return ConfigError(
        f"no plugin adapts model_type {model_type!r} (in {str(request.checkpoint.file('config.json'))!r})"
        f"{did_you_mean(model_type, known)}; known: {', '.join(known) or 'none'}.{reasons}{pm.failures()}"
    )


# ---------------------------------------------------------------- weights


def collect_stages(pm: PluginManager, lineage: Lineage, choice: BackendChoice) -> list[list[Stage]]:
    """Return the rules that weights pass on their way to the backend: a list for every raw config, then its own.

    A rule that ends the walk leaves the lists of later configs out.
    """
    own = choice.backend.weight_rule
    groups = _collect_rules(pm, lineage, choice.backend.config)
    return [*groups, [] if own is None else [Stage(own, choice.plugin)]]


def _collect_rules(pm: PluginManager, lineage: Lineage, taken: Config | DecoderConfig) -> list[list[Stage]]:
    """Return the rules of every raw config on the way to one that is `taken`."""
    groups: list[list[Stage]] = []
    answered: dict[str, set[str]] = {}
    is_final = False
    for config in lineage.stages(taken):
        if is_final:
            break
        before = answered.setdefault(model_type_of(config), set())
        answer = pm.ask_first("remap_weight", exclude=before, config=config)
        groups.append([])
        if answer is None:
            continue
        before.add(answer.plugin)
        given = answer.value if isinstance(answer.value, RuleChain) else RuleChain((answer.value,))
        for rule in given.rules:
            if not callable(rule) and not isinstance(rule, Mapping | StateDictRule):
                raise wrong_answer(pm, answer, "remap_weight", "a function of one Weight or a table")
            groups[-1].append(Stage(rule, answer.plugin))
        is_final = given.is_final
    return groups


@collector_paused()
def make_plan(pm: PluginManager, checkpoint: Checkpoint, lineage: Lineage, choice: BackendChoice) -> LoadPlan:
    """Return the plan that fills the backend's parameters, with everything that is wrong with it."""
    stages = chain.from_iterable(collect_stages(pm, lineage, choice))
    return plan_load(checkpoint.tensors, list(stages), choice.backend.parameters(), checkpoint.quantization)


def plan_standard_export(
    pm: PluginManager, checkpoint: Checkpoint, lineage: Lineage, choice: BackendChoice
) -> tuple[Mapping[str, StoredTensor], LoadPlan]:
    """Return the tensors of the last raw config of the lineage, and the plan from those to the backend's parameters."""
    groups = collect_stages(pm, lineage, choice)
    raw = sum(not isinstance(config, DecoderConfig) for config in lineage.configs)
    first = min(raw, len(groups)) - 1  # where a rule ended the walk, its names are the last
    walk = start_walk(checkpoint.tensors, checkpoint.quantization)
    for stage in chain.from_iterable(groups[:first]):
        walk.run(stage)
    tensors = {name: StoredTensor(w.shape, w.dtype_name, None) for name, w in walk.weights.items()}
    downstream = list(chain.from_iterable(groups[first:]))
    return tensors, plan_load(tensors, downstream, choice.backend.parameters())


# ---------------------------------------------------------------- processor


def select_processor(
    pm: PluginManager, lineage: Lineage, checkpoint: Checkpoint, tokenizer: str | Path | None = None
) -> Answer[Processor] | None:
    """Return the model's processor, or `None` where no plugin has one: the model then takes token ids only.

    `tokenizer` is another folder or Hub id to take the tokenizer and chat template from. Raises `CheckpointError` when
    no plugin knows what lies there.
    """
    checkpoint = _as_plugins_see(checkpoint, lineage)
    if tokenizer is not None:
        checkpoint = CheckpointView(checkpoint, checkpoint.config, _tokenizer_folder(str(tokenizer)))
    answer = pm.ask_first("select_processor", lineage=lineage.configs, checkpoint=checkpoint)
    if answer is not None and isinstance(answer.value, str):
        asked = pm.others(answer.value)
        named = pm.ask_first("select_processor", exclude=asked, lineage=lineage.configs, checkpoint=checkpoint)
        if named is None:
            raise PluginError(
                f"plugin {answer.plugin!r} names the processor of plugin {answer.value!r}, and that one has none here"
            )
        answer = named
    if answer is not None and not isinstance(answer.value, Processor):
        raise wrong_answer(pm, answer, "select_processor", "a Processor, or the name of the plugin that has one")
    if answer is None and tokenizer is not None:
        raise CheckpointError(
            f"no plugin makes a processor of what lies in {str(tokenizer)!r}; a tokenizer.json, a tokenizer.model, or "
            f"vocab.json and merges.txt are wanted.{pm.failures()}"
        )
    return answer


def _tokenizer_folder(tokenizer: str) -> Path:
    folder = Path(hub.resolve(tokenizer, with_weights=False))
    if not folder.is_dir():
        raise CheckpointError(f"the tokenizer {tokenizer!r} is no folder; give the one its files lie in, or a Hub id")
    return folder


# ---------------------------------------------------------------- logits processors


def collect_logits_processors(pm: PluginManager, processor: Processor | None) -> Mapping[str, LogitsProcessorFactory]:
    """Return what plugins offer under the keys of `SamplingParams.extra_args`.

    Raises `PluginError` naming both where two plugins have the same key.
    """
    found: dict[str, LogitsProcessorFactory] = {}
    owners: dict[str, str] = {}
    for answer in pm.ask_all("provide_logits_processors", processor=processor):
        if not isinstance(answer.value, Mapping) or not all(callable(factory) for factory in answer.value.values()):
            raise wrong_answer(pm, answer, "provide_logits_processors", "a mapping from names to factories")
        for name, factory in answer.value.items():
            if name in found:
                raise PluginError(
                    f"plugins {owners[name]!r} and {answer.plugin!r} both provide the logits processor {name!r}; "
                    f"settle it with -p no:{owners[name]} or -p no:{answer.plugin}"
                )
            found[name], owners[name] = factory, answer.plugin
    return found
