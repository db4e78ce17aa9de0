"""`infinilm inspect`: walk the whole pipeline up to the load plan, from headers alone, and say who did what.

Exits with 2 when the model would not load.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from infinilm import pipeline
from infinilm.cli.errors import describe, is_users
from infinilm.cli.options import ModelOptions, add_model_arguments, positive_integer
from infinilm.loading.messages import group_messages
from infinilm.loading.plan import LoadPlan, PlannedParameter
from infinilm.plugins import create_plugin_manager, trace_lineage
from infinilm.plugins.lineage import model_type_of
from infinilm_hookspecs import DecoderConfig, PlanError, Quantization


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--tensor-parallel-size", type=positive_integer, default=1, metavar="N", help="plan the load of N ranks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Any) -> int:
    """Print the report. Raises what the stage raised that it ends with, and `PlanError` where the plan has errors."""
    report = new_report(arguments.model)
    failure: Exception | None = None
    try:
        with ExitStack() as stack:
            plan = _walk(report, arguments.model, arguments.plugins, ModelOptions.of(arguments), stack)
            if not plan.errors:
                _plan_ranks(report, plan, arguments.tensor_parallel_size)
    except Exception as err:
        if not is_users(err):
            raise
        report["errors"].append(describe(err))
        failure = err
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else render(report))
    if failure is not None:
        raise failure
    if report["errors"]:
        count = len(report["errors"])
        problems = "1 problem" if count == 1 else f"{count} problems"
        raise PlanError(f"{arguments.model!r} would not load: {problems}, listed above")
    return 0


def new_report(model: str) -> dict[str, Any]:
    """Return the report before anything is known: every stage up to the first that fails fills in its part."""
    return {
        "model": model,
        "platform": None,
        "checkpoint": None,
        "lineage": [],
        "backend": None,
        "plan": None,
        "ranks": [],
        "processor": None,
        "errors": [],
    }


def _plan_ranks(report: dict[str, Any], plan: LoadPlan, world_size: int) -> None:
    from infinilm.loading.ranks import find_indivisible, report_rank

    report["errors"] += group_messages(find_indivisible(plan, world_size))
    if not report["errors"]:
        ranks = [report_rank(plan, rank, world_size) for rank in range(world_size)]
        report["ranks"] = [asdict(rank) | {"read_amplification": rank.amplification} for rank in ranks]


def _walk(
    report: dict[str, Any], model: str, plugins: Iterable[object], options: ModelOptions, stack: ExitStack
) -> LoadPlan:
    pm = create_plugin_manager(plugins=plugins)
    platform = pipeline.select_platform(pm, options.platform)
    report["platform"] = {"name": platform.value.name, "plugin": platform.plugin}
    opened = pipeline.open_checkpoint(pm, model, options.revision)
    checkpoint = stack.enter_context(closing(opened.value))
    report["checkpoint"] = {
        "name": type(checkpoint).__name__,
        "plugin": opened.plugin,
        "num_tensors": len(checkpoint.tensors),
    }
    lineage = trace_lineage(pm, checkpoint.config, trust_remote_code=options.trust_remote_code)
    report["lineage"] = [
        {"model_type": config.model_type, "plugin": plugin, "is_decoder": True}
        if isinstance(config, DecoderConfig)
        else {"model_type": model_type_of(config), "plugin": plugin, "is_decoder": False}
        for config, plugin in zip(lineage.configs, (None, *lineage.plugins), strict=True)
    ]
    request = pipeline.make_request(
        lineage,
        checkpoint,
        platform.value,
        device=options.device,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=1,
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
    )
    choice = pipeline.choose_backend(pm, request, options.backend)
    declined = [{"name": decline.name, "reason": decline.reason} for decline in choice.declined]
    report["backend"] = {
        "name": choice.backend.name,
        "plugin": choice.plugin,
        "device": request.device,
        "dtype": request.dtype,
        "declined": declined,
    }
    plan = pipeline.make_plan(pm, checkpoint, lineage, choice)
    report["plan"] = _describe_plan(plan, opened.plugin)
    if checkpoint.quantization is not None:
        report["plan"]["quantization"] = _describe_quantization(plan, checkpoint.quantization)
    report["errors"] += group_messages(plan.errors)
    if plan.errors and pm.failures():
        report["errors"].append(pm.failures().strip())
    processor = pipeline.select_processor(pm, lineage, checkpoint, options.tokenizer)
    if processor is not None:
        report["processor"] = {"name": type(processor.value).__name__, "plugin": processor.plugin}
    return plan


def _describe_plan(plan: LoadPlan, checkpoint_plugin: str) -> dict[str, Any]:
    return {
        "num_tensors": len(plan.parameters),
        "num_bytes": plan.num_bytes,
        "parameters": [_describe_parameter(parameter, checkpoint_plugin) for parameter in plan.parameters],
        "dropped": [{"name": name, "plugin": plugin} for name, plugin in plan.dropped.items()],
    }


def _describe_quantization(plan: LoadPlan, quantization: Quantization) -> dict[str, Any]:
    """Return how many of the weights a checkpoint keeps quantized stay as they are stored."""
    kept = {name for name, _, role in (p.name.partition(":") for p in plan.parameters) if role}
    return {"scheme": quantization.scheme, "kept": len(kept), "others": len(quantization.groups) - len(kept)}


def _describe_parameter(parameter: PlannedParameter, checkpoint_plugin: str) -> dict[str, Any]:
    weight = parameter.weight
    return {
        "name": parameter.name,
        "shape": list(parameter.spec.shape),
        "dtype": parameter.spec.dtype,
        "sources": list(weight.stored_names()),
        "plugin": weight.trail[-1] if weight.trail else checkpoint_plugin,
        "lossy": list(parameter.losses()),
    }


def render(report: dict[str, Any]) -> str:
    """Return the report for a terminal, layers that differ in their number alone on one line."""
    lines = [f"model       {report['model']}"]
    for stage in ("platform", "checkpoint", "lineage", "backend", "processor", "plan", "ranks"):
        lines += _RENDERERS[stage](report[stage]) if report[stage] else []
    if report["errors"]:
        lines += ["", "would not load:", *(f"  {error}" for error in report["errors"])]
    return "\n".join(lines)


def _render_answer(stage: str, found: dict[str, Any]) -> str:
    return f"{stage:<11} {found['name']} [plugin {found['plugin']}]"


def _render_checkpoint(found: dict[str, Any]) -> list[str]:
    return [f"{_render_answer('checkpoint', found)}, {found['num_tensors']} tensors"]


def _render_lineage(steps: list[dict[str, Any]]) -> list[str]:
    names = [
        (f"[plugin {step['plugin']}] " if step["plugin"] else "")
        + ("DecoderConfig" if step["is_decoder"] else step["model_type"])
        for step in steps
    ]
    return [f"{'lineage':<11} {' -> '.join(names)}"]


def _render_backend(found: dict[str, Any]) -> list[str]:
    declined = [f"{'':<11} {decline['name']} declined: {decline['reason']}" for decline in found["declined"]]
    return [f"{_render_answer('backend', found)}, {found['dtype']} on {found['device']}", *declined]


def _render_plan(plan: dict[str, Any]) -> list[str]:
    rows = [
        f"  {p['name']} {p['shape']} {p['dtype']} <- {', '.join(p['sources'])} [plugin {p['plugin']}]"
        + (f" lossy: {', '.join(p['lossy'])}" if p["lossy"] else "")
        for p in plan["parameters"]
    ]
    dropped = [f"  dropped {d['name']} [plugin {d['plugin']}]" for d in plan["dropped"]]
    total = f"{'plan':<11} {plan['num_tensors']} parameters, {plan['num_bytes'] / 1e6:.1f} MB"
    if "quantization" in plan:
        stored = plan["quantization"]
        total += f"; {stored['kept']} weights stay {stored['scheme']}, {stored['others']} are dequantized"
    return [total, *group_messages(rows), *group_messages(dropped)]


def _render_ranks(ranks: list[dict[str, Any]]) -> list[str]:
    return [
        f"{'load' if rank['rank'] == 0 else '':<11} rank {rank['rank']} keeps {rank['num_bytes'] / 1e6:.1f} MB, reads "
        f"{rank['read_bytes'] / 1e6:.1f} MB ({rank['read_amplification']:.2f} times what it needs), "
        f"peak at most {rank['peak_bytes'] / 1e6:.1f} MB"
        for rank in ranks
    ]


_RENDERERS: dict[str, Callable[[Any], list[str]]] = {
    "platform": lambda found: [_render_answer("platform", found)],
    "checkpoint": _render_checkpoint,
    "lineage": _render_lineage,
    "backend": _render_backend,
    "processor": lambda found: [_render_answer("processor", found)],
    "plan": _render_plan,
    "ranks": _render_ranks,
}
