"""Weights that are read as they arrive: equal or refused, within the window, and never stuck."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from tests.hub.asking import ask
from tests.hub.server import Hub
from tests.hub.shards import sharded

TOKEN = "hf_ToKenOfAlice"

STREAM = """
import hashlib, random, threading, time
from qconvert.errors import CorruptFile
from qconvert.hub.stream import StreamReader
from qconvert.source import open_checkpoint

def job(model, seed=0, ahead=None, connections=4, workers=4, stop_after=None):
    checkpoint = open_checkpoint(model)
    files = list(checkpoint.files)
    largest = max(t.nbytes for t in checkpoint.tensors.values())
    verified, received, lock = {}, [0], threading.Lock()

    def on_bytes(count):
        with lock:
            received[0] += count

    before = set(threading.enumerate())
    found = {name: {} for name in files}
    refused = set()
    turns = iter(checkpoint.tensors.values())
    reader = StreamReader(
        checkpoint, files, connections=connections, on_bytes=on_bytes,
        on_verified=verified.__setitem__,
        window_bytes=largest + (256 << 20 if ahead is None else ahead),
    )
    errors = []

    def work(number):
        draw = random.Random(f"{seed} {number}")
        while True:
            with lock:
                tensor = next(turns, None)
            if tensor is None or stop_after is not None and received[0] > stop_after:
                return
            data = bytearray(tensor.numel)
            cuts = sorted(draw.choices(range(tensor.numel + 1), k=draw.randrange(4)))
            tiles = list(zip([0, *cuts], [*cuts, tensor.numel]))
            draw.shuffle(tiles)
            try:
                for start, stop in tiles:
                    reader.read(tensor, start, stop, memoryview(data)[start:stop])
                    if draw.random() < 0.1:
                        time.sleep(draw.random() / 100)
            except CorruptFile:
                refused.add(tensor.file)
            except BaseException as e:
                errors.append(f"{type(e).__name__}: {e}")
                return
            found[tensor.file][tensor.start, tensor.name] = bytes(data)
            reader.release(tensor)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    corrupt = {}
    if stop_after is None and not errors:
        for name in files:
            try:
                reader.check(name)
            except CorruptFile as e:
                corrupt[name] = [str(e), e.hint]
    began = time.monotonic()
    reader.close()
    closing = time.monotonic() - began
    left = [thread.name for thread in set(threading.enumerate()) - before]
    body = {n: b"".join(found[n][at] for at in sorted(found[n])) for n in files}
    return {"sha256": {n: hashlib.sha256(b).hexdigest() for n, b in body.items()},
            "verified": verified, "corrupt": corrupt, "refused": sorted(refused),
            "received": received[0], "window": reader.window_bytes, "held": reader.most_held,
            "largest": largest, "left": left, "errors": errors, "closing": closing}
"""


def content(files: dict[str, bytes]) -> dict[str, str]:
    """By shard: the sha256 of its tensors' bytes."""
    shards = {n: data for n, data in files.items() if n.endswith(".safetensors")}
    starts = {n: 8 + int.from_bytes(data[:8], "little") for n, data in shards.items()}
    return {n: hashlib.sha256(data[starts[n] :]).hexdigest() for n, data in shards.items()}


def promised(files: dict[str, bytes]) -> dict[str, str]:
    return {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if "model-" in n}


def stream(hub: Hub, home: Path, *jobs: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the child says of each (repository, options)."""
    hub.add_user("alice", TOKEN, orgs=["org"])
    code = STREAM + "\nrun = job\ndef job(model, options):\n    return run(model, **options)\n"
    answers, stderr = ask(code, jobs, hub.env(home, TOKEN))
    assert stderr == ""
    return answers


def whole(answer: dict[str, Any], files: dict[str, bytes]) -> None:
    """Every byte as it is on the server, known to be, fetched once, and within the window."""
    assert answer["errors"] == []
    assert answer["sha256"] == content(files)
    assert answer["verified"] == promised(files)
    assert answer["corrupt"] == {}
    assert answer["received"] == sum(len(data) for n, data in files.items() if "model-" in n)
    assert answer["held"] <= answer["window"]
    assert answer["left"] == []


SIZES = [[0, 70_000, 1, 3, 200_001, 0], [5000] * 40, [300_000], [17], [64_000, 0, 128_000]]


def test_a_quiet_day(hub: Hub, tmp_path: Path) -> None:
    files = sharded(SIZES)
    hub.add_repo("org/model", files, private=True)
    (roomy, tight) = stream(hub, tmp_path, ("org/model", {}), ("org/model", {"ahead": 20_000}))
    whole(roomy, files)
    whole(tight, files)
    assert roomy["window"] == roomy["largest"] + (256 << 20)
    assert roomy["held"] == sum(len(data) for n, data in files.items() if "model-" in n)
    assert tight["window"] == tight["largest"] + 20_000


NOISE = [("cut", {}), ("reset", {}), ("status:503", {}), ("429", {"seconds": 0}),
         ("slow", {"seconds": 0.2}), ("expire-token", {}), ("cut", {"after_bytes": 0}),
         ("status:500", {}), ("reset", {"after_bytes": 1})]  # fmt: skip


@pytest.mark.parametrize("rounds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_any_order_any_fault_any_window(rounds: int, hub: Hub, tmp_path: Path) -> None:
    draw = random.Random(rounds)
    made, jobs, faults = [], [], []
    for number in range(rounds):
        sizes = [
            [draw.choice((0, 1, 100, 4096, 33_333, 100_000)) for _ in range(draw.randrange(1, 9))]
            for _ in range(draw.randrange(1, 5))
        ]
        sizes[0].append(50_000)
        repo = f"org/model-{number}"
        made.append(sharded(sizes, number))
        hub.add_repo(repo, made[-1], private=True)
        for _ in range(3):
            hub.fault(f"GET /repos/{repo}/", "slow", draw.randrange(5), seconds=0)
            kind, options = draw.choice(NOISE)
            faults.append(hub.fault(f"GET /repos/{repo}/", kind, **options))
        ahead = draw.choice((0, 5000, 100_000, 1_000_000))
        connections = draw.randrange(1, 6)
        jobs.append((repo, {"seed": number, "ahead": ahead, "connections": connections}))
    answers = stream(hub, tmp_path, *jobs)
    for answer, files in zip(answers, made, strict=True):
        whole(answer, files)
    assert sum(fault.seen for fault in faults) > rounds


def test_urls_that_expire_on_the_way(hub: Hub, tmp_path: Path) -> None:
    files = sharded([[40_000] * 10, [40_000] * 10])
    hub.add_repo("org/model", files, private=True)
    hub.url_seconds = 0.3
    hub.bandwidth(down=600_000)
    (answer,) = stream(hub, tmp_path, ("org/model", {"ahead": 200_000}))
    whole(answer, files)
    assert {r.status for r in hub.log if r.host == "cdn"} == {206, 403}
    assert len(hub.requests("^GET /org/model/resolve/.*model-00001")) > 1


@pytest.mark.parametrize("lfs", [True, False])
def test_a_flipped_bit_is_caught_wherever_it_is(lfs: bool, hub: Hub, tmp_path: Path) -> None:
    sizes = [[30_000, 20_000], [50_000], [10, 20_000]]
    files = sharded(sizes)
    draw = random.Random(lfs)
    names = sorted(n for n in files if "model-" in n)
    jobs: list[tuple[str, dict[str, Any]]] = []
    for number in range(5):
        repo = f"org/model-{number}"
        hub.add_repo(repo, files, private=True, lfs=lambda name: lfs)
        match = rf"GET /(repos|api/resolve-cache)/.*{repo}/.*{draw.choice(names)}"
        hub.fault(match, "slow", 1 + draw.randrange(3), seconds=0)  # the header comes alone
        hub.fault(match, "corrupt", after_bytes=draw.randrange(4000))
        jobs += [(repo, {"ahead": 64_000, "seed": number}), (repo, {})]
    answers = stream(hub, tmp_path, *jobs)
    struck = 0
    for bad, good in zip(answers[::2], answers[1::2], strict=True):
        whole(good, files)  # nothing of what was broken has stayed
        wrong = {n for n, found in bad["sha256"].items() if found != content(files)[n]}
        assert bad["verified"].keys() == set(names) - bad["corrupt"].keys()
        assert wrong <= bad["corrupt"].keys()
        assert len(bad["corrupt"]) <= 1
        assert set(bad["refused"]) <= bad["corrupt"].keys()
        assert bad["errors"] == bad["left"] == []
        for message, hint in bad["corrupt"].values():
            assert "not what the Hub's tree says" in message
            assert "same command" in hint
        struck += len(bad["corrupt"])
    assert struck == 5


def test_the_header_of_the_plan_is_the_header_of_the_file(hub: Hub, tmp_path: Path) -> None:
    """A bit that flips while the plan is made may leave a header as good as any."""
    files = sharded([[5000, 6000]])
    hub.add_repo("org/model", files, private=True)
    at = files["model-00001-of-00001.safetensors"].index(b'"pt"') + 1
    hub.fault("GET /repos/", "corrupt", after_bytes=at)
    first, second = stream(hub, tmp_path, *[("org/model", {})] * 2)
    ((message, _),) = first["corrupt"].values()
    assert "a header with sha256" in message
    assert first["verified"] == {}
    whole(second, files)


def test_what_does_not_pass_is_raised_where_somebody_waits(hub: Hub, tmp_path: Path) -> None:
    files = sharded([[50_000], [60_000], [70_000]])
    hub.add_repo("org/model", files, private=True)
    second = "/repos/.*model-00002"
    hub.fault(f"GET {second}", "slow", seconds=0)  # the header
    hub.fault(f"GET {second}", "expire-token")
    hub.fault("GET /org/model/resolve/.*model-00002", "slow", seconds=0)
    hub.fault("GET /org/model/resolve/.*model-00002", "status:404", times=99)
    (answer,) = stream(hub, tmp_path, ("org/model", {"ahead": 8000, "connections": 1}))
    said = "HubError: the Hub refuses to read org/model: Not Found"
    assert answer["errors"] == [said] * 2  # of the two tensors that did not come
    assert answer["left"] == []


def test_closing_does_not_wait_for_the_server(hub: Hub, tmp_path: Path) -> None:
    files = sharded([[100] + [400_000] * 5])
    silence = 25.0
    jobs = []
    for name, within in ("before the answer", None), ("within the answer", 5000):
        repo = f"org/{name.partition(' ')[0]}"
        hub.add_repo(repo, files, private=True)
        hub.fault(f"GET /repos/{repo}/", "slow", 2, seconds=0)  # the header, the first tensor
        hub.fault(f"GET /repos/{repo}/", "slow", after_bytes=within, seconds=silence)
        jobs.append((repo, {"ahead": 400_000, "connections": 1, "stop_after": 1, "workers": 1}))
    for answer in stream(hub, tmp_path, *jobs):
        assert answer["errors"] == answer["left"] == []
        assert answer["received"] < sum(map(len, files.values()))
        assert answer["closing"] < silence / 5


WAITING = """
import threading
from qconvert.hub.stream import StreamReader
from qconvert.source import open_checkpoint

def job(model):
    checkpoint = open_checkpoint(model)
    first, *_, last = checkpoint.tensors.values()
    reader = StreamReader(checkpoint, list(checkpoint.files), window_bytes=0)
    reader.read(first, 0, 1, memoryview(bytearray(1)))
    said = []

    def wait(what):
        try:
            what()
        except RuntimeError as e:
            said.append(str(e))

    stuck = [
        threading.Thread(target=wait, args=(what,))
        for what in (
            lambda: reader.check(first.file),
            lambda: reader.read(last, 0, 1, memoryview(bytearray(1))),
        )
    ]
    for thread in stuck:
        thread.start()
    for thread in stuck:  # nothing is released, so neither can go on
        thread.join(timeout=0.3)
    waiting = [thread.is_alive() for thread in stuck]
    reader.close()
    for thread in stuck:
        thread.join()
    return {"waiting": waiting, "said": said}
"""


def test_closing_wakes_who_waits(hub: Hub, tmp_path: Path) -> None:
    """A conversion that ends early closes its stream while workers wait for bytes."""
    hub.add_repo("org/model", sharded([[100_000] * 3, [100_000]]))
    (answer,), _ = ask(WAITING, [("org/model",)], hub.env(tmp_path))
    assert answer == {"waiting": [True, True], "said": ["the stream is closed"] * 2}
