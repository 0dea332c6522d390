"""A canary token, over every command and every error: it may be in one header, to one host.

The fixture looks for it in files, commits and requests; here it is looked for in what is printed
and in the environment of child processes. Many command lines share a process, for time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub import pushing
from tests.hub.canary import contains
from tests.hub.server import Hub
from tests.models import tiny

CANARY = "hf_CanaryWhichMustNotSing0123456789"
READER = "hf_CanaryWhichMayOnlyRead01234567"
MANY = """
import json, sys
from qconvert.cli import main
for words in json.load(sys.stdin):
    sys.argv = ["qconvert", *words.split()]
    try:
        main()
    except SystemExit as e:
        print(f"\\nEXIT {e.code or 0}: {words}", flush=True)
"""


def run(
    hub: Hub, folder: Path, lines: dict[str, int], token: str | None, **more: str
) -> tuple[str, list[str]]:
    """Runs command lines in one process: what they print, and those that ended otherwise."""
    folder.mkdir(exist_ok=True)
    child = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(list(lines)),
        env=hub.env(folder / "hf", token) | more,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    ended = re.findall(r"^EXIT (\d+): (.*)$", child.stdout, re.MULTILINE)
    assert len(ended) == len(lines), child.stderr
    wrong = [f"{code}: {words}" for code, words in ended if int(code) != lines[words]]
    return child.stdout + child.stderr, wrong + child.stderr.splitlines() if wrong else []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("m"))


@pytest.fixture
def served(hub: Hub, model: Path) -> Hub:
    hub.add_user("alice", CANARY, orgs=["org"])
    hub.add_user("alice", READER, role="read")
    hub.add_user("bob", "hf_BobsToken0123456789")
    hub.add_repo("org/model", model)
    hub.add_repo("bob/gated", model, gated="auto")
    hub.add_repo("bob/private", model, private=True)
    hub.add_repo("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    return hub


PLAN = "plan hqq {} --bits 4"
QUICK = "--bits 4 --no-validate --threads 1 --device cpu"


def test_every_command(served: Hub, tmp_path: Path) -> None:
    pushing.result(tmp_path / "result")
    for status in (400, 401, 403, 404, 503):
        served.add_repo(f"org/echo{status}", {"config.json": b"{}"})
        served.fault(f"/org/echo{status}", f"echo:{status}")
    lines = {
        PLAN.format("org/model"): 0,
        PLAN.format("org/model") + " --json": 0,
        PLAN.format("org/model") + " --push": 0,
        f"hqq org/model {QUICK} --stream -o streamed": 0,
        f"hqq org/model {QUICK} --stream --push --push-unverified --repo-id org/result": 0,
        "push ../result org/pushed": 0,
        "push ../result org/pushed --create-pr --json": 0,
        "inspect org/result": 0,
        "validate org/result --level contract": 0,
        "validate org/result --level numeric --against org/model --json": 0,
        "card org/result --lint": 0,
        "doctor": 0,
        PLAN.format("bob/gated"): 3,
        PLAN.format("bob/private"): 3,
        PLAN.format("org/missing"): 3,
        PLAN.format("org/pickled"): 3,
        PLAN.format("org/model --revision no-such"): 3,
        "push ../result bob/pushed": 7,
        PLAN.format("org/echo400"): 7,
        PLAN.format("org/echo401"): 7,
        PLAN.format("org/echo403"): 7,
        PLAN.format("org/echo404"): 7,
        PLAN.format("org/echo503"): 3,
    }
    said, wrong = run(served, tmp_path / "home", lines, CANARY)
    assert not contains(said.encode(), served.tokens)
    assert wrong == []
    assert {r.token for r in served.log if r.host == "hub"} == {CANARY}


def test_every_kind_of_token(served: Hub, tmp_path: Path) -> None:
    pushing.result(tmp_path / "result")
    login = tmp_path / "login" / "hf"
    login.mkdir(parents=True)
    (login / "token").write_text(CANARY)
    push, plan = "push ../result org/x", PLAN.format("org/model")
    for name, token, lines, more in (
        ("login", None, {plan: 0, push: 0}, {}),
        ("newline", f"{CANARY}\n", {plan: 0, push: 0}, {}),
        ("read", READER, {plan: 0, push: 7}, {}),
        ("unknown", "hf_CanaryThatNobodyKnows012345", {plan: 7, push: 7}, {}),
        ("letters", f"{CANARY}é", {plan: 7, push: 7}, {}),
        ("debug", CANARY, {plan: 0, push: 0}, {"HF_DEBUG": "1", "QCONVERT_DEBUG": "1"}),
    ):
        said, wrong = run(served, tmp_path / name, lines, token, **more)
        assert not contains(said.encode(), [*served.tokens, (token or CANARY).strip()]), name
        assert wrong == [], name
    served.fault("^POST .*/commit/", "expire-token")
    said, wrong = run(served, tmp_path / "expired", {push: 7, plan: 7}, CANARY)
    assert not contains(said.encode(), served.tokens)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the kernel does not tell")
def test_no_child_process_is_given_it(served: Hub, tmp_path: Path) -> None:
    words = ["hqq", "org/model", "--bits", "4", "-o", "out", "-q"]
    child = subprocess.Popen(
        [sys.executable, "-m", "qconvert", *words],
        env=served.env(tmp_path / "hf", CANARY),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    seen: dict[int, bytes] = {}
    while child.poll() is None:
        for pid in descendants(child.pid):
            path = Path("/proc") / str(pid)
            try:
                seen[pid] = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended
        time.sleep(0.02)
    assert child.returncode == 0, child.communicate()
    assert any(b"qconvert.validation.child" in data for data in seen.values())
    assert not any(contains(data, served.tokens) for data in seen.values())


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found += [int(path.parent.name), *descendants(int(path.parent.name))]
    return found
