"""Two processes that share the steps of a run, started as `accelerate launch` starts them, by torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from q2t.distillation import loop

ROWS = 20
"""In steps of eight, each of two micro-batches but the last: it leaves the second process nothing to do."""
CHILD = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import SETTINGS, make_rows, tiny_model, weights
from q2t.config import Compute
from q2t.distillation import checkpoint, loop
folder, at = Path(sys.argv[1]), int(sys.argv[3])
save = checkpoint.save
def dying(checkpoints, step, *rest):
    save(checkpoints, step, *rest)
    if step == at:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
checkpoint.save = dying
model = loop.train(tiny_model(), make_rows({ROWS}, unlabelled_every=5), SETTINGS.model_copy(update={{"batch_size": 8}}),
    seed=3, compute=Compute(threads=1, dtype="float32", device="cpu"),
    checkpoints=folder / "checkpoints", curve=folder / "curve.csv", save_every=2)
assert loop.torch.distributed.get_world_size() == 2
weights(model, folder / f"model-{{os.environ['RANK']}}")
"""


def launch(folder: Path, die_at: int = 0) -> int:
    """The status of a run of two processes."""
    here = Path(__file__).parent
    script = folder / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*starter, str(script), str(folder), str(here), str(die_at)]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert launch(folder) == 0
    return folder


def test_two_processes_learn_as_one(
    two: Path, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    loop.train(
        model(),
        rows(ROWS, unlabelled_every=5),
        settings.model_copy(update={"batch_size": 8}),
        seed=3,
        compute=compute,
        checkpoints=tmp_path / "checkpoints",
        curve=tmp_path / "curve.csv",
    )
    one, both = (
        [list(map(float, line.split(","))) for line in path.read_text().splitlines()[1:]]
        for path in (tmp_path / "curve.csv", two / "curve.csv")
    )
    assert len(one) == 6
    assert both == [pytest.approx(line, rel=1e-4) for line in one]
    assert (two / "model-0").read_bytes() == (two / "model-1").read_bytes()


def test_two_processes_resume_to_the_same_bytes(two: Path, tmp_path: Path) -> None:
    assert launch(tmp_path, die_at=4) != 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]
    assert launch(tmp_path) == 0
    for name in ("curve.csv", "model-0", "model-1"):
        assert (tmp_path / name).read_bytes() == (two / name).read_bytes()
