"""A pruned model that loads elsewhere: the failure of eight public threads."""

import subprocess
import sys
from itertools import product

import torch
from safetensors.torch import save_file

from q2t.compression.depth import block_influence, keep_layers
from q2t.compression.vocabulary import slice_embeddings, trim
from q2t.compression.width import cut, neuron_importance

RELOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in map(Path, sys.argv[1:]):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), (folder, report)
    assert str(model.dtype) in folder.name
    saved = load_file(folder / "expected.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, saved["ids"]), folder
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, saved["logits"], rtol=1e-6, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(out, saved["generated"]), folder
print("same", len(sys.argv) - 1)
"""


def test_pruned_models_are_the_same_in_a_fresh_process(teacher, corpus, make_model, batches, tmp_path):
    text = corpus[0]

    def vocabulary(model):
        trimmed = trim(teacher, corpus[:2], 480)
        return slice_embeddings(model, trimmed.kept), trimmed.tokenizer

    def depth(model):
        return keep_layers(model, 3, block_influence(model, batches))[0], teacher

    def width(model):
        return cut(model, 24, neuron_importance(model, batches)), teacher

    def everything(model):
        return vocabulary(width(depth(model)[0])[0])

    folders = []
    for dtype, prune in product((torch.float32, torch.bfloat16), (vocabulary, depth, width, everything)):
        model = make_model()
        for parameter in model.parameters():  # model.to(dtype) would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        model, tokenizer = prune(model)
        folder = tmp_path / f"{prune.__name__}-{model.dtype}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits
        generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        save_file({"ids": ids, "logits": logits, "generated": generated}, folder / "expected.safetensors")
        folders.append(str(folder))
    script = RELOAD.replace("TEXT", repr(text))
    fresh = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    assert "same 8" in fresh.stdout
