"""One call that makes a stage repeatable: seeds, threads and deterministic kernels."""

import os
import random

from q2t.config import Compute

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""What torch, oneDNN and MKL read when they first compute: the instructions that they keep to."""


def seed_everything(seed: int, compute: Compute) -> None:
    """Seed Python, NumPy and torch, fix the threads, and refuse kernels that are not deterministic.

    Equal seeds, threads, dtype, device and package versions then give equal bits. Threads count because they
    decide how a sum is split. So does the width of vectors: in float32 torch computes by AVX2 on a CPU that has AVX-512
    too; ONNX Runtime chooses its own. Call it first in a stage: the libraries read their settings once.

    Seeds from 0 to 2**32 - 1, the range that NumPy takes.

    Raises:
        ValueError: bfloat16 on a CPU that has no instructions for it.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if compute.device == "cpu" and compute.dtype == "float32":
        os.environ.update(AVX2)

    import numpy
    import torch

    has_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if compute.device == "cpu" and compute.dtype == "bfloat16" and not has_bfloat16:
        raise ValueError(
            "compute.dtype is bfloat16, which this CPU has no instructions for (AVX-512 or AMX) and computes 20 times "
            "slower than float32: set it to float32 in params.yaml, or `dvc exp run -S compute.dtype=float32`"
        )
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # CUDA's generators too
    torch.set_num_threads(compute.threads)
    # Never warn_only: a warning in a log does not keep a result from drifting.
    torch.use_deterministic_algorithms(True)
    # On by default, and 5% of a training step: new tensors filled with NaN, to show who reads unwritten ones.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
