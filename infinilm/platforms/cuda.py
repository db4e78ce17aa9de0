"""NVIDIA GPUs, through torch's CUDA build."""

from __future__ import annotations

import ctypes.util
import os

from infinilm_hookspecs import hookimpl


class CudaPlatform:
    """The NVIDIA GPUs that this process sees."""

    name = "cuda"
    default_backend = "torch"
    communication = "nccl"

    @classmethod
    def availability(cls) -> tuple[bool, str]:
        """Return whether torch sees a GPU. Asks for the driver's library first, so that machines without stay quick."""
        if not _has_driver():
            return False, "this machine has no NVIDIA driver"
        import torch

        if torch.version.cuda is None:
            return False, f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return False, "torch sees no CUDA device"
        return True, f"torch sees {torch.cuda.device_count()} CUDA devices"

    def device(self, local_rank: int) -> str:
        """Return "cuda:" and the rank on this machine."""
        return f"cuda:{local_rank}"

    def memory(self, device: str) -> tuple[int, int]:
        """Return (free, total) bytes of the GPU, as the driver counts them."""
        import torch

        return torch.cuda.mem_get_info(device)

    def supports(self, dtype: str) -> bool:
        """Return whether models may run in `dtype`; bfloat16 wants compute capability 8.0."""
        if dtype == "bfloat16":
            import torch

            return torch.cuda.get_device_capability()[0] >= 8
        return dtype in ("float32", "float16", "float64")


@hookimpl
def provide_platform() -> type[CudaPlatform] | None:
    return CudaPlatform if CudaPlatform.availability()[0] else None


def _has_driver() -> bool:
    return os.path.exists("/proc/driver/nvidia") or ctypes.util.find_library("cuda") is not None
