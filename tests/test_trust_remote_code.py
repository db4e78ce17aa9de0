"""A checkpoint names no code: what would is gone before a plugin looks, and mentioned once; or the user trusts it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint

from infinilm import LLM
from infinilm.cli import main
from infinilm.plugins import PluginManager, trace_lineage
from infinilm_hookspecs import BackendRequest, Checkpoint, Config, DecoderConfig, hookimpl

AUTO_MAP = {"AutoModelForCausalLM": "modeling_acme.AcmeForCausalLM"}
NAMES_CODE = {
    "auto_map": AUTO_MAP,
    "_infinilm_plugin": "modeling_acme:plugin",
    "text_config": {"auto_map": AUTO_MAP, "towers": [{"_infinilm": 1, "auto_mapping": "stays"}]},
}


class Recorder:
    """Remembers every config that a plugin is shown."""

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.trusted: bool | None = None

    def see(self, *configs: Config | DecoderConfig) -> None:
        self.configs += [config for config in configs if isinstance(config, Mapping)]

    @hookimpl
    def adapt_config(self, config: Config) -> None:
        self.see(config)

    @hookimpl
    def provide_backend(self, request: BackendRequest) -> None:
        self.see(*request.lineage, request.checkpoint.config)
        self.trusted = request.trust_remote_code

    @hookimpl
    def remap_weight(self, config: Config) -> None:
        self.see(config)

    @hookimpl
    def select_processor(self, lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint) -> None:
        self.see(*lineage, checkpoint.config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint.write_tokenizer(tiny_checkpoint.write_model(tmp_path, **NAMES_CODE))


def keys_of(value: Any) -> set[str]:
    """Return every key of a config, nested ones too."""
    if isinstance(value, Mapping):
        return {*value, *(key for item in value.values() for key in keys_of(item))}
    return {key for item in value for key in keys_of(item)} if isinstance(value, list | tuple) else set()


@pytest.mark.parametrize("trust", [False, True])
def test_no_plugin_sees_a_key_that_names_code_unless_the_user_trusts_it(
    folder: Path, trust: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    LLM(folder, plugins=[recorder], trust_remote_code=trust).close()
    assert recorder.trusted is trust
    assert len(recorder.configs) >= 6  # in each of the four hooks
    for config in recorder.configs:
        found = keys_of(config)
        assert ("auto_map" in found) is trust
        assert not any(key.startswith("_infinilm") for key in found)
        assert "auto_mapping" in found
        if trust:
            assert config["auto_map"] == config["text_config"]["auto_map"] == AUTO_MAP
    mentions = [record.getMessage() for record in caplog.records if "names no code" in record.getMessage()]
    assert len(mentions) == 1
    assert "_infinilm_plugin" in mentions[0]
    assert "text_config.towers.0._infinilm" in mentions[0]
    assert ("text_config.auto_map" in mentions[0]) is not trust


def test_checkpoint_that_names_no_code_is_shown_as_it_is(tmp_path: Path) -> None:
    seen: list[Checkpoint] = []

    class Looking:
        @hookimpl
        def select_processor(self, lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint) -> None:
            seen.append(checkpoint)

    with LLM(tiny_checkpoint.write_model(tmp_path), plugins=[Looking()]) as llm:
        assert seen == [llm.checkpoint.value]


@pytest.mark.parametrize("options", [[], ["--trust-remote-code"]])
@pytest.mark.parametrize("command", [["inspect"], ["generate", "--prompt", "x", "--max-tokens", "1"]])
def test_commands_trust_only_where_the_user_says_so(
    folder: Path, tmp_path: Path, command: list[str], options: list[str]
) -> None:
    log = tmp_path / "log"
    plugin = tmp_path / "spy.py"
    plugin.write_text(
        "from pathlib import Path\nfrom infinilm_hookspecs import hookimpl\n\n@hookimpl\n"
        f"def provide_backend(request):\n    log = Path({str(log)!r})\n"
        "    log.write_text(f\"{request.trust_remote_code} {'auto_map' in request.lineage[0]}\")\n"
    )
    assert main([command[0], str(folder), *command[1:], *options, "-p", str(plugin)]) == 0
    assert log.read_text() == ("True True" if options else "False False")


def test_lineage_mentions_nothing_where_there_is_nothing(pm: PluginManager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = {"model_type": "acme", "auto_mapping": 1}
    assert trace_lineage(pm, config).configs == (config,)
    assert not caplog.records
