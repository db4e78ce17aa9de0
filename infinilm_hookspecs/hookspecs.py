"""Every hook of infinilm, in the order a run calls them: about ten calls a load, none per tensor, none per token.

`None` always means "not mine". *firstresult* hooks stop at the first answer, the plugin registered last being asked
first; a `wrapper=True` implementation sees that one answer and may return another. *Exclusive* hooks ask everyone, and
at most one may claim: a plugin the user named beats discovered and in-tree ones, a discovered one beats another only if
it says `overrides = ("name", ...)`, and two that remain are an error that names both. Any other hook asks everyone and
takes all they say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from infinilm_hookspecs.markers import hookspec

if TYPE_CHECKING:
    from torch.nn import Module

    from infinilm_hookspecs.config import DecoderConfig, Named
    from infinilm_hookspecs.rules import WeightRule
    from infinilm_hookspecs.types import (
        Backend,
        BackendRequest,
        Checkpoint,
        Config,
        LogitsProcessorFactory,
        Platform,
        Processor,
    )


@hookspec
def provide_platform() -> type[Platform] | str | None:
    """Offer the kind of device this machine has.

    Called when: once per `LLM` and worker, before anything touches a device.
    Return: a `Platform` class, or its dotted name as `"package.module:Class"`.
    `None` means: this machine has no such device.
    Dispatch: exclusive; `cpu` is the platform when no other claims.
    Raises: nothing; a driver that is broken is a reason in `Platform.availability`.

    Example:
        >>> class AcmePlugin:
        ...     @hookimpl
        ...     def provide_platform(self):
        ...         return "acme_infinilm:AcmePlatform" if Path("/dev/acme0").exists() else None
    """


@hookspec
def open_checkpoint(source: str) -> Checkpoint | None:
    """Open a checkpoint by looking at it, reading headers only.

    Called when: once per load or update from disk, after the platform is known.
    Return: a `Checkpoint`.
    `None` means: `source` is not in this plugin's format.
    Dispatch: exclusive; a folder that two plugins claim is an error naming both.
    Args:
        source: a folder, a file, or a URL. Never decide by anything but what lies there.
    Raises: `CheckpointError` when the format is this plugin's and the files are damaged.

    Example:
        >>> class ZipFormat:
        ...     @hookimpl
        ...     def open_checkpoint(self, source):
        ...         return ZipCheckpoint(source) if zipfile.is_zipfile(source) else None
    """


@hookspec(firstresult=True)
def adapt_config(config: Config) -> Config | DecoderConfig | None:
    """Take a config one step nearer to something a backend runs.

    Called when: again and again, until nobody answers or a `DecoderConfig` comes back. The configs passed through are
        the lineage. A plugin that answered for a `model_type` is not asked for it again in the same run.
    Return: a repaired or renamed config, or a `DecoderConfig`.
    `None` means: this config is not this plugin's.
    Dispatch: firstresult.
    Args:
        config: read-only; return a new mapping.
    Raises: `ConfigError` when the config is this plugin's and asks for something the family does not have.

    Example:
        >>> class Qwen9:
        ...     @hookimpl
        ...     def adapt_config(self, config):
        ...         return {**config, "model_type": "llama"} if config.get("model_type") == "qwen9" else None
        >>> Qwen9().adapt_config({"model_type": "qwen9", "hidden_size": 64})
        {'model_type': 'llama', 'hidden_size': 64}
    """


@hookspec(firstresult=True)
def provide_backend(request: BackendRequest) -> Backend | None:
    """Build the backend that runs this model, without allocating its parameters.

    Called when: once per model and process, after the lineage is complete.
    Return: a `Backend` that names the config it took in `Backend.config`.
    `None` means: not this model. Return `request.decline("why")`, so that the user can read the reason.
    Dispatch: firstresult.
    Args:
        request: the lineage, the platform, and what the user asked for.
    Raises: nothing for a model it does not run: that is a decline.

    Example:
        >>> class Acme:
        ...     @hookimpl
        ...     def provide_backend(self, request):
        ...         if not isinstance(request.lineage[-1], DecoderConfig):
        ...             return request.decline("acme runs a DecoderConfig, and no plugin made one")
    """


@hookspec(firstresult=True)
def provide_torch_module(part: Named, config: DecoderConfig) -> Callable[[], Module] | None:
    """Supply the torch module of a mixer or MLP that the contract does not know.

    Called when: once for every different `Named` part of a model, while a backend that runs torch modules, such as
        in-tree `torch`, is asked whether it takes the model.
    Return: what makes the module, called without arguments for every layer that has the part, on torch's meta device.
        A mixer's `forward` is called with activations and the positions of their tokens, an MLP's with activations
        (num_tokens, hidden_size), of several sequences end to end; it returns activations. What a token may know of
        others comes through `infinilm.backends.torch.Attention`. Parameters are called
        `model.layers.3.self_attn.*` or `model.layers.3.mlp.*`, then as the module calls them.
    `None` means: not this plugin's part. Where nobody answers, the backend declines the model by the part's name.
    Dispatch: firstresult.
    Args:
        part: its `name` says what it is; sizes are in its `options`.
        config: the whole model, for `hidden_size`.
    Raises: `ConfigError` when the part is this plugin's and its options are not what it knows.

    Example:
        >>> class SquaredRelu:
        ...     @hookimpl
        ...     def provide_torch_module(self, part, config):
        ...         if part.name == "squared_relu":
        ...             from acme_infinilm.modules import SquaredReluMlp  # torch is imported here, not before
        ...
        ...             return lambda: SquaredReluMlp(config.hidden_size, **part.options)
    """


@hookspec(firstresult=True)
def remap_weight(config: Config) -> WeightRule | None:
    """Say how the weights of one stage get the names and shapes of the next.

    Called when: once per raw config of the lineage up to the one the backend took, first to last. A plugin that gave
        one stage its rule is not asked again for the same `model_type`.
    Return: a rule: a function of one `Weight`, or a table of whole-name templates. The core runs it on headers.
    `None` means: this stage is not this plugin's. Where nobody answers, every weight passes unchanged.
    Dispatch: firstresult; a wrapper gets the owner's rule and returns another.
    Args:
        config: the stage's config. Sizes come from here.
    Raises: nothing here; the rule itself may raise `WeightError`.

    Example:
        >>> class Qwen9:
        ...     @hookimpl
        ...     def remap_weight(self, config):
        ...         if config.get("model_type") == "qwen9":
        ...             return {"h.{layer}.wq": "model.layers.{layer}.self_attn.q_proj.weight", "rope.freqs": DROP}
    """


@hookspec(firstresult=True)
def select_processor(lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint) -> Processor | None:
    """Choose what turns text into tokens and back.

    Called when: once per load, after the backend is chosen.
    Return: a `Processor`.
    `None` means: not this plugin's. Where nobody answers, the model takes and gives token ids only.
    Dispatch: firstresult.
    Args:
        lineage: every config from the stored one to the last.
        checkpoint: for the files beside the weights, through `checkpoint.file(name)`.
    Raises: `CheckpointError` when the tokenizer's files are damaged.

    Example:
        >>> class Qwen9:
        ...     @hookimpl
        ...     def select_processor(self, lineage, checkpoint):
        ...         if lineage[0].get("model_type") == "qwen9":
        ...             return Qwen9Processor(checkpoint.file("qwen9.vocab"))
    """


@hookspec
def provide_logits_processors(processor: Processor | None) -> Mapping[str, LogitsProcessorFactory] | None:
    """Take part in choosing tokens: change the logits of the requests that ask for it.

    Called when: once per `LLM`, after the processor is chosen. What is returned is used for every request.
    Return: factories by name. A request whose `SamplingParams.extra_args` has that name as a key gets
        `factory(value)` once for each of its answers: a `LogitsProcessor` that may keep a state.
    `None` means: this plugin has none.
    Dispatch: everyone is asked, and all that is offered is there; one name from two plugins is an error naming both.
    Args:
        processor: the model's, or `None` where it takes and gives token ids only.
    Raises: nothing here; a factory raises `RequestError` for a value that is not allowed.

    Example:
        >>> def forbid(token_id):
        ...     def process(prompt_token_ids, token_ids, logits):
        ...         logits[token_id] = -math.inf
        ...         return logits
        ...     return process
        >>> class Forbidding:
        ...     @hookimpl
        ...     def provide_logits_processors(self, processor):
        ...         return {"forbid": forbid}
    """
