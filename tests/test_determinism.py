import os
import random
import subprocess
import sys

import numpy
import pytest
import torch

from q2t.config import Compute
from q2t.determinism import AVX2, seed_everything

CPU = Compute(threads=1, dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch):
    """The flags are global: other tests keep theirs."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", *AVX2):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def _draw():
    return random.random(), float(numpy.random.rand()), torch.rand(3).tolist()


def test_equal_seeds_give_equal_draws_in_all_three_generators():
    seed_everything(7, CPU)
    first = _draw()
    between = _draw()
    seed_everything(7, CPU)
    assert _draw() == first
    seed_everything(8, CPU)
    other = _draw()
    for mine, later, theirs in zip(first, between, other, strict=True):
        assert mine != later and mine != theirs


def test_sets_threads_and_refuses_nondeterministic_kernels():
    threads = torch.get_num_threads() + 1
    seed_everything(0, Compute(threads=threads, dtype="float32", device="cpu"))
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_import_is_light():
    code = "import sys, q2t.determinism, q2t.sources; print({'torch', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("able", [False, True])
def test_bfloat16_is_refused_on_a_cpu_without_it(able, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    given = Compute(threads=1, dtype="bfloat16", device="cpu")
    if able:
        seed_everything(7, given)
    else:
        with pytest.raises(ValueError, match="compute.dtype is bfloat16.*set it to float32"):
            seed_everything(7, given)


CAPABILITY = """
import sys, torch
from q2t.config import Compute
from q2t.determinism import seed_everything
torch.ops.mkldnn._is_mkldnn_bf16_supported, able = lambda: True, torch.ops.mkldnn._is_mkldnn_bf16_supported
seed_everything(7, Compute(threads=1, dtype=sys.argv[1], device="cpu"))
print(torch.backends.cpu.get_cpu_capability(), able())
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_keeps_to_avx2_in_float32_alone(dtype):
    """In processes of their own, which import torch before, as stages do; told otherwise, so that AVX2 is a change."""
    environment = {name: value for name, value in os.environ.items() if name not in AVX2}
    told = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "DEFAULT"}
    out = subprocess.run(
        [sys.executable, "-c", CAPABILITY, dtype],
        env=environment | told,
        capture_output=True,
        text=True,
        check=True,
    )
    level, able = out.stdout.split()
    assert level == ("AVX2" if dtype == "float32" else "DEFAULT")
    assert dtype == "bfloat16" or able == "False"


def test_it_is_said_in_the_variables_that_the_libraries_read(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    seed_everything(7, Compute(threads=1, dtype="bfloat16", device="cpu"))
    assert not AVX2.keys() & os.environ.keys()
    seed_everything(7, CPU)
    assert os.environ["MKL_ENABLE_INSTRUCTIONS"] == os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"
