"""The command line: options anywhere, one clear line for every mistake, and what `inspect` and `generate` print."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_made import CONFIG, llama_tensors, safetensors_bytes, write_folder, write_llama

from infinilm.backends.torch.backend import TorchBackend
from infinilm.checkpoints.safetensors import SafetensorsCheckpoint
from infinilm.cli import main, plugins
from infinilm.native.backend import NativeBackend

ERROR = re.compile(r"\Ainfinilm( [a-z]+)?: error: [^\n]+\n\Z")
HOOKS = "from infinilm_hookspecs import DROP, hookimpl\n\n"
DEFAULT_BACKEND = "cpu" if "avx2" in Path("/proc/cpuinfo").read_text() else "torch"
PASSING = HOOKS + "@hookimpl\ndef select_processor(lineage, checkpoint):\n    return None\n"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr, without its newline."""
        assert ERROR.match(self.err), self.err
        return self.err.rstrip("\n")


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def running(*argv: object) -> Ran:
        try:
            code = main([str(word) for word in argv])
        except SystemExit as err:
            code = int(err.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return running


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama", tokenizer=True)


def write_plugin(folder: Path, code: str, name: str = "acme.py") -> Path:
    path = folder / name
    path.write_text(code)
    return path


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("position", ["before", "between", "after"])
def test_plugins_are_named_before_or_after_the_command(tmp_path: Path, run: Run, position: str) -> None:
    path = write_plugin(tmp_path, PASSING)
    spellings: dict[str, list[object]] = {
        "before": ["-p", path, "plugins", "list", "--json"],
        "between": ["plugins", "-p", path, "list", "--json"],
        "after": ["plugins", "list", "--json", "-p", path],
    }
    ran = run(*spellings[position])
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)[-1]["name"] == "acme.py"


@pytest.mark.parametrize(
    ("words", "status"),
    [(["no:llama"], "blocked"), (["no:llama", "llama"], "active"), (["llama", "no:llama"], "blocked")],
)
def test_last_word_on_a_plugin_wins_wherever_it_stands(run: Run, words: list[str], status: str) -> None:
    ran = run("-p", words[0], "plugins", "list", "--json", *(w for word in words[1:] for w in ("-p", word)))
    assert {row["name"]: row["status"] for row in json.loads(ran.out)}["llama"] == status


def test_blocked_plugin_is_not_asked(llama: Path, run: Run) -> None:
    assert run("inspect", llama).code == 0
    ran = run("inspect", llama, "-p", "no:llama", "-p", "no:transformers")
    assert ran.code == 2
    assert "no plugin adapts model_type 'llama'" in ran.error


def test_what_follows_two_dashes_is_no_option(run: Run) -> None:
    ran = run("inspect", "--", "-p")
    assert ran.code == 2
    assert "'-p' does not exist" in ran.error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "m", "--jsn"], "infinilm inspect: error: unknown option '--jsn', did you mean '--json'?; see"),
        (["generate", "m", "--promt", "x"], "error: unknown option '--promt', did you mean '--prompt'?; see"),
        (["generate", "m", "--promt=x"], "error: unknown option '--promt', did you mean '--prompt'?; see"),
        (["generate", "m", "--zzz"], "infinilm generate: error: unknown option '--zzz'; see infinilm generate --help"),
        (["plugins", "list", "--jason"], "error: unknown option '--jason', did you mean '--json'?; see"),
        (["--jsn", "inspect", "m"], "infinilm: error: unknown option '--jsn', did you mean"),
        (["inspct", "m"], "infinilm: error: unknown command 'inspct', did you mean 'inspect'?; commands: generate, "),
        (
            ["zzz"],
            "unknown command 'zzz'; commands: generate, chat, serve, bench, inspect, export, plugins; see infinilm",
        ),
        ([], "infinilm: error: the following arguments are required: COMMAND; see infinilm --help"),
        (["inspect"], "infinilm inspect: error: the following arguments are required: MODEL; see infinilm inspect"),
        (["plugins"], "infinilm plugins: error: the following arguments are required: ACTION; see infinilm plugins"),
        (["generate", "m"], "infinilm generate: error: the following arguments are required: --prompt; see"),
        (["inspect", "m", "n"], "infinilm: error: unrecognized arguments: n; see infinilm --help"),
        (["inspect", "m", "-x"], "infinilm inspect: error: unknown option '-x'; see infinilm inspect --help"),
        (["generate", "m", "--prompt", "x", "--max-tokens", "many"], "--max-tokens: invalid int value: 'many'; see"),
        (["plugins", "list", "-p"], "infinilm: error: -p '' names no plugin"),
        (["plugins", "list", "-p", "lama"], "infinilm: error: there is no plugin 'lama'"),
        (["plugins", "list", "-p", "no:lama"], "infinilm: error: -p no:lama blocks no plugin, did you mean 'llama'?"),
        (["plugins", "list", "-p", "Hello, world"], "(the prompt of a generation is --prompt)"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(run: Run, argv: list[str], message: str) -> None:
    ran = run(*argv)
    assert ran.code == 2
    assert message in ran.error
    assert ran.out == ""


def test_help_names_what_every_command_takes(run: Run) -> None:
    ran = run("--help")
    assert (ran.code, ran.err) == (0, "")
    for word in ("generate", "inspect", "plugins", "-p NAME", "-p no:NAME", "--debug", "2 usage error"):
        assert word in ran.out
    assert run("--version").out.startswith("infinilm 0.")


# ---------------------------------------------------------------- models that cannot be opened


def truncated(folder: Path) -> None:
    path = write_llama(folder) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def with_config(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (write_llama(folder) / "config.json").write_text(content)

    return write


def without_weights(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))


def lying(folder: Path) -> None:
    (write_llama(folder) / "model.safetensors").write_bytes(safetensors_bytes(b"{}", length=2**63))


MODELS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: None, "{folder!r} does not exist"),
    "an empty folder": (lambda folder: folder.mkdir(), "no plugin opens {folder!r}: the folder is empty"),
    "a file": (lambda folder: folder.write_text(""), "no plugin opens {folder!r}: it is no folder"),
    "no weights": (without_weights, "no plugin opens {folder!r}: it holds config.json; formats known: "),
    "no config": (lambda folder: (write_llama(folder) / "config.json").unlink(), "{folder!r} has no config.json"),
    "a list": (with_config("[1]"), "'{folder}/config.json' holds a JSON list, and an object is wanted"),
    "not JSON": (with_config("{"), "'{folder}/config.json' cannot be read as JSON: Expecting property name"),
    "nested": (with_config('{"a":' * 10_000 + "1" + "}" * 10_000), "'{folder}/config.json' is nested too deeply"),
    "no model_type": (
        with_config("{}"),
        "has the model_type None; a name such as 'llama' is wanted, by which plugins know the model",
    ),
    "an unknown model_type": (
        with_config('{"model_type": "zzz9"}'),
        "no plugin adapts model_type 'zzz9' (in '{folder}/config.json'); known: ",
    ),
    "a misspelt model_type": (
        with_config('{"model_type": "lama"}'),
        "no plugin adapts model_type 'lama' (in '{folder}/config.json'), did you mean 'llama'?; known: ",
    ),
    "a size that is text": (with_config('{"model_type": "llama", "hidden_size": "16"}'), "hidden_size is '16', and"),
    "truncated": (truncated, "'{folder}/model.safetensors' is not a sound safetensors file: its tensors end at byte"),
    "lying": (lying, "'{folder}/model.safetensors' is not a sound safetensors file: its header claims"),
}


@pytest.mark.parametrize("command", ["generate", "inspect", "inspect --json"])
@pytest.mark.parametrize("kind", MODELS)
def test_model_that_cannot_be_opened_is_one_line(tmp_path: Path, run: Run, command: str, kind: str) -> None:
    folder = tmp_path / "model"
    make, message = MODELS[kind]
    make(folder)
    name, *options = command.split()
    ran = run(name, folder, *options, *(["--prompt", "x"] if name == "generate" else []))
    message = message.replace("{folder!r}", repr(str(folder))).replace("{folder}", str(folder))
    assert ran.code == 2
    assert message in ran.error
    if options:
        assert message in json.loads(ran.out)["errors"][0]


def test_known_model_types_are_listed(tmp_path: Path, run: Run) -> None:
    folder = write_llama(tmp_path / "m", config={"model_type": "qwen9"})
    known = run("inspect", folder).error.partition("known: ")[2]
    assert "llama" in known.rstrip(".").split(", ")


def test_name_far_too_long_for_a_file_is_one_line(run: Run) -> None:
    """Somebody gave the prompt where the model belongs."""
    ran = run("generate", "Why is the sky blue? " * 500, "--prompt", "x")
    assert ran.code == 2
    assert ran.error.startswith("infinilm: error: ")


# ---------------------------------------------------------------- plugins that go wrong

IMPORTED: Mapping[str, tuple[str, str]] = {
    "missing import": (
        "import a_module_that_is_not_there",
        "cannot be loaded: ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
    ),
    "syntax error": ("def", "cannot be loaded: SyntaxError: invalid syntax"),
    "raises": ("raise RuntimeError('line one\\n  line two')", "cannot be loaded: RuntimeError: line one; line two"),
    "exits": ("import sys\n\nsys.exit(3)\n", "/acme.py', line 3, ended the process with SystemExit(3): "),
    "no hooks": ("x = 1", "plugin 'acme.py' has no hook"),
    "empty": ("", "plugin 'acme.py' has no hook"),
    "undecorated": (
        "def adapt_config(config):\n    return None\n",
        "plugin 'acme.py' has no hook; adapt_config lacks the @hookimpl of infinilm_hookspecs",
    ),
    "misspelt hook": (
        HOOKS + "@hookimpl\ndef adapt_confg(config):\n    return None\n",
        "plugin 'acme.py' implements 'adapt_confg', which is no hook, did you mean 'adapt_config'?",
    ),
    "unknown argument": (
        HOOKS + "@hookimpl\ndef adapt_config(confg):\n    return None\n",
        "plugin 'acme.py' is refused: ",
    ),
}

IN_A_HOOK: Mapping[str, tuple[str, str]] = {
    "adapt_config raises": (
        "@hookimpl\ndef adapt_config(config):\n    return {**config, 'heads': config['num_heads']}\n",
        "KeyError: 'num_heads' (in plugin 'acme.py', hook adapt_config)",
    ),
    "adapt_config refuses": (
        "from infinilm_hookspecs import ConfigError\n\n"
        "@hookimpl\ndef adapt_config(config):\n    raise ConfigError('no such heads')\n",
        "error: no such heads (in plugin 'acme.py', hook adapt_config)",
    ),
    "adapt_config returns text": (
        "@hookimpl\ndef adapt_config(config):\n    return 'llama'\n",
        "plugin 'acme.py' answered adapt_config with 'llama', and a config or a DecoderConfig is wanted",
    ),
    "open_checkpoint returns a path": (
        "@hookimpl\ndef open_checkpoint(source):\n    return source\n",
        "plugin 'acme.py' answered open_checkpoint with '",
    ),
    "provide_platform raises": (
        "@hookimpl\ndef provide_platform():\n    raise OSError('driver')\n",
        "OSError: driver (in plugin 'acme.py', hook provide_platform)",
    ),
    "provide_platform returns a number": (
        "@hookimpl\ndef provide_platform():\n    return 5\n",
        "plugin 'acme.py' answered provide_platform with 5, and ",
    ),
    "provide_backend returns a dict": (
        "@hookimpl\ndef provide_backend(request):\n    return {}\n",
        "plugin 'acme.py' answered provide_backend with {}, and ",
    ),
    "remap_weight returns text": (
        "@hookimpl\ndef remap_weight(config):\n    return 'x'\n",
        "plugin 'acme.py' answered remap_weight with 'x', and a function of one Weight or a table is wanted",
    ),
    "rule raises": (
        "@hookimpl\ndef remap_weight(config):\n    return lambda weight: 1 / 0\n",
        "ZeroDivisionError: division by zero (in the weight rule of plugin 'acme.py', for Weight('",
    ),
    "table is malformed": (
        "@hookimpl\ndef remap_weight(config):\n    return {'h.{layer': DROP}\n",
        "key 'h.{layer' of a weight table: expected '}' before end of string (in the weight rule of plugin 'acme.py')",
    ),
    "select_processor returns a dict": (
        "@hookimpl\ndef select_processor(lineage, checkpoint):\n    return {'a': 1}\n",
        "plugin 'acme.py' answered select_processor with {'a': 1}, and ",
    ),
    "adapt_config exits": (
        "@hookimpl\ndef adapt_config(config):\n    raise SystemExit('no such heads')\n",
        "/acme.py', line 5, ended the process with SystemExit('no such heads'): ",
    ),
    "message of several lines": (
        "@hookimpl\ndef adapt_config(config):\n    raise ValueError('one:\\n  two\\n\\nthree')\n",
        "ValueError: one: two; three (in plugin 'acme.py', hook adapt_config)",
    ),
}


def check_plugin_error(run: Run, argv: list[object], message: str, name: str) -> None:
    """Hold the error line, and that the traceback appears with --debug and only then."""
    ran = run(*argv)
    assert ran.code == 2
    assert message in ran.error
    debugged = run(*argv, "--debug")
    assert debugged.code == 2
    assert debugged.err.startswith("Traceback (most recent call last):\n")
    assert debugged.err.endswith(ran.err)
    assert run("--debug", *argv).err == debugged.err, name


@pytest.mark.parametrize("kind", IMPORTED)
def test_plugin_that_cannot_be_loaded_is_one_line(tmp_path: Path, llama: Path, run: Run, kind: str) -> None:
    code, message = IMPORTED[kind]
    path = write_plugin(tmp_path, code)
    for command in (["plugins", "list"], ["generate", llama, "--prompt", "x"], ["inspect", llama]):
        check_plugin_error(run, ["-p", path, *command], message, kind)


@pytest.mark.parametrize("kind", IN_A_HOOK)
def test_plugin_that_goes_wrong_in_a_hook_is_one_line(tmp_path: Path, llama: Path, run: Run, kind: str) -> None:
    code, message = IN_A_HOOK[kind]
    path = write_plugin(tmp_path, HOOKS + code)
    for command in (["generate", llama, "--prompt", "x"], ["inspect", llama], ["inspect", llama, "--json"]):
        check_plugin_error(run, [*command, "-p", path], message, kind)


def test_plugin_that_is_a_class_or_not_there_is_one_line(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "class Acme:\n    @hookimpl\n    def adapt_config(self, config):\n        return None\n"
    write_plugin(tmp_path, HOOKS + code, "acme_plugin.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    assert "is the class Acme; register an instance" in run("plugins", "list", "-p", "acme_plugin:Acme").error
    assert "AttributeError" in run("plugins", "list", "-p", "acme_plugin:Acne").error
    missing = tmp_path / "none.py"
    assert f"plugin file {str(missing)!r} does not exist" in run("plugins", "list", "-p", missing).error


def test_deferred_step_that_raises_names_its_plugin(tmp_path: Path, llama: Path, run: Run) -> None:
    rule = "lambda weight: weight.apply(lambda t: 1 / 0) if weight.name == 'model.norm.weight' else None"
    path = write_plugin(tmp_path, HOOKS + f"@hookimpl\ndef remap_weight(config):\n    return {rule}\n")
    assert run("inspect", llama, "-p", path).code == 0
    argv: list[object] = ["generate", llama, "--prompt", "x", "-p", path]
    message = "division by zero (while loading model.norm.weight from model.norm.weight [plugin acme.py])"
    check_plugin_error(run, argv, message, "deferred")


def test_bug_of_our_own_says_so_and_is_no_usage_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: Any) -> int:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(plugins, "run", broken)
    ran = run("plugins", "list")
    assert ran.code == 1
    assert ran.error == "infinilm: error: ZeroDivisionError: oops; this is a bug of infinilm: --debug shows where"


def test_ctrl_c_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(plugins, "run", interrupted)
    assert run("plugins", "list") == Ran(130, "", "")


# ---------------------------------------------------------------- inspect


def test_inspect_prints_what_the_issue_asks_for(llama: Path, run: Run) -> None:
    ran = run("inspect", llama, "--json")
    assert (ran.code, ran.err) == (0, "")
    report = json.loads(ran.out)
    assert report["errors"] == []
    assert [step["model_type"] for step in report["lineage"]] == ["llama", "llama"]
    assert report["processor"]["plugin"] == "huggingface"
    assert report["backend"]["name"] == DEFAULT_BACKEND
    assert all(decline.keys() == {"name", "reason"} for decline in report["backend"]["declined"])
    tensors = llama_tensors()
    plan = report["plan"]
    assert plan["num_tensors"] == len(tensors)
    assert plan["num_bytes"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    parameters = {parameter["name"]: parameter for parameter in plan["parameters"]}
    assert parameters.keys() == tensors.keys()
    assert parameters["model.norm.weight"] == {
        "name": "model.norm.weight",
        "shape": [16],
        "dtype": "float32",
        "sources": ["model.norm.weight"],
        "plugin": "safetensors",
        "lossy": [],
    }


@pytest.mark.parametrize(("name", "kind"), [("cpu", NativeBackend), ("torch", TorchBackend)])
def test_inspect_reads_no_tensor_and_asks_for_no_buffer(
    llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch, name: str, kind: type
) -> None:
    def forbidden(*arguments: object) -> None:
        raise AssertionError("headers only")

    monkeypatch.setattr(SafetensorsCheckpoint, "read", forbidden)
    monkeypatch.setattr(kind, "destination", forbidden)
    monkeypatch.setattr(kind, "allocate_cache", forbidden)
    assert run("inspect", llama, "--backend", name, "--json").code == 0
    assert run("inspect", llama, "--backend", name).code == 0
    assert "headers only" in run("generate", llama, "--backend", name, "--prompt", "x").error


def test_inspect_folds_layers_and_names_who_did_what(llama: Path, run: Run) -> None:
    ran = run("inspect", llama)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == f"model       {llama}"
    assert "lineage     llama -> [plugin llama] DecoderConfig" in lines
    assert "checkpoint  SafetensorsCheckpoint [plugin safetensors], 21 tensors" in lines
    assert [line for line in lines if "k_proj" in line] == [
        "  model.layers.{0-1}.self_attn.k_proj.weight [8, 16] float32 <- "
        "model.layers.{0-1}.self_attn.k_proj.weight [plugin safetensors]"
    ]


def test_inspect_of_a_plugin_shows_its_part(tmp_path: Path, llama: Path, run: Run) -> None:
    rule = "{'model.layers.{i}.mlp.up_proj.weight': lambda w, i: w.to('bfloat16').to('float32'), 'rotary.{i}': DROP}"
    path = write_plugin(tmp_path, HOOKS + f"@hookimpl\ndef remap_weight(config):\n    return {rule}\n")
    write_folder(llama, {**llama_tensors(), "rotary.0": torch.ones(2), "rotary.1": torch.ones(2)})
    report = json.loads(run("inspect", llama, "--json", "-p", path).out)
    (up,) = [p for p in report["plan"]["parameters"] if p["name"] == "model.layers.1.mlp.up_proj.weight"]
    assert (up["plugin"], up["lossy"]) == ("acme.py", ["float32 to bfloat16"])
    assert report["plan"]["dropped"] == [{"name": f"rotary.{i}", "plugin": "acme.py"} for i in range(2)]
    text = run("inspect", llama, "-p", path).out
    assert "  dropped rotary.{0-1} [plugin acme.py]" in text.splitlines()
    assert "[plugin acme.py] lossy: float32 to bfloat16" in text


def test_inspect_tells_every_misfit_and_exits_with_2(tmp_path: Path, run: Run) -> None:
    tensors = llama_tensors()
    tensors["model.norm.weight"] = torch.ones(15)
    for layer in range(2):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        tensors[f"model.layers.{layer}.extra"] = torch.ones(3)
    folder = write_folder(tmp_path / "m", tensors)
    expected = [
        "model.norm.weight is [15] from model.norm.weight, and the model needs [16]",
        "model.layers.{0-1}.mlp.up_proj.weight is missing",
        "model.layers.{0-1}.extra [3] is no parameter of this model; rename it in a weight rule, or return DROP for it",
    ]
    ran = run("inspect", folder, "--json")
    assert ran.code == 2
    assert json.loads(ran.out)["errors"] == expected
    assert ran.error == f"infinilm: error: {str(folder)!r} would not load: 3 problems, listed above"
    ran = run("inspect", folder)
    assert ran.out.split("would not load:\n")[1].splitlines() == [f"  {line}" for line in expected]
    assert ran.error == f"infinilm: error: {str(folder)!r} would not load: 3 problems, listed above"


def test_generate_tells_every_misfit_too(tmp_path: Path, run: Run) -> None:
    tensors = llama_tensors()
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    ran = run("generate", write_folder(tmp_path / "m", tensors), "--prompt", "x")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "infinilm: error: the checkpoint does not fit the model, 2 problems:",
        "  model.norm.weight is missing",
        "  lm_head.weight is missing",
    ]


def test_inspect_reports_as_far_as_it_came(tmp_path: Path, run: Run) -> None:
    folder = write_llama(tmp_path / "m", config={"model_type": "qwen9"})
    ran = run("inspect", folder, "--json")
    report = json.loads(ran.out)
    assert report["checkpoint"]["num_tensors"] == 21
    assert [step["model_type"] for step in report["lineage"]] == ["qwen9"]
    assert report["backend"] is report["plan"] is report["processor"] is None
    assert len(report["errors"]) == 1


def test_backend_by_name_is_the_one_that_is_asked(llama: Path, run: Run) -> None:
    chosen = json.loads(run("inspect", llama, "--json").out)["backend"]
    assert (chosen["name"], chosen["plugin"]) == (DEFAULT_BACKEND, DEFAULT_BACKEND)
    for name in ("cpu", "torch", "transformers"):
        named = json.loads(run("inspect", llama, "--json", "--backend", name).out)["backend"]
        assert (named["name"], named["plugin"], named["declined"]) == (name, name, [])
    unknown = run("inspect", llama, "--backend", "tourch")
    assert unknown.code == 2
    assert "'tourch'" in unknown.error
    platform = run("inspect", llama, "--platform", "cuda")
    assert platform.code == 2
    assert "plugin 'cuda' provides no platform on this machine" in platform.error


def test_inspect_says_who_declined_and_why(tmp_path: Path, llama: Path, run: Run) -> None:
    code = "@hookimpl\ndef provide_backend(request):\n    return request.decline('this acme has no heads')\n"
    path = write_plugin(tmp_path, HOOKS + code)
    report = json.loads(run("inspect", llama, "--json", "-p", path).out)
    assert {"name": "acme.py", "reason": "this acme has no heads"} in report["backend"]["declined"]
    assert "acme.py declined: this acme has no heads" in run("inspect", llama, "-p", path).out


# ---------------------------------------------------------------- generate


def test_generate_prints_prompt_and_answer(llama: Path, run: Run) -> None:
    argv = ["generate", llama, "--prompt", "one plus two", "--prompt", "ten", "--max-tokens", "3", "--temperature", "0"]
    ran = run(*argv)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("one plus two")
    assert lines[1].startswith("ten")
    assert run(*argv).out == ran.out


def test_generate_as_json(llama: Path, run: Run) -> None:
    ran = run("generate", llama, "--prompt", "one plus two", "--max-tokens", "3", "--temperature", "0", "--json")
    assert (ran.code, ran.err) == (0, "")
    (row,) = json.loads(ran.out)
    assert row["prompt"] == "one plus two"
    assert len(row["prompt_token_ids"]) == 3
    assert len(row["token_ids"]) <= 3
    assert isinstance(row["text"], str)
    assert row["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "0"], "max_tokens=0 is not allowed"),
        (["--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["--temperature", "nan"], "temperature=nan is not allowed"),
        (["--prompt", "one " * 100], "64"),
    ],
)
def test_request_that_cannot_be_served_is_one_line(llama: Path, run: Run, options: list[str], message: str) -> None:
    ran = run("generate", llama, "--prompt", "one", *options)
    assert ran.code == 2
    assert message in ran.error


def test_text_without_a_tokenizer_is_one_line(tmp_path: Path, run: Run) -> None:
    ran = run("generate", write_llama(tmp_path / "m"), "--prompt", "one")
    assert ran.code == 2
    assert "a text prompt needs a tokenizer, and this model has none" in ran.error


# ---------------------------------------------------------------- a process of its own

COMMAND = [sys.executable, "-m", "infinilm"]


def test_module_runs_as_the_command_does_and_a_pipe_gets_no_progress_bar(llama: Path) -> None:
    argv = [*COMMAND, "generate", str(llama), "--prompt", "one", "--max-tokens", "2"]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert ran.stdout.startswith("one")
    assert ran.stderr == ""


def test_terminal_gets_a_progress_bar(llama: Path) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    argv = [*COMMAND, "generate", str(llama), "--prompt", "one", "--max-tokens", "2"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=follower) as process:
        os.close(follower)
        shown = b""
        try:
            while chunk := os.read(leader, 4096):
                shown += chunk
        except OSError:  # the terminal's other end is closed
            pass
        assert process.wait() == 0
    os.close(leader)
    assert b"loading" in shown
    assert b"generating" in shown


def test_error_and_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    argv = [*COMMAND, "inspect", str(tmp_path / "none")]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ERROR.match(ran.stderr)
    assert "Traceback" not in ran.stdout


def test_reader_that_has_seen_enough_is_no_error(llama: Path) -> None:
    argv = [*COMMAND, "inspect", str(llama), "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
