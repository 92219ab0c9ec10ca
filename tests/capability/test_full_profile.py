"""The profile `full` needs a GPU and hours; what can be known of it before is checked here."""

from pathlib import Path

import pytest
import torch

from q2t.capability.electronics import catalog
from q2t.capability.families import make_families
from q2t.capability.posing import pose
from q2t.config import load
from q2t.profile import apply
from q2t.records import operands


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """The quickstart and the profile."""
    path = tmp_path_factory.mktemp("full") / "params.yaml"
    path.write_text(Path("params.yaml").read_text())
    quickstart = load(path)
    apply("full", path)
    return quickstart, load(path)


def test_it_poses_more_than_ten_times_the_questions_of_each_family(profiles):
    quickstart, full = profiles
    asked = full.capability
    assert asked.questions > 10 * quickstart.capability.questions
    families = make_families(asked.families, catalog.read(Path("data/catalog")))
    posed = pose(families, asked, full.seed)
    counts = {split: len(rows) // len(families) for split, rows in posed.items()}
    assert counts == {"lessons": 440, "questions": 1600, "dev": 16, "test": 60}
    assert len({operands(row) for rows in posed.values() for row in rows}) == sum(map(len, posed.values()))


def test_its_student_has_60_percent_fewer_parameters(profiles):
    from transformers import LlamaConfig, LlamaForCausalLM

    def parameters(vocabulary, layers, intermediate):
        shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, intermediate_size=intermediate, **shape)
        with torch.device("meta"):
            return LlamaForCausalLM(config).num_parameters()

    _, full = profiles
    teacher = parameters(49152, 30, 1536)
    assert teacher == 134_515_008  # of SmolLM2-135M
    student = parameters(full.initialize.vocabulary, full.initialize.layers, full.prune.intermediate)
    assert student == 53_040_960 <= 0.4 * teacher
