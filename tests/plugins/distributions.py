"""Distributions on disk, as pip leaves them: modules and metadata in a folder that goes on the import path."""

from __future__ import annotations

from pathlib import Path

GOOD = """
from infinilm_hookspecs import hookimpl

model_types = ("{model_type}",)

@hookimpl
def adapt_config(config):
    if config["model_type"] == "{model_type}":
        return {{**config, "model_type": "llama"}}
"""


def install(
    folder: Path,
    name: str,
    entry_points: str,
    *,
    version: str = "1.0",
    requires: str | None = None,
    modules: dict[str, str] | None = None,
) -> None:
    """Put a distribution into `folder`: its metadata, and its modules by name."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requires}"] if requires else []
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "entry_points.txt").write_text(f"[infinilm]\n{entry_points}\n")
    for module, source in (modules or {}).items():
        (folder / f"{module}.py").write_text(source)


def install_good(folder: Path, name: str, model_type: str) -> None:
    """Put in a distribution whose plugin, called `name`, makes models of `model_type` llamas."""
    install(
        folder,
        f"{name}-dist",
        f"{name} = {name}_module",
        modules={f"{name}_module": GOOD.format(model_type=model_type)},
    )


def install_broken(folder: Path) -> dict[str, str]:
    """Put in ten distributions that are broken, each in its own way; return what is to be said of each plugin."""
    spec = "from infinilm.plugins import register_model\n"
    broken: dict[str, tuple[str, str, str | None]] = {
        # plugin: (source of its module, what is said, Requires-Dist)
        "missing_import": ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'", None),
        "misspelt": (
            "from infinilm_hookspecs import hookimpl\n@hookimpl\ndef adapt_confg(config): ...",
            "implements 'adapt_confg', which is no hook, did you mean 'adapt_config'?",
            None,
        ),
        "no_hook": ("def adapt_config(config): ...", "has no hook; adapt_config lacks the @hookimpl", None),
        "foreign": (
            "import pluggy\n@pluggy.HookimplMarker('pytest')\ndef adapt_config(config): ...",
            "has no hook; adapt_config lacks the @hookimpl of infinilm_hookspecs",
            None,
        ),
        "too_new": ("raise SystemError('imported all the same')", "it requires infinilm>=99", "infinilm>=99"),
        "taken_type": (GOOD.format(model_type="apple"), "model_type 'apple' belongs to plugin 'apple'", None),
        "raises": (spec + "def register(): raise RuntimeError('no licence')", "RuntimeError: no licence", None),
        "half": (
            spec + "def register():\n    register_model(model_type='half', backend_model_type='llama')\n    1 / 0",
            "ZeroDivisionError: division by zero",
            None,
        ),
    }
    for name, (source, _, requires) in broken.items():
        target = f"{name}_module:register" if name in ("raises", "half") else f"{name}_module"
        install(folder, f"{name}-dist", f"{name} = {target}", requires=requires, modules={f"{name}_module": source})
    for owner in ("twin-a", "twin-b"):
        install(folder, owner, "twins = apple_module")
    sleeper = "import time; time.sleep(10)\n" + GOOD.format(model_type="sleepy")
    install(folder, "sleeper-dist", "sleeper = sleeper_module", modules={"sleeper_module": sleeper})
    said = {name: what for name, (_, what, _) in broken.items()}
    return said | {"twins": "twin-a 1.0 and twin-b 1.0 both have an entry point 'twins'"}
