"""`LLM`: the composition root. Its constructor is the pipeline, a line for every stage."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinilm import pipeline, progress
from infinilm.engine.admission import Prepared
from infinilm.engine.engine import Engine
from infinilm.engine.request import Failure
from infinilm.engine.sizing import size_cache
from infinilm.generation_config import default_sampling_params, eos_token_ids, read_generation_config
from infinilm.loading import export
from infinilm.loading.execute import load
from infinilm.loading.plan import LoadPlan, PlannedParameter
from infinilm.outputs import RequestOutput
from infinilm.pipeline import BackendChoice
from infinilm.plugins import PluginManager, create_plugin_manager, trace_lineage
from infinilm.plugins.model_spec import thaw
from infinilm.sampling_params import RequestOutputKind, SamplingParams
from infinilm_hookspecs import Backend, Checkpoint, DecoderConfig, Processor, RequestError, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

Prompt = str | Mapping[str, Any]
"""Text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`."""


class LLM:
    """A model, loaded and ready to generate.

    `model` is a folder or URL that some plugin opens, or a Hub id, of which `revision` is a branch, a tag or a commit.
    `plugins` are names as the command line's `-p` takes them, or plugin objects; `plugin_manager` is a manager of the
    caller's instead. `backend` and `platform` are "auto" or the name of the plugin to ask. `dtype` is "auto", the
    checkpoint's own, or a name such as "bfloat16". `quantization` has the backend quantize weights as they are loaded,
    to a format that it knows by name, such as "int8"; `None`: they stay as they are. `tokenizer` is another folder, or
    Hub id, to take the tokenizer and chat template from. `trust_remote_code` keeps the key of the config that names
    code, `auto_map`, for a plugin to run it. `max_model_len` and `max_num_batched_tokens` are in tokens,
    `kv_cache_memory` in bytes. `enable_prefix_caching` lets prompts that begin alike be computed once, where the
    backend can share its cache.
    `generation_config="auto"` takes default sampling parameters from the checkpoint, "vllm" keeps the engine's own.
    `seed` makes requests without a seed repeatable.

    Raises an `InfinilmError` that says which file, tensor or plugin is at fault, before any weight is read where
    headers can tell.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        plugins: Iterable[object] = (),
        plugin_manager: PluginManager | None = None,
        backend: str = "auto",
        platform: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory: int | None = None,
        enable_prefix_caching: bool = True,
        generation_config: str = "auto",
        seed: int | None = None,
    ) -> None:
        if generation_config not in ("auto", "vllm"):
            raise RequestError(f"generation_config={generation_config!r} is not allowed; it takes 'auto' or 'vllm'")
        if max_model_len is not None and max_model_len < 1:
            raise RequestError(f"max_model_len={max_model_len!r} is not allowed; it takes a number of tokens, or None")
        self.plugin_manager = pm = plugin_manager or create_plugin_manager(plugins=plugins)
        self.platform = pipeline.select_platform(pm, platform)
        self._source = (str(model), revision)
        self.checkpoint = pipeline.open_checkpoint(pm, *self._source)
        with closing(self.checkpoint.value) as checkpoint:
            self.lineage = trace_lineage(pm, checkpoint.config, trust_remote_code=trust_remote_code)
            request = pipeline.make_request(
                self.lineage,
                checkpoint,
                self.platform.value,
                device=device,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                quantization=quantization,
                trust_remote_code=trust_remote_code,
            )
            self._request = replace(request, quantization=None)
            self.choice = pipeline.choose_backend(pm, request, backend)
            self.plan = pipeline.make_plan(pm, checkpoint, self.lineage, self.choice)
            self.plan.check(pm.failures())
            self.processor = pipeline.select_processor(pm, self.lineage, checkpoint, tokenizer)
            self._text = self.processor.value if self.processor else None
            logits_processors = pipeline.collect_logits_processors(pm, self._text)
            stored = read_generation_config(checkpoint)
            self._backend = self.choice.backend
            try:
                with progress.bytes_bar(self.plan.num_bytes, "loading") as bar:
                    load(self.plan, checkpoint, self._backend, progress=bar.update)
                size = size_cache(
                    self._backend.cache_spec(),
                    request.platform,
                    request.device,
                    max_model_len=request.max_model_len,
                    is_length_demanded=max_model_len is not None,
                    max_num_seqs=max_num_seqs,
                    memory=kv_cache_memory,
                )
                self._backend.allocate_cache(size.num_blocks, max_num_seqs)
            except BaseException:
                self.close()
                raise
        spec = self._backend.cache_spec()
        self.engine = Engine(
            self._backend,
            self._text,
            num_blocks=size.num_blocks,
            block_size=spec.block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=size.max_model_len,
            vocab_size=pipeline.vocabulary_size(self.lineage),
            eos_token_ids=self._text.eos_token_ids if self._text else eos_token_ids(stored, self.lineage),
            seed=seed,
            is_sharing=enable_prefix_caching and spec.shareable,
            logits_processors=logits_processors,
        )
        self._default_params = default_sampling_params(stored) if generation_config == "auto" else SamplingParams()
        self._request_ids = (str(number) for number in itertools.count())
        self._occupation = threading.Lock()
        self._occupant = ""

    @property
    def backend(self) -> Backend:
        """The backend that runs the model."""
        return self._backend

    @property
    def weight_version(self) -> str:
        """What the weights are called that answers are made with; "0" after a load."""
        return self.engine.weight_version

    def get_default_sampling_params(self) -> SamplingParams:
        """Return what `generate` uses where no `SamplingParams` are given."""
        return self._default_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Return one result for every prompt, in their order.

        `sampling_params` is one for all, or one for each. Raises `RequestError` before anything runs when a prompt is
        malformed or can never be served; no request of the call is left behind, whatever is raised.
        """
        wanted = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params_for(wanted, sampling_params)
        request_ids: list[str] = []
        with self.occupied_by("a call of generate()"):
            try:
                for prompt, its_params in zip(wanted, params, strict=True):
                    request_ids.append(next(self._request_ids))
                    final = replace(its_params, output_kind=RequestOutputKind.FINAL_ONLY)
                    self.engine.add(request_ids[-1], self.prepare(request_ids[-1], prompt, final))
                return self._run(request_ids, use_tqdm)
            except BaseException:
                self.engine.abort(request_ids)
                raise

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Return the answer to one conversation, or to each of several.

        A conversation is a list of `{"role": ..., "content": ...}`. `tools` and `chat_template_kwargs` go to the
        model's chat template. Raises `RequestError` where the model has none.
        """
        several = messages if messages and isinstance(messages[0], Sequence) else [messages]
        processor = self._require_text("chat")
        prompts: list[Prompt] = []
        for conversation in several:
            text = processor.render_chat(
                conversation,  # type: ignore[arg-type]  # told apart above
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            token_ids = processor.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def prepare(self, request_id: str, prompt: Prompt, sampling_params: SamplingParams) -> Prepared:
        """Return a request as the engine takes it: tokens, and what is compiled for it. Any thread may call it.

        Raises `RequestError` when it is malformed or can never be served.
        """
        text, token_ids = self._tokens_of(prompt)
        return self.engine.prepare(request_id, token_ids, sampling_params, prompt=text)

    @contextmanager
    def occupied_by(self, occupant: str) -> Iterator[None]:
        """Keep the engine for one user at a time. Raises `RequestError` where another has it."""
        if not self._occupation.acquire(blocking=False):
            raise RequestError(
                f"this LLM is in use by {self._occupant}; wait until that is over, or use the AsyncLLM for everything"
            )
        self._occupant = occupant
        try:
            yield
        finally:
            self._occupation.release()

    def export(self, path: str | Path, *, original: bool = False, reuse: str | Path | None = None) -> None:
        """Write the model to the folder `path`, which must not exist or be empty.

        A standard Hugging Face folder of the last raw config of the lineage: config, safetensors, tokenizer. With
        `original`, the layout of the checkpoint the model came from, bit for bit; dropped tensors are copied from the
        checkpoint `reuse`. Raises `PlanError` with every reason why that cannot be done.
        """
        with ExitStack() as stack:
            source = pipeline.open_checkpoint(self.plugin_manager, *self._source).value
            stack.callback(source.close)
            reused = None
            if reuse is not None:
                reused = pipeline.open_checkpoint(self.plugin_manager, str(reuse)).value
                stack.callback(reused.close)
            folder = stack.enter_context(export.folder_when_complete(Path(path)))
            choice, loaded = stack.enter_context(self._kept(source))
            if original:
                export.check_exact(loaded, source.tensors, is_reusing=reused is not None)
                tensors, plan, config = source.tensors, loaded, source.config
            else:
                tensors, plan = pipeline.plan_standard_export(self.plugin_manager, source, self.lineage, choice)
                config = self._standard_config(tensors, choice.backend)

            def value_of(parameter: PlannedParameter) -> Tensor:
                return choice.backend.destination(parameter.name).detach().cpu()

            restored = export.restore_tensors(plan.parameters, value_of, tensors, reused)
            export.write_safetensors(restored, folder)
            export.write_json(folder / "config.json", thaw(config))
            export.copy_companions(source, folder)

    @contextmanager
    def _kept(self, source: Checkpoint) -> Iterator[tuple[BackendChoice, LoadPlan]]:
        """Give a backend that holds the parameters as they were loaded, and how they were: our own, or another.

        Raises `PlanError` where ours packs them, and nobody else can load them.
        """
        if getattr(self._backend, "keeps_parameters", False):
            yield self.choice, self.plan
            return
        pm = self.plugin_manager
        choice = pipeline.choose_backend_that_keeps(pm, replace(self._request, checkpoint=source), self.choice)
        with closing(choice.backend):
            plan = pipeline.make_plan(pm, source, self.lineage, choice)
            plan.check(pm.failures())
            load(plan, source, choice.backend)
            yield choice, plan

    def _standard_config(self, tensors: Mapping[str, StoredTensor], backend: Backend) -> Mapping[str, Any]:
        """Return the last raw config, with what other readers would otherwise take from their family's defaults."""
        defaults: dict[str, Any] = {"dtype": Counter(stored.dtype for stored in tensors.values()).most_common(1)[0][0]}
        if self._text is not None and self._text.eos_token_ids:
            eos = sorted(self._text.eos_token_ids)
            defaults["eos_token_id"] = eos[0] if len(eos) == 1 else eos
        taken = backend.config
        stated = dict(self.lineage.last_raw() if isinstance(taken, DecoderConfig) else taken)
        if self.checkpoint.value.quantization is not None:
            stated.pop("quantization_config", None)  # what is written is dequantized
        return defaults | stated

    def close(self) -> None:
        """Free the model. Safe to call twice."""
        self._backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, request_ids: Sequence[str], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        with progress.generation_bar(len(request_ids), enabled=use_tqdm) as bar:
            while len(finished) < len(request_ids):
                for output in self.engine.step():
                    if isinstance(output, Failure):
                        raise output.error
                    finished[output.request_id] = output
                stats = self.engine.stats()
                bar.show(len(finished), stats.num_prompt_tokens, stats.num_generation_tokens)
        return [finished[request_id] for request_id in request_ids]

    def _params_for(
        self, prompts: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self._default_params] * len(prompts)
        if len(given) != len(prompts):
            raise RequestError(f"{len(given)} sampling_params for {len(prompts)} prompts; give one, or one for each")
        return given

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, Mapping) or not {"prompt", "prompt_token_ids"} >= prompt.keys() or not prompt:
            raise RequestError(
                f"a prompt is text, {{'prompt': text}} or {{'prompt_token_ids': [...]}}, not {prompt!r:.80}"
            )
        text = prompt.get("prompt")
        if "prompt_token_ids" in prompt:
            return text, prompt["prompt_token_ids"]
        if not isinstance(text, str):
            raise RequestError(f"the prompt {text!r:.80} is not text")
        return text, self._require_text("a text prompt").encode(text)

    def _require_text(self, what: str) -> Processor:
        if self._text is None:
            raise RequestError(
                f"{what} needs a tokenizer, and this model has none; give {{'prompt_token_ids': [...]}}, or take "
                f"another folder's with tokenizer=PATH (--tokenizer PATH).{self.plugin_manager.failures()}"
            )
        return self._text
