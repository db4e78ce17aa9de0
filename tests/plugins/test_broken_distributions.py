"""Ten broken distributions and two good ones in one environment: nothing silent, nothing half loaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from distributions import install_broken, install_good
from safetensors.numpy import save_file

from infinilm.plugins import create_plugin_manager, trace_lineage
from infinilm_hookspecs import DecoderConfig, parameters

FILE = "model.safetensors"


def parameters_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what a llama stores."""
    decoder = trace_lineage(create_plugin_manager(autoload=False), config).configs[-1]
    assert isinstance(decoder, DecoderConfig)
    return {name: spec.shape for name, spec in parameters(decoder).items()}


class Environment:
    """A folder of distributions, and the command line run with it on the import path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        install_good(folder, "apple", "apple")
        install_good(folder, "zebra", "zebra")
        self.said = install_broken(folder)

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder), **variables}
        command = [sys.executable, "-m", "infinilm", *words]
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)

    def model(self, model_type: str) -> str:
        folder = self.folder / f"model_{model_type}"
        folder.mkdir(exist_ok=True)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        config = {"model_type": model_type, "vocab_size": 8, **sizes}
        (folder / "config.json").write_text(json.dumps(config))
        canonical = parameters_of({**config, "model_type": "llama"})
        save_file({name: numpy.zeros(shape, numpy.float32) for name, shape in canonical.items()}, folder / FILE)
        return str(folder)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


def test_list_shows_each_with_its_reason(environment: Environment) -> None:
    done = environment.run("plugins", "list", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    keys = {"name", "status", "origin", "distribution", "version", "hooks", "model_types", "import_ms"}
    keys |= {"error", "library"}
    assert all(row.keys() == keys for row in rows.values())
    for name, what in environment.said.items():
        assert rows[name]["status"] == "failed", name
        assert what in rows[name]["error"], rows[name]["error"]
        assert rows[name]["hooks"] == []
        assert done.stderr.count(f"infinilm: plugin '{name}' (") == 1, "reported once"
    assert "imported all the same" not in done.stderr
    for name in ("apple", "zebra", "sleeper"):
        assert rows[name]["status"] == "active"
        assert rows[name]["model_types"] == ["sleepy" if name == "sleeper" else name]
    assert rows["sleeper"]["import_ms"] > 9_000
    assert re.search(r"plugin 'sleeper' \(sleeper-dist 1\.0\) took \d\d\.\d s to import", done.stderr)


def test_good_ones_work_and_a_model_that_needs_a_failed_one_says_so(environment: Environment) -> None:
    done = environment.run("-p", "no:sleeper", "inspect", environment.model("zebra"))
    assert done.returncode == 0, done.stdout
    done = environment.run("-p", "no:sleeper", "inspect", environment.model("half"))
    assert done.returncode == 2
    assert "no plugin adapts model_type 'half'" in done.stdout
    assert "discovered plugins failed to load:" in done.stdout
    assert "'half' (half-dist 1.0)" in done.stdout
    assert "run 'infinilm plugins list'" in done.stdout


@pytest.mark.parametrize("name", ["missing_import", "raises", "half", "too_new", "twins"])
def test_asking_for_a_failed_one_is_fatal(environment: Environment, name: str) -> None:
    done = environment.run("-p", name, "-p", "no:sleeper", "plugins", "list")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("infinilm: error:")]
    assert len(errors) == 1
    assert environment.said[name] in errors[0]
    assert "Traceback" not in done.stderr


def test_debug_shows_the_original_traceback(environment: Environment) -> None:
    done = environment.run("--debug", "-p", "raises", "-p", "no:sleeper", "plugins", "list")
    assert done.returncode == 2
    assert "raises_module.py" in done.stderr
    assert "RuntimeError: no licence" in done.stderr
    assert "The above exception was the direct cause" in done.stderr


def test_environment_names_what_is_discovered(environment: Environment) -> None:
    extra = environment.folder / "extra.py"
    extra.write_text((environment.folder / "zebra_module.py").read_text().replace("zebra", "extra"))
    done = environment.run("plugins", "list", "--json", INFINILM_PLUGINS=f"apple, {extra}")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: (row["status"], row["origin"]) for row in json.loads(done.stdout)}
    assert rows["apple"] == ("active", "named")
    assert rows["extra.py"] == ("active", "named")
    assert rows["zebra"][0] == rows["missing_import"][0] == "filtered"
    assert done.stderr.count("INFINILM_PLUGINS keeps these plugins from being loaded:") == 1
    done = environment.run("plugins", "list", "--json", INFINILM_PLUGINS="")
    assert {row["status"] for row in json.loads(done.stdout) if row["origin"] == "entry point"} == {"filtered"}
    done = environment.run("plugins", "list", INFINILM_PLUGINS="missing_import")
    assert done.returncode == 2
    done = environment.run("plugins", "list", INFINILM_PLUGINS="aple")
    assert done.returncode == 2
    assert "there is no plugin 'aple'" in done.stderr
    assert "did you mean 'apple'?" in done.stderr


def test_autoload_can_be_switched_off_and_a_name_still_loads(environment: Environment) -> None:
    done = environment.run("-p", "zebra", "plugins", "list", "--json", INFINILM_DISABLE_PLUGIN_AUTOLOAD="1")
    rows = {row["name"]: row["status"] for row in json.loads(done.stdout)}
    assert (rows["zebra"], rows["apple"]) == ("active", "filtered")
    done = environment.run("plugins", "list", INFINILM_DISABLE_PLUGIN_AUTOLOAD="yes")
    assert done.returncode == 2
    assert "INFINILM_DISABLE_PLUGIN_AUTOLOAD is 'yes'; it takes 0 or 1" in done.stderr


def test_trace_prints_who_was_asked_and_who_answered(environment: Environment) -> None:
    done = environment.run("inspect", environment.model("zebra"), INFINILM_TRACE_PLUGINS="1", INFINILM_PLUGINS="zebra")
    lines = [line for line in done.stderr.splitlines() if line.startswith("infinilm: adapt_config")]
    assert len(lines) == 2
    assert "adapt_config(config=<zebra>): asked zebra; answered zebra; " in lines[0]
    assert "adapt_config(config=<llama>): asked zebra, " in lines[1]
    assert "; answered llama; " in lines[1]
