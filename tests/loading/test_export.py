"""Export: a plugin written once serves users of transformers too, and every checkpoint can be written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from infinilm import LLM, SamplingParams
from infinilm.cli import main
from infinilm.loading.export import folder_when_complete, write_safetensors
from infinilm_hookspecs import DROP, PlanError, Weight, hookimpl

MODEL = Path(__file__).parent.parent.parent / "example_plugins" / "minimal" / "model"
PROMPT = "seven plus eight is"


def logprobs(llm: LLM, token_ids: list[int]) -> list[float]:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (result,) = llm.generate({"prompt_token_ids": token_ids}, params)
    assert result.prompt_logprobs is not None
    return [row[token_ids[at]].logprob for at, row in enumerate(result.prompt_logprobs) if row is not None]


def test_export_of_a_foreign_checkpoint_is_read_by_transformers_with_the_same_logits(tmp_path: Path) -> None:
    with LLM(MODEL) as llm:
        llm.export(tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        token_ids = tokenizer(PROMPT)["input_ids"]
        ours = logprobs(llm, token_ids)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.eos_token_id == 0
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    theirs = [logits[at, token_ids[at + 1]].item() for at in range(len(token_ids) - 1)]
    assert ours == pytest.approx(theirs, abs=1e-4)
    generated = model.generate(torch.tensor([token_ids]), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0], skip_special_tokens=True) == f"{PROMPT} fifteen"


def test_round_trips_are_byte_identical(tmp_path: Path) -> None:
    with LLM(MODEL) as llm:
        llm.export(tmp_path / "standard")
        llm.export(tmp_path / "original", original=True)
    with LLM(tmp_path / "standard", plugins=["no:minimal"]) as llm:
        llm.export(tmp_path / "again", original=True)
    for one, other in (("original", MODEL), ("again", tmp_path / "standard")):
        ours, theirs = load_file(tmp_path / one / "model.safetensors"), load_file(Path(other) / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8)) for n in ours)
        assert json.loads((tmp_path / one / "config.json").read_text()) == json.loads(
            (Path(other) / "config.json").read_text()
        )


class Extra:
    """Drops one stored tensor that the demo's checkpoint does not have, and narrows another."""

    @hookimpl(wrapper=True)
    def remap_weight(self, config):  # type: ignore[no-untyped-def]  # a generator of whatever the owner gave
        rule = yield
        return {**rule, "extra": DROP} if config["model_type"] == "abacus" else rule


@pytest.fixture
def with_extra(tmp_path: Path) -> Path:
    folder = tmp_path / "extra"
    folder.mkdir()
    for file in MODEL.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file({**load_file(MODEL / "model.safetensors"), "extra": torch.randn(3, 2)}, folder / "model.safetensors")
    return folder


def test_original_is_refused_with_every_reason(with_extra: Path, tmp_path: Path) -> None:
    with LLM(with_extra, plugins=[Extra()], dtype="bfloat16") as llm, pytest.raises(PlanError) as caught:
        llm.export(tmp_path / "out", original=True)
    message = str(caught.value)
    assert "extra was dropped by plugin" in message
    assert "model.layers.{0-5}.mlp.down_proj.weight is not what was stored: float32 to bfloat16" in message
    assert "--reuse" in message
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out*")) == []


def test_dropped_tensors_are_copied_from_the_source(with_extra: Path, tmp_path: Path) -> None:
    with LLM(with_extra, plugins=[Extra()]) as llm:
        llm.export(tmp_path / "out", original=True, reuse=with_extra)
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(with_extra / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(MODEL), str(tmp_path / "out")]) == 0
    assert main(["generate", str(tmp_path / "out"), "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == f"{PROMPT} fifteen\n"
    assert main(["export", str(MODEL), str(tmp_path / "out")]) == 2
    assert "exists and is not empty; export to another folder" in capsys.readouterr().err


def test_shards_and_their_index_are_what_transformers_reads(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)}
    write_safetensors(tensors.items(), tmp_path, max_shard_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    found = {}
    for file in set(index["weight_map"].values()):
        found |= load_file(tmp_path / file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert len(list(tmp_path.glob("model-0000?-of-00004.safetensors"))) == 4


def test_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with folder_when_complete(tmp_path / "out") as folder:
            (folder / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_step_without_an_inverse_is_named(tmp_path: Path) -> None:
    class Flip:
        @hookimpl(wrapper=True)
        def remap_weight(self, config):  # type: ignore[no-untyped-def]  # a generator of whatever the owner gave
            rule = yield
            if config["model_type"] != "abacus":
                return rule

            def flip(weight: Weight) -> Weight:
                return weight.apply(lambda t: t.flip(0)).rename("model.norm.weight")

            return {**rule, "final_norm.weight": flip}

    with (
        LLM(MODEL, plugins=[Flip()]) as llm,
        pytest.raises(PlanError, match=r"model.norm.weight is not what was stored"),
    ):
        llm.export(tmp_path / "out", original=True)
