"""`qconvert compare org/a org/b`: repositories take part like folders, downloaded whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qconvert.staging import MANIFEST_NAME
from tests.hub.asking import ask
from tests.hub.runs import TOKEN
from tests.hub.server import Hub
from tests.models import tiny
from tests.validation import faults

JOB = """
from qconvert.comparing import entrants

def job(*targets):
    found = entrants.open_entrants(targets)
    source = entrants.find_source(found, None)
    rows = [entrants.static_row(it, source) for it in found]
    return {
        "names": [row.name for row in rows],
        "here": [(it.stored.root / "model.safetensors").is_file() for it in found],
        "bytes": [row.nbytes for row in rows],
        "source": source.repo_id,
        "commit": source.revision,
    }
"""


def test_repositories_of_one_source(hub: Hub, tmp_path: Path) -> None:
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    model = tiny("llama-untied", tmp_path / "m")
    hub.add_repo("org/model", model)
    commit = hub.repo("org/model").at().oid
    sizes = []
    for name in ("nf4", "int8"):
        folder = faults.quantize(model, name, tmp_path / name)
        path = folder / MANIFEST_NAME
        manifest = json.loads(path.read_text())
        manifest["source"] |= {"repo_id": "org/model", "revision": commit}
        path.write_text(json.dumps(manifest))
        hub.add_repo(f"org/{name}", folder)
        sizes.append((folder / "model.safetensors").stat().st_size)
    home = tmp_path / "home"
    [found, alone] = ask(JOB, [("org/nf4", "org/int8"), ("org/nf4",)], hub.env(home, TOKEN))[0]
    assert found == {
        "names": ["nf4", "int8"], "here": [True, True], "bytes": sizes, "source": "org/model",
        "commit": commit,
    }  # fmt: skip
    assert alone["error"] == "UsageError"


@pytest.mark.parametrize("target", ["org/model", "org/nothing"])
def test_what_is_not_quantized_or_not_there(hub: Hub, tmp_path: Path, target: str) -> None:
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    hub.add_repo("org/model", tiny("llama-untied", tmp_path / "m"))
    [found] = ask(JOB, [(target, "org/other")], hub.env(tmp_path / "home", TOKEN))[0]
    assert found["error"] == {"org/model": "UsageError", "org/nothing": "NotFound"}[target]
