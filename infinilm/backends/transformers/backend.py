"""`TransformersBackend`: the `Backend` protocol over a model of transformers, on the paged cache or on its own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infinilm.backends.torch.attention import index_tensor
from infinilm.backends.torch.cache import BLOCK_SIZE
from infinilm.backends.transformers import attention
from infinilm.backends.transformers.families import Family
from infinilm.backends.transformers.model import LoadedModel
from infinilm.backends.transformers.pages import LayerShape, Pages
from infinilm.backends.transformers.rules import conversion_rule
from infinilm.backends.transformers.sequences import Sequences, Stepper
from infinilm.backends.transformers.trial import Findings, try_out
from infinilm_hookspecs import BackendRequest, CacheSpec, ForwardBatch, ParameterSpec, UnavailableError

_log = logging.getLogger("infinilm")


class TransformersBackend:
    """Runs the model of `family` as `request` asks. Raises `UnavailableError` where transformers cannot build it.

    How it is run is known once it is loaded: `findings`.
    """

    name = "transformers"
    keeps_parameters = True

    def __init__(self, request: BackendRequest, family: Family) -> None:
        self.config = family.stated
        self.findings: Findings | None = None
        self._family = family
        self._request = request
        self._dtype: torch.dtype = getattr(torch, request.dtype)
        self._device = torch.device(request.device)
        self._model: LoadedModel | None = LoadedModel(family, self._dtype, self._device)
        self.weight_rule = conversion_rule(self._model.module)
        self._sequences: Sequences | None = None
        self._pages: Pages | None = None
        self._shapes: dict[int, LayerShape] = {}
        self._keeps_logits = False
        self._own_attention: list[tuple[Any, str]] = []  # configs of the model's parts

    @property
    def caveat(self) -> str:
        """Why this backend is not a choice to be happy with, and what would be a better one."""
        return (
            f"the transformers backend runs {self._family.model_class.__name__}, and is the slow choice; a plugin "
            f"whose adapt_config makes a DecoderConfig of model_type {self._family.model_type!r} lets a faster one "
            "run it"
        )

    # ------------------------------------------------------------ loading

    def parameters(self) -> Mapping[str, ParameterSpec]:
        """Return the parameters, and the buffers that checkpoints hold, by transformers' names."""
        return self._loaded_model().parameters

    def destination(self, name: str) -> Tensor:
        """Return the buffer of a parameter. A tied parameter has none."""
        return self._loaded_model().destination(name)

    def loaded(self, name: str) -> None:
        """Take note that the buffer of `name` is full."""
        self._loaded_model().loaded(name)

    @torch.inference_mode()
    def finish_loading(self) -> None:
        """Compute what is not stored, and find out how the model may be run.

        Raises `PlanError` where something was not loaded, and `UnavailableError` where the model does not run.
        """
        model = self._loaded_model()
        model.finish()
        if self.findings is not None:
            return  # an update: other values, the same model
        module = model.module
        parts = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
        self._own_attention = [(config, config._attn_implementation) for config in parts.values()]
        stepper = Stepper(module, self._device)
        pages = Pages(2, self._device)
        text = module.config.get_text_config(decoder=True)
        findings = try_out(stepper, text.vocab_size, self._dtype, self._paged_run(pages))
        self.findings = findings
        self._shapes = dict(pages.shapes)
        how = "on the paged cache" if findings.unpaged is None else f"on its own cache, {findings.cut.value}"
        why = "" if findings.unpaged is None else f": {findings.unpaged}"
        _log.info("transformers runs %s %s%s", type(module).__name__, how, why)
        if findings.unpaged is None:
            self._use_attention(attention.NAME)
        else:
            self._sequences = Sequences(stepper, findings.cut, findings.num_logits)

    def _loaded_model(self) -> LoadedModel:
        assert self._model is not None, "the backend is closed"
        return self._model

    # ------------------------------------------------------------ cache

    def cache_spec(self) -> CacheSpec:
        """Return what the cache costs. Known once the model is loaded."""
        findings = self._known_findings()
        if findings.unpaged is None:
            per_token = sum(shape.bytes_per_token for shape in self._shapes.values())
            return CacheSpec(BLOCK_SIZE, BLOCK_SIZE * per_token)
        return CacheSpec(
            BLOCK_SIZE, BLOCK_SIZE * findings.bytes_per_token, findings.bytes_per_sequence, shareable=False
        )

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        """Allocate an empty cache in place of the one before. A model's own cache grows as sequences do.

        Raises `UnavailableError` where there is no room.
        """
        findings = self._known_findings()
        self._pages = None
        needed = num_blocks * self.cache_spec().bytes_per_block + num_slots * self.cache_spec().bytes_per_slot
        free, total = self._request.platform.memory(str(self._device))
        if needed > free:
            raise UnavailableError(
                f"the cache needs {needed} bytes, and {str(self._device)!r} has {free} of {total} bytes free; "
                "ask for less with kv_cache_memory, max_num_seqs or max_model_len"
            )
        if findings.unpaged is None:
            self._pages = Pages(num_blocks, self._device, self._shapes)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy cache blocks: (from, to) pairs. Where blocks cannot be shared, nobody asks for it."""
        if self._pages is not None:
            self._pages.copy_blocks(pairs)

    def release(self, slots: Sequence[int]) -> None:
        """Forget the state of sequences."""
        if self._sequences is not None:
            self._sequences.release(slots)

    def _known_findings(self) -> Findings:
        assert self.findings is not None, "how a model is run is known after finish_loading"
        return self.findings

    # ------------------------------------------------------------ running

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one step and return float32 logits (len(batch.logits_indices), vocab_size)."""
        if self._sequences is not None:
            return self._sequences.forward(batch)
        assert self._pages is not None, "forward before allocate_cache"
        return self._forward_paged(batch, self._pages)

    def close(self) -> None:
        """Free model and cache."""
        self._model = None
        self._sequences = None
        self._pages = None

    def _paged_run(self, pages: Pages) -> Callable[[ForwardBatch], Tensor] | None:
        """Return a way to run batches on `pages`, or `None` for a model that has no place for another attention."""
        module = self._loaded_model().module
        accepted = inspect.signature(module.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        if not module._supports_attention_backend or not {"position_ids", "past_key_values"} <= set(accepted):
            return None

        def run(batch: ForwardBatch) -> Tensor:
            attention.register()
            try:
                self._use_attention(attention.NAME)
                return self._forward_paged(batch, pages)
            finally:
                self._use_attention(None)

        return run

    def _use_attention(self, name: str | None) -> None:
        """Have all parts of the model attend by the implementation `name`; `None`: each by its own again."""
        if name is not None:
            self._loaded_model().module.set_attn_implementation(name)
            return
        for config, own in self._own_attention:
            config._attn_implementation_internal = own

    def _forward_paged(self, batch: ForwardBatch, pages: Pages) -> Tensor:
        module = self._loaded_model().module
        step = attention.Step(batch, pages, self._device)
        rows = index_tensor(batch.logits_indices, self._device)
        with attention.running(step):
            outputs = module(
                input_ids=index_tensor(batch.token_ids, self._device)[None],
                position_ids=index_tensor(batch.positions, self._device)[None],
                past_key_values=attention.StepCache(step),
                use_cache=True,
                return_dict=True,
                **({"logits_to_keep": rows} if self._keeps_logits else {}),
            )
        if step.attended != {layer for _, _, layer in step.written} or not step.attended:
            raise attention.UnpagedError("some of its attention does not go through the attention interface")
        logits: Tensor = outputs.logits[0]
        return (logits if self._keeps_logits else logits[rows]).float()
