"""Run as: python -m stages.initialize. A model and the training rows -> models/untrained: fewer layers and tokens."""

from pathlib import Path

from q2t.compression.depth import block_influence, keep_layers
from q2t.compression.vocabulary import slice_embeddings, trim
from q2t.config import load
from q2t.determinism import seed_everything
from q2t.distillation.batches import calibration, output_head
from q2t.distillation.rows import encode, prompts
from q2t.records import Example, read_jsonl, write_json
from q2t.sources import load_model, load_tokenizer, save_model
from q2t.stage import run
from q2t.tracking import stage_run

STUDENT = Path("models/untrained")


def main() -> None:
    params = load()
    settings = params.initialize
    seed_everything(params.seed, params.compute)
    with stage_run("initialize") as tracked:
        examples = read_jsonl(Path("data/filtered/examples.jsonl"), Example)
        model, tokenizer = load_model(Path(settings.model)), load_tokenizer(Path(settings.model))
        head = output_head(model)  # refused here, and not at the first step of distill
        # Ids are hashes, so the first rows are a random sample.
        sample = [row for row in examples if row.domain == "target"][: settings.calibration_rows]
        influence = block_influence(model.to(params.compute.device), calibration(encode(tokenizer, sample)))
        model, layers = keep_layers(model.cpu(), settings.layers, influence)
        texts = prompts(tokenizer, examples) + [row.text for row in examples]
        trimmed = trim(tokenizer, texts, settings.vocabulary, len(head))
        save_model(slice_embeddings(model, trimmed.kept), trimmed.tokenizer, STUDENT)
        write_json(STUDENT / "vocabulary_map.json", trimmed.to_student)
        metrics = {
            "layers": len(layers),
            "vocabulary": len(trimmed.kept),
            "layers_kept": layers,
            "block_influence": [float(f"{value:.4g}") for value in influence],
        }
        write_json(Path("reports/metrics/initialize.json"), metrics)
        tracked.metrics(metrics)


if __name__ == "__main__":
    run(main)
