"""Which stored tensors of a quantized checkpoint belong together: from its config and the names, headers alone.

A block is a shape in the logical weight; -1 stands for all of a dimension. What a config says that is not understood
to the last word gives no `Quantization` at all: a backend then declines it by name, and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from infinilm_hookspecs import Config, Quantization, StoredTensor

_FP8: Final = ("float8_e4m3fn", "float8_e5m2")
_MXFP4_BLOCK: Final = 32  # OCP microscaling formats 1.0, section 5.2

Tensors = Mapping[str, StoredTensor]
Groups = dict[str, dict[str, str]]


def find_quantization(config: Config, tensors: Tensors) -> Quantization | None:
    """Return the layout that `quantization_config` describes, or `None` where there is none or it is not understood.

    A group lists what is stored, be it complete or not: what is missing is for the plan to say.
    """
    stated = config.get("quantization_config")
    if not isinstance(stated, Mapping):
        return None
    find = _METHODS.get(str(stated.get("quant_method")).lower())
    return None if find is None else find(stated, tensors)


def _fp8(stated: Config, tensors: Tensors) -> Quantization | None:
    """DeepSeek's layout, `weight` beside `weight_scale_inv`; without blocks there is one scale a tensor.

    https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md
    """
    if stated.get("expert_dtype", "fp8") != "fp8" or stated.get("activation_scheme", "dynamic") != "dynamic":
        return None
    block = stated.get("weight_block_size")
    if block is None:
        block = (-1, -1)
    elif not isinstance(block, list | tuple) or len(block) != 2 or not all(_is_count(size) for size in block):
        return None
    groups: Groups = {}
    for name, stored in tensors.items():
        if stored.dtype in _FP8:
            scales = [name + suffix for suffix in ("_scale_inv", "_scale") if name + suffix in tensors]
            groups[name] = {"weight": name, **({"scale": scales[0]} if scales else {})}
    return Quantization("fp8_block", tuple(block), groups)


def _mxfp4(stated: Config, tensors: Tensors) -> Quantization | None:
    """gpt-oss's layout: `*_blocks` and `*_scales` of stacked experts, which the model has transposed."""
    groups: Groups = {}
    for name in tensors:
        if name.endswith("_blocks"):
            logical = name.removesuffix("_blocks")
            groups[logical] = _present({"weight": name, "scale": f"{logical}_scales"}, tensors)
    return Quantization("mxfp4", (1, _MXFP4_BLOCK, 1), groups)


def _gptq(stated: Config, tensors: Tensors) -> Quantization | None:
    """AutoGPTQ's layout, and GPTQModel's second version of it, which stores zeros as they are."""
    scheme = stated.get("checkpoint_format") or stated.get("format") or "gptq"
    overrides = stated.get("dynamic") or {}  # by pattern of names; "-:" leaves what it fits unquantized
    if (
        scheme not in ("gptq", "gptq_v2")
        or stated.get("is_marlin_format")
        or stated.get("pack_dtype", "int32") != "int32"
        or not isinstance(overrides, Mapping)
        or not all(str(pattern).startswith("-:") for pattern in overrides)
    ):
        return None
    return _int4(scheme, stated, tensors)


def _awq(stated: Config, tensors: Tensors) -> Quantization | None:
    """AutoAWQ's layout for its GEMM kernel."""
    version = stated.get("version") or stated.get("format") or "gemm"
    if str(version).lower() != "gemm" or stated.get("zero_point", True) is not True:
        return None
    return _int4("awq", stated, tensors)


def _int4(scheme: str, stated: Config, tensors: Tensors) -> Quantization | None:
    bits, group_size = stated.get("bits", stated.get("w_bit")), stated.get("group_size", stated.get("q_group_size"))
    if type(bits) is not int or bits != 4 or not (_is_count(group_size) or group_size == -1):
        return None
    groups: Groups = {}
    for name in tensors:
        if name.endswith(".qweight"):
            base = name.removesuffix("qweight")
            roles = {"weight": name, "zero": f"{base}qzeros", "scale": f"{base}scales"}
            roles |= {} if scheme == "awq" else {"group": f"{base}g_idx"}
            groups[f"{base}weight"] = _present(roles, tensors)
    return Quantization(scheme, (1, int(group_size)), groups)


def _present(roles: Mapping[str, str], tensors: Tensors) -> dict[str, str]:
    return {role: name for role, name in roles.items() if name in tensors}


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


_METHODS: Final[Mapping[str, Callable[[Config, Tensors], Quantization | None]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
}
