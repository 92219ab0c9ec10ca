"""Run as: python -m stages.export. models/pruned -> models/onnx, and models/int8 if it keeps its accuracy on dev."""

from pathlib import Path

from q2t.config import load
from q2t.deployment import int8, onnx, runtime
from q2t.determinism import seed_everything
from q2t.evaluation import harness
from q2t.records import Problem, read_jsonl, write_json
from q2t.stage import run
from q2t.tracking import stage_run

PRUNED, ONNX, INT8 = Path("models/pruned"), Path("models/onnx"), Path("models/int8")


def main() -> None:
    params = load()
    seed_everything(params.seed, params.compute)
    with stage_run("export") as tracked:
        dev = read_jsonl(Path("data/prompts/dev.jsonl"), Problem)

        def accuracy(folder: Path) -> float:
            judged = harness.answer(runtime.load(folder, params.compute), dev, params.evaluate)
            return harness.score(judged, params.evaluate)["accuracy"]

        onnx.export(PRUNED, ONNX)
        deviation = onnx.deviation(PRUNED, ONNX, [problem.question for problem in dev[:8]])
        reference = accuracy(ONNX)
        chosen = int8.gate(ONNX, INT8, accuracy_of=accuracy, reference=reference, recovery=params.export.recovery)
        metrics = {
            "recipe": chosen.recipe,
            "accuracy_fp32": reference,
            "accuracy_int8": chosen.accuracy,
            "largest_logit_deviation": float(f"{deviation:.2g}"),
        }
        write_json(Path("reports/metrics/export.json"), metrics)
        tracked.metrics(metrics)


if __name__ == "__main__":
    run(main)
