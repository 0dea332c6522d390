"""Hub ids, from the id to the folder in the cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.hub.asking import OPEN, ask
from tests.hub.server import Hub
from tests.hub.shards import sharded
from tests.tiny_case import make

TOKEN = "hf_ToKenOfAlice"
MODEL = {"config.json": make.dump(make.CONFIG)} | {
    name: data for name, data in make.sharded().items() if data is not None
}
WEIGHTS = [make.FIRST, make.SECOND]
CLUTTER = {
    "odd[name].tiktoken": b"x",
    "README.md": b"---\n---\n",
    "modeling_x.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"onnx",
    "original/consolidated.safetensors": b"other",
    "model-00001-of-00002.fp16.safetensors": b"variant",
    "weights/../../x.safetensors": b"not ours to read",
}
SIDE = {"tokenizer.json": b"{}", "LICENSE": b"mit", "qwen.tiktoken": b"x"}
UNSAFE = make.sharded(lambda m: m | {"model.norm.weight": "../x.safetensors"})
ORIGINAL = {"consolidated.00.pth": b"pickle", "params.json": b"{}", "tokenizer.model": b"x"}

OPENED = (
    OPEN
    + "def job(model, revision=None):\n    return facts(open_checkpoint(model, revision=revision))"
)
LOCALIZED = OPEN + "def job(model):\n    return facts(localize(open_checkpoint(model)))"


def offline(environment: dict[str, str]) -> dict[str, str]:
    return environment | {"HF_HUB_OFFLINE": "1"}


def test_headers_first_then_the_weights(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add_repo("org/good", MODEL | SIDE | CLUTTER)
    commit = repo.at().oid
    env = hub.env(tmp_path)
    (good, again), _ = ask(OPENED, [("org/good",), ("org/good", commit)], env)
    headers = [r for r in hub.log if r.host == "cdn"]

    assert good == again
    assert (good["name"], good["repo_id"], good["revision"]) == ("good", "org/good", commit)
    assert (good["asked"], good["private"], good["gated"]) == ("org/good", False, False)
    assert good["tensors"] == len(make.base_weights())
    assert good["side"] == {name: len(data) for name, data in sorted(SIDE.items())}
    assert good["remote"] is True
    assert good["found"] == sorted(["README.md", "config.json", make.INDEX])
    assert good["sha256"] == {n: hashlib.sha256(MODEL[n]).hexdigest() for n in WEIGHTS}
    strays = "model-00001-of-00002.fp16.safetensors, original/consolidated.safetensors"
    assert good["warnings"] == [f"not part of the model, ignored: {strays}"]
    assert len(headers) == 2 * len(WEIGHTS)
    assert {r.status for r in headers} == {206}

    (local,), _ = ask(LOCALIZED, [("org/good",)], env)
    wanted = sorted([*MODEL, *SIDE, "README.md"])
    assert local["found"] == wanted
    assert local["remote"] is False
    same = ("name", "repo_id", "revision", "tensors", "side", "sha256")
    assert {k: local[k] for k in same} == {k: good[k] for k in same}
    fetched = {r.path.split("/", 5)[-1] for r in hub.requests("^GET .*resolve-cache")}
    fetched |= {r.params["filename"] for r in hub.log if r.host == "cdn"}
    assert sorted(Path(name).name for name in fetched) == wanted

    # the same folder, read without a connection
    seen = len(hub.log)
    jobs = [("org/good", commit), ("org/good", None), ("org/never", None)]
    (pinned, main, absent), _ = ask(OPENED, jobs, offline(env))
    assert len(hub.log) == seen
    assert pinned["found"] == wanted
    assert {k: pinned[k] for k in same[:5]} == {k: good[k] for k in same[:5]}
    assert pinned["warnings"] == []
    assert main["error"] == absent["error"] == "Network"
    assert f"--revision {commit}" in main["hint"]
    assert "HF_HUB_OFFLINE" in absent["message"]
    nobody = env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    (unplugged,), _ = ask(OPENED, [("org/good", commit)], nobody)
    assert unplugged == pinned

    # a branch that the library itself has cached: used, but said so
    refs = tmp_path / "hub" / "models--org--good" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(commit)
    (cached,), _ = ask(OPENED, [("org/good", None)], offline(env))
    assert cached["revision"] == commit
    assert commit in cached["warnings"][0]


def test_headers_alone_are_no_model_without_a_connection(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add_repo("org/good", MODEL).at().oid
    env = hub.env(tmp_path)
    ask(OPENED, [("org/good",)], env)
    (answer,), _ = ask(OPENED, [("org/good", commit)], offline(env))
    assert answer["error"] == "Network"
    assert "HF_HUB_OFFLINE" in answer["message"]


def test_refusals(hub: Hub, tmp_path: Path) -> None:
    quantized = make.CONFIG | {"quantization_config": {"quant_method": "awq"}}
    config = {"config.json": make.dump(make.CONFIG)}
    hub.add_repo("org/good", MODEL)
    hub.add_repo("org/gated", MODEL, gated="auto")
    hub.add_repo("org/private", MODEL, private=True)
    hub.add_repo("org/quantized", MODEL | {"config.json": make.dump(quantized)})
    hub.add_repo(
        "org/absurd", MODEL | {"config.json": make.dump(make.CONFIG | {"num_hidden_layers": -1})}
    )
    hub.add_repo("org/pickled", config | {"pytorch_model.bin": b"pickle"})
    hub.add_repo("org/empty", {})
    hub.add_repo("org/adapter", {"adapter_config.json": b"{}", "README.md": b"x"})
    hub.add_repo("org/unsafe", MODEL | {make.INDEX: UNSAFE[make.INDEX]})
    hub.add_repo("org/named", MODEL | {"LICENSE..txt": b"x"})
    hub.add_repo("org/twice", MODEL | {"license": b"x", "LICENSE": b"y"})
    hub.add_repo("org/incomplete", {n: d for n, d in MODEL.items() if n != make.SECOND})
    hub.add_repo("org/cut", MODEL | {make.SECOND: MODEL[make.SECOND][:-1]})
    hub.fault("/api/models/org/badtoken", "status:401", times=9)
    hub.fault("/api/models/org/forbidden", "status:403", times=9)
    hub.fault("/api/models/org/down", "status:503", times=9)
    hub.fault("/api/models/org/odd", "status:418", times=9)
    refusals = [
        ("org/gated", None, "Gated", ["licence"], f"{hub.endpoint}/org/gated and run: hf auth"),
        ("org/missing", None, "NotFound", ["org/missing"], "hf auth login"),
        ("org/private", None, "NotFound", ["org/private"], "hf auth login"),
        ("org/good", "no-such-branch", "NotFound", ["no-such-branch"], "--revision"),
        ("org/good", "0" * 40, "NotFound", ["0" * 40], "--revision"),
        ("org/badtoken", None, "NotLoggedIn", ["token"], "hf auth login"),
        ("org/forbidden", None, "Forbidden", ["token"], "org/forbidden"),
        ("org/down", None, "Network", ["org/down", "503"], "same command"),
        ("org/odd", None, "HubError", ["org/odd", "Teapot"], ""),
        ("org/quantized", None, "UsageError", ["already quantized with awq"], ""),
        ("org/absurd", None, "UnsupportedConfig", ["num_hidden_layers"], ""),
        ("org/pickled", None, "UnsafeFormat", ["pytorch_model.bin"], "convert"),
        ("org/empty", None, "NotFound", ["config.json", "org/empty"], ""),
        ("org/adapter", None, "NotFound", ["config.json", "org/adapter"], "LoRA"),
        ("org/unsafe", None, "UnsafePath", ["../x.safetensors"], ""),
        ("org/named", None, "UnsafePath", ["LICENSE..txt"], ""),
        ("org/twice", None, "UnsafePath", ["differ only by case"], ""),
        ("org/incomplete", None, "MissingShard", [make.SECOND], "download"),
        ("org/cut", None, "CorruptFile", [make.SECOND, "truncated"], ""),
    ]
    env = hub.env(tmp_path)
    answers, _ = ask(OPENED, [(repo, revision) for repo, revision, *_ in refusals], env)
    assert len(answers) == len(refusals) == 19
    for answer, (repo, _, error, mentions, hint) in zip(answers, refusals, strict=True):
        assert answer.get("error") == error, (repo, answer)
        assert [m for m in mentions if m not in answer["message"]] == [], answer
        assert hint in answer["hint"], answer
    assert [r.line for r in hub.requests("GET .*pytorch_model")] == []
    weights = {r.path.split("/")[3] for r in hub.log if r.host == "cdn"}
    assert weights == {"cut", "twice"}


def test_a_renamed_repository_answers_with_its_new_name(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("New-Org/Model", MODEL | SIDE)
    hub.rename("old/model", "New-Org/Model")
    hub.rename("model", "New-Org/Model")
    jobs = [("old/model",), ("model",), ("new-org/MODEL",), ("New-Org/Model",)]
    answers, _ = ask(OPENED, jobs, hub.env(tmp_path))
    assert [a["repo_id"] for a in answers] == ["New-Org/Model"] * 4
    assert [a["asked"] for a in answers] == [job[0] for job in jobs]
    assert [a["name"] for a in answers] == ["Model"] * 4
    assert [a["warnings"] for a in answers] == [
        ["old/model is now New-Org/Model on the Hub"],
        ["model is now New-Org/Model on the Hub"],
        [],  # letters are what the Hub says they are
        [],
    ]


def test_original_weights_lead_to_their_twin(hub: Hub, tmp_path: Path) -> None:
    for name in ("with", "without", "gated", "bare"):
        hub.add_repo(f"meta/{name}", ORIGINAL, gated="manual" if name == "with" else False)
    twin = hub.add_repo("meta/with-hf", MODEL)
    hub.add_repo("meta/gated-hf", MODEL, gated="manual")
    hub.add_repo("meta/bare-hf", ORIGINAL)
    hub.add_repo("meta/both", MODEL | ORIGINAL)
    hub.add_user("alice", TOKEN)
    hub.repo("meta/with").granted.add("alice")
    jobs = [("meta/with",), ("meta/both",), ("meta/without",), ("meta/gated",), ("meta/bare",)]
    (found, both, *refused), _ = ask(OPENED, jobs, hub.env(tmp_path, TOKEN))
    ((pinned,), _) = ask(OPENED, [("meta/with", "main")], hub.env(tmp_path, TOKEN))
    assert pinned["error"] == "UnsafeFormat"
    assert "leave --revision out" in pinned["hint"]
    assert (found["repo_id"], found["asked"]) == ("meta/with-hf", "meta/with")
    assert found["revision"] == twin.at().oid
    assert found["gated"] is True  # the stricter of the two
    assert "meta/with-hf" in found["warnings"][0]
    assert "consolidated.00.pth" in found["warnings"][0]
    assert (both["repo_id"], both["warnings"]) == ("meta/both", [])
    assert [r["error"] for r in refused] == ["UnsafeFormat"] * 3
    for answer, (name,) in zip(refused, jobs[2:], strict=True):
        assert f"{name}-hf" in answer["message"] + answer["hint"]
        assert "hf auth login" in answer["hint"]
    assert f"{hub.endpoint}/meta/gated-hf" in refused[1]["hint"]


def test_a_flipped_byte_in_a_small_file_is_seen(hub: Hub, tmp_path: Path) -> None:
    files = MODEL | {"tokenizer.json": b'{"a": 1}' * 100, "LICENSE": b"mit " * 99}
    hub.add_repo("org/good", files, lfs=lambda n: n.endswith((".safetensors", "tokenizer.json")))
    hub.fault("GET .*resolve-cache.*config.json", "corrupt")
    hub.fault("GET .*filename=tokenizer.json", "corrupt")
    env = hub.env(tmp_path)
    answers: list[dict[str, Any]] = []
    for _ in range(3):
        (answer,), _ = ask(LOCALIZED, [("org/good",)], env)
        answers.append(answer)
        if "error" in answer:
            removed, path = answer["hint"].split(" and ")[0].split()
            assert removed == "rm"
            assert tmp_path in Path(path).parents
            os.unlink(path)
    config, tokenizer, good = answers
    assert config["error"] == tokenizer["error"] == "CorruptFile"
    assert "git blob" in config["message"]
    assert hashlib.sha256(files["tokenizer.json"]).hexdigest() in tokenizer["message"]
    assert good["found"] == sorted(files)


def test_a_flipped_byte_in_a_header_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/good", MODEL)
    broken = WEIGHTS[0]
    hub.add_repo("org/bad", MODEL | {broken: MODEL[broken][:8] + b"z" + MODEL[broken][9:]})
    path = rf"GET /repos/.*org/good.*filename={broken}"
    fault = hub.fault(path, "corrupt", times=2, after_bytes=8)  # of {
    (good, bad), _ = ask(OPENED, [("org/good",), ("org/bad",)], hub.env(tmp_path))
    assert fault.seen == 2
    assert good["tensors"] == len(make.base_weights())
    assert bad["error"] == "CorruptFile"
    assert broken in bad["message"]
    assert len(hub.requests(rf"GET /repos/.*org/bad.*filename={broken}")) == 3


TOKENS = {
    "with a newline": (f"{TOKEN}\n", None),
    "not ASCII": (f"{TOKEN}é", "NotLoggedIn"),
    "with a control character": (f"{TOKEN}\x01", "NotLoggedIn"),
    "unknown": ("hf_other", "NotLoggedIn"),
    "expired": ("hf_expired", "NotLoggedIn"),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens(kind: str, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/private", MODEL, private=True)
    hub.add_user("alice", TOKEN, orgs=["org"])
    hub.add_user("alice", "hf_expired", expired=True)
    token, error = TOKENS[kind]
    (answer,), stderr = ask(OPENED, [("org/private",)], hub.env(tmp_path, token))
    assert answer.get("error") == error, (answer, stderr)
    if error:
        asked = "" if token is None else "unset HF_TOKEN; "  # it would go before a login
        assert answer["hint"] == asked + "hf auth login"
    else:
        assert answer["private"] is True
    assert "hf_" not in f"{answer}{stderr}"


def test_nothing_is_printed(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/good", MODEL | SIDE)
    hub.fault("GET .*/tree/", "status:503")
    hub.fault("GET .*/tree/", "429", seconds=0)
    (answer,), stderr = ask(LOCALIZED, [("org/good",)], hub.env(tmp_path))
    assert answer["repo_id"] == "org/good"
    assert stderr == ""


def test_a_download_survives_a_bad_network(hub: Hub, tmp_path: Path) -> None:
    """The library gives up at a reset connection and at a 503 within a file."""
    files = sharded([[2_000_000, 1_000_000], [3_000_000]])
    hub.add_repo("org/model", files)
    noise = ("reset", "status:503", "cut", "429", "status:500")
    faults = [hub.fault("GET /repos/.*00001-of", "slow", seconds=0)]  # its header
    faults += [hub.fault("GET /repos/.*00001-of", kind, seconds=0) for kind in noise]
    faults += [hub.fault("GET /api/resolve-cache/.*config", kind, seconds=0) for kind in noise[:2]]
    (answer,), stderr = ask(LOCALIZED, [("org/model",)], hub.env(tmp_path))
    assert answer.get("found") == sorted(files), answer
    assert all(fault.seen == fault.times for fault in faults)
    assert stderr == ""
    root = tmp_path / "hub/models--org--model/snapshots" / answer["revision"]
    assert {name: (root / name).read_bytes() for name in files} == files
