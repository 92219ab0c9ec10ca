"""The stage that brings models in."""

import sys
from types import SimpleNamespace

import pytest

from q2t.config import Source
from stages import fetch


@pytest.mark.parametrize("path", ["../mine", "/somewhere/mine"])
def test_a_folder_is_the_repositorys_where_dvc_runs_a_copy(path, tmp_path, monkeypatch):
    repository, copied = tmp_path / "repository", tmp_path / "repository/.dvc/tmp/exps/copy"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    monkeypatch.setenv("DVC_ROOT", str(repository))
    monkeypatch.setattr(sys, "argv", ["fetch", "mine"])
    monkeypatch.setattr(fetch, "load", lambda: SimpleNamespace(sources={"mine": Source(path=path)}))
    found = []
    monkeypatch.setattr(fetch, "fetch", lambda name, source, target, corpus: found.append(source.path))
    fetch.main()
    assert found == [str(repository / path)]
