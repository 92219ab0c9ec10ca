from pathlib import Path

import pytest
from ruamel.yaml import YAML

from q2t.config import Adapter, Online, OnPolicy, Source, load

PARAMS = Path("params.yaml")

OWN = {"teacher": "models/teacher", "max_new_tokens": 9, "batch_size": 2, "top_k": 4}
BESIDE = {"teacher": "models/teacher", "logits": True}


def changed(tmp_path, change):
    yaml = YAML()
    params = yaml.load(PARAMS)
    change(params)
    yaml.dump(params, tmp_path / "params.yaml")
    return tmp_path / "params.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["distill"].update(temprature=2.0), "'temprature' in distill: did you mean 'temperature'"),
        (lambda p: p.update(destill={}), "unknown key 'destill' in the top level: did you mean 'distill'"),
        (lambda p: p["teachers"]["expert"].update(sample=4), "'sample' in teachers.expert: did you mean 'samples'"),
        (lambda p: p["sources"]["smollm2"].update(sha="0"), "'sha' in sources.smollm2: did you mean 'sha256'"),
        (lambda p: p["distill"].pop("alpha"), "'alpha' is missing in distill"),
        (lambda p: p["distill"].update(learning_rate="5e-5"), "'learning_rate' in distill: .*got '5e-5'"),
        (lambda p: p["distill"].update(alpha=1.5), "'alpha' in distill: .*less than or equal to 1"),
        (lambda p: p["compute"].update(dtype="int3"), "'dtype' in compute"),
        (lambda p: p["compute"].update(threads=True), "'threads' in compute"),
        (lambda p: p["distill"].update(curriculum=float("inf")), "'curriculum' in distill: .*finite number"),
        (lambda p: p["filter"]["weights"]["teacher"].update(expret=2.0), r"\['expret'\].* teachers: expert, base$"),
        (lambda p: p["filter"]["weights"]["domain"].update(genral=1.0), "'genral' in filter.weights.domain: "),
        (lambda p: p["label"].update(beside={"models/gpt": 0.2}), "label: beside names 'models/gpt', and DVC"),
        (
            lambda p: p["label"].update(
                beside={"models/teacher": 0.9, "models/sources/smollm2": 1.0 - 1e-9}
            ),
            "beside has weights of 1 together for what expert wrote",  # its own does not count
        ),
        (lambda p: p["label"].update(beside={"models/sources/typo": 0.2}), "one of models/teacher, models/sources/s"),
        (lambda p: p["label"].update(top_k=6400), "label: top_k is 6400, and initialize.vocabulary leaves"),
        (
            lambda p: p["prune"].update(sparsity=0.1, adapter={"kind": "lora", "modules": ["q_proj"]}),
            "sparsity shrinks the weights that an adapter leaves as they are",
        ),
        (
            lambda p: p["distill"].update(
                online={"teacher": "models/teacher", "logits": True}, phases=[{"online": False}]
            ),
            "online has no effect: all phases leave it out",
        ),
        (lambda p: p["distill"].update(phases=[{"beta": 0.3}]), "phase 1 has beta, which forward_kl doesn't know"),
        (
            lambda p: p["distill"].update(phases=[{"on_policy": OWN, "teacher_only": ["target"]}]),
            "phase 1 has teacher_only, which all of on_policy is",
        ),
        (lambda p: p["evaluate"]["models"].pop("teacher"), "'evaluate' in .*: .*models has no teacher"),
        (lambda p: p["specialize"].update(source="smolm2"), r"specialize: source 'smolm2' is not in sources: \['smol"),
        (lambda p: p["filter"]["teachers"].append("expret"), r"filter: teachers names \['expret'\].* in teachers: \["),
        (lambda p: p["teachers"].pop("reference"), "teachers: reference answers what forgetting is measured on"),
        (lambda p: p["teachers"]["reference"].update(prompts="general"), "with prompts: general_test"),
        (lambda p: p.update(seed=-1), "'seed' in the top level: .*greater than or equal to 0; got -1"),
        (lambda p: p["prune"].update(seed=2**32), "'seed' in prune: .*less than 4294967296"),
        (lambda p: p["compute"].update(device="cuda:1"), "'device' in compute: .*'cpu' or 'cuda'"),
        (lambda p: p["evaluate"].update(lenient=["bsae"]), r"lenient names \['bsae'\].*among the models: base, "),
        (
            lambda p: p["distill"].update(online={"teacher": "elsewhere/model", "hidden": [[1, 1]]}),
            "distill: online.teacher is 'elsewhere/model', and DVC would not see it change",
        ),
        (
            lambda p: p["distill"].update(online={"teacher": "models/teacher", "hidden": [[1, 1]]}, reasoning=0.5),
            "phase 1 has an online teacher, whose terms reasoning and curriculum would not weight",
        ),
        (
            lambda p: p["prune"].update(
                online={"teacher": "models/teacher", "hidden": [[1, 1]]},
                phases=[{"online": False}, {"on_policy": OWN}],
            ),
            "phase 2 is on_policy and has an online teacher",
        ),
        (
            lambda p: p["distill"].update(online={"teacher": "models/teacher", "logits": True, "spans": "uld"}),
            "spans is for a teacher of another tokenizer",
        ),
        (lambda p: p["distill"].update(online={"teacher": "models/teacher"}), "nothing is learnt from this teacher"),
        (
            lambda p: p["distill"].update(online={"teacher": "models/teacher", "logits": True, "hidden_weight": 2.0}),
            "hidden_weight has no effect without hidden",
        ),
        (
            lambda p: p["distill"].update(online={"teacher": "models/teacher", "logits": True, "distance": "mse"}),
            "distance has no effect without hidden",
        ),
        (
            lambda p: p["distill"].update(phases=[{"epochs": 1}, {"on_policy": OWN, "alpha": 0.5}]),
            "phase 2 has alpha, which has no effect on_policy",
        ),
        (
            lambda p: p["distill"].update(domains=["target"], teacher_only=["general"]),
            r"\['general'\] in teacher_only has no rows: no phase has it in domains",
        ),
        (
            lambda p: p["distill"].update(on_policy=OWN, phases=[{"alpha": 0.5}]),
            "phase 1 has alpha, which has no effect on_policy",
        ),
        (
            lambda p: (p["teachers"]["expert"].update(system="Be brief."), p["distill"].update(online=BESIDE)),
            r"distill: the teacher of online reads .* lack the `system` prompt that expert answers behind",
        ),
        (
            lambda p: (p["filter"].update(teachers=["expert"]), p["label"].update(beside={"models/teacher": 0.2})),
            "label: beside names models/teacher alone, which wrote all rows: leave it out",
        ),
        (lambda p: p["distill"].update(adapter={"kind": "ia3", "rank": 4, "modules": ["q_proj"]}), "ia3 has no rank"),
        (
            lambda p: p["distill"].update(on_policy=OWN, phases=[{"on_policy": False}]),
            "on_policy has no effect: all phases leave it out",
        ),
        (lambda p: p["distill"].update(online=BESIDE, alpha=0.0), "online.logits has no effect where alpha is 0"),
        (
            lambda p: p["sources"].update(tiny={"scratch": {"layer": 2}}),
            "unknown key 'layer' in sources.tiny.scratch: did you mean 'layers'",
        ),
        (
            lambda p: p["sources"].update(mine={"path": "../mine", "sha256": "0"}),
            "file and sha256 are a registry source's",
        ),
        (lambda p: p.update(launch="accelerate launch"), "launch: 'accelerate launch' would start no module"),
        (
            lambda p: p["teachers"].update(stepwise=p["teachers"]["expert"] | {"system": "Step by step."}),
            "teachers: expert and another have 'models/teacher' answer questions behind different `system` prompts",
        ),
        (
            lambda p: p["sources"].update({"qwen2.5": {"path": "../qwen"}}),
            "'qwen2.5' in sources: String should match pattern",
        ),
        (lambda p: p["evaluate"]["models"].update({"student v2": "models/s"}), "'student v2' in evaluate.models: "),
        (lambda p: p.update(launch=""), "launch: '' would start no module"),
        (
            lambda p: p["filter"].update(teachers=["expert", "reference"]),
            r"filter: teachers names \['reference'\], whose prompts forgetting is measured on",
        ),
        (
            lambda p: p["filter"].update(teachers=["expert"]),
            r"filter: target_share is 0.8, and no answer of teachers \['expert'\] is general: name one",
        ),
        (lambda p: p["filter"].update(teachers=["base"]), r"no answer of teachers \['base'\] is target: name one"),
        (
            lambda p: (p["filter"].update(target_share=1.0), p["prune"].update(domains=["general"])),
            "prune: domains has general rows alone, and filter.target_share 1.0 leaves none",
        ),
    ],
)  # fmt: skip
def test_a_wrong_key_is_explained(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(changed(tmp_path, change))


def test_a_phase_leaves_out_what_the_section_has(tmp_path):
    phases = [{"on_policy": False}, {}]
    path = changed(tmp_path, lambda p: p["distill"].update(on_policy=OWN, phases=phases))
    first, second = load(path).distill.in_phases()
    assert first.on_policy is None and second.on_policy and second.on_policy.model_dump() == OWN | {"temperature": 1.0}


def test_a_system_prompt_is_no_matter_online_where_its_rows_are_not_learnt_or_read_anew(tmp_path):
    def change(p):
        p["teachers"]["expert"].update(system="Be brief.")
        p["distill"].update(online=BESIDE, domains=["general"])
        p["prune"].update(online={"teacher": "models/teacher", "spans": "uld"})

    assert load(changed(tmp_path, change)).systems == {"expert": "Be brief."}


def test_a_folder_is_known_however_it_is_written(tmp_path):
    def change(p):
        p["teachers"]["expert"].update(model="models/teacher/", system="Be brief.")
        p["label"].update(beside={"./models/teacher": 0.2, "models/sources/smollm2/": 0.3})
        p["distill"].update(on_policy=OWN | {"teacher": "models//teacher"})

    params = load(changed(tmp_path, change))
    assert params.told == {"models/teacher": "Be brief."}
    assert params.label.beside_writer(params.teachers["expert"].model) == {"models/sources/smollm2": 0.3}
    assert params.distill.on_policy and params.distill.on_policy.teacher == params.evaluate.models["teacher"]


def test_all_mistakes_are_told_at_once(tmp_path):
    path = changed(tmp_path, lambda p: (p["distill"].update(alpha=2), p["prune"].update(widht=1)))
    with pytest.raises(ValueError, match=r"(?s)alpha.*widht"):
        load(path)


def test_numbers_that_dvc_writes_are_numbers(tmp_path):
    """After `-S lr=5e-5` the file says 5e-05, which a YAML 1.1 reader takes for a string."""
    text = PARAMS.read_text().replace("learning_rate: 5.0e-4", "learning_rate: 5e-05")
    (tmp_path / "params.yaml").write_text(text)
    assert load(tmp_path / "params.yaml").distill.learning_rate == 5e-5


def test_a_key_that_is_left_out_means_what_it_meant():
    """No stage depends on q2t/config: DVC would take a run by an older default for one by another."""
    beside, own = Online(**BESIDE).model_dump(), OnPolicy(**OWN).model_dump()
    assert Adapter(kind="lora", modules=["q_proj"]).model_dump(include={"rank", "alpha"}) == {"rank": 16, "alpha": 32}
    assert own.items() - OWN.items() == {("temperature", 1.0)}
    assert {key: beside[key] for key in beside.keys() - BESIDE.keys()} == {
        "hidden": [],
        "distance": "cosine",
        "hidden_weight": 1.0,
        "attention": [],
        "attention_weight": 1.0,
        "spans": None,
        "spans_weight": 1.0,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of registry, hub, path, scratch"),
        ({"path": "a", "hub": "o/n@r"}, "exactly one"),
        ({"registry": "p==1"}, "needs file and sha256"),
        ({"hub": "o/n"}, "not pinned"),
    ],
)
def test_a_source_is_one_pinned_thing(given, message):
    with pytest.raises(ValueError, match=message):
        Source(**given)


@pytest.mark.parametrize("profile", [p.stem for p in Path("q2t/profiles").glob("*.yaml")])
def test_every_profile_fits(tmp_path, profile):
    from q2t.profile import apply

    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    assert apply(profile, tmp_path / "params.yaml")
    params = load(tmp_path / "params.yaml")
    assert list(params.systems) == (["expert"] if profile == "r1-gemma" else [])
    assert params.told.get("models/teacher", "") == params.systems.get("expert", "")
    assert "models/student" not in params.told
