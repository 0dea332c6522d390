"""The three measurements of `bench_hub`, each in fresh processes against a server of its own."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from scripts import bench_hub_models as models
from scripts.bench_aqlm_common import Table, Targets
from tests.hub.server import Hub

TOKEN = "hf_BenchToken"
QCONVERT = [sys.executable, "-m", "qconvert"]
MB = 1e6


@dataclass(frozen=True)
class Run:
    """One finished process, and what the server saw of it."""

    seconds: float
    peak_bytes: int
    """Of memory."""
    disk_bytes: int
    """Most that lay below its folder at once."""
    moving: float
    """Seconds from the first request that moved a megabyte to the last of its kind: an upload if
    there were any, so that what the reload of a pushed result reads does not count."""
    requests: int
    down: int
    """Bytes that the server sent."""
    up: int


@contextmanager
def served() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_user("alice", TOKEN, orgs=["org"])
        yield hub
        if hub.leaks or hub.errors:
            sys.exit(
                "\n".join(["the server saw a token, or failed:", *map(str, hub.leaks), *hub.errors])
            )


def occupied(folder: Path) -> int:
    """Bytes that the files below a folder take on disk."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return found


def peak_memory(process: int) -> int:
    """Bytes, from the kernel; 0 where it does not say.

    Not what it tells a parent at the end: that counts the parent's own memory before the exec.
    """
    with suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        if found := re.search(r"VmHWM:\s*(\d+) kB", status):
            return int(found[1]) * 1024
    return 0


def run(hub: Hub, work: Path, command: list[str], *, xet: bool = False) -> Run:
    """Runs a command in an empty folder, which also holds its cache; exits if it fails."""
    folder = Path(tempfile.mkdtemp(dir=work))
    before, disk, memory, ended = len(hub.log), 0, 0, threading.Event()

    def watch() -> None:
        nonlocal disk, memory
        while not ended.wait(0.05):
            disk, memory = max(disk, occupied(folder)), max(memory, peak_memory(child.pid))

    watcher = threading.Thread(target=watch)
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        environment = hub.env(folder / "hf", TOKEN, xet)
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        watcher.start()
        failed = child.wait()
        seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
        if failed:
            output.seek(0)
            text = output.read().decode(errors="replace")
            sys.exit(f"{' '.join(command)} failed:\n{text}\n" + "\n".join(hub.errors))
    shutil.rmtree(folder)
    seen = hub.log[before:]
    down, up = sum(r.bytes_out for r in seen), sum(r.bytes_in for r in seen)
    large = [r for r in seen if r.bytes_out + r.bytes_in > MB and r.ended]
    last = [r for r in large if r.bytes_in > MB] or large
    moving = max(r.ended for r in last) - min(r.started for r in large) if large else 0.0
    return Run(seconds, memory, disk, moving, len(seen), down, up)


def client(code: str) -> list[str]:
    """The Hub's own library, for comparison."""
    return [sys.executable, "-c", f"from huggingface_hub import *\n{code}"]


def median(times: int, once: Callable[[], Run]) -> Run:
    return sorted((once() for _ in range(times)), key=lambda r: r.seconds)[(times - 1) // 2]


def plan(options: argparse.Namespace) -> None:
    """Seconds and bytes of a plan of a thousand shards, near and far."""
    targets = Targets()
    with served() as hub:
        files = models.thousand(options.work / "thousand")
        repo = hub.add_repo("org/thousand", files)
        weights = [entry.size for name, entry in repo.tree().items() if "safetensors" in name]
        small = hub.add_repo("org/small", models.llama(options.work / "llama-1", 1, 10**9))
        headers = sum(len(data) for data in files.values() if isinstance(data, bytes))
        print(
            f"{len(weights) - 1:,} shards, {sum(weights) / 1e9:.0f} GB; config and index are "
            f"{headers / MB:.1f} MB\n"
        )
        table = Table(
            "model", "delay of every answer", "seconds", "requests", "MB fetched", "peak MB"
        )
        for name in (small.id, repo.id):
            for delay in (0.0, 0.05):
                hub.delay = delay
                command = [*QCONVERT, "plan", "hqq", name, "--bits", "4"]
                done = median(
                    options.repeat, lambda command=command: run(hub, options.work, command)
                )
                table.add(
                    name, f"{delay * 1000:.0f} ms", f"{done.seconds:.1f}", done.requests,
                    f"{done.down / MB:.1f}", f"{done.peak_bytes / MB:.0f}",
                )  # fmt: skip
        extra = done.down - headers
        targets.add("a few MB of headers", extra < 20 * MB, f"{extra / MB:.1f} MB beyond the index")
    targets.show()


def stream(options: argparse.Namespace) -> None:
    """Peak disk of --stream and of --stream --push, and how well the work overlaps."""
    work, shard, targets = options.work, int(options.shard * MB), Targets()
    source = models.llama(work / f"llama-{options.layers}", options.layers, 2 * shard)
    with served() as hub:
        hub.add_repo("org/model", source)
        hub.add_repo("org/warm", models.llama(work / "llama-1", 1, 10**9))
        bare = "--no-validate"
        run(hub, work, [*_convert("org/warm", options), bare, "-o", "out"])  # compiles the kernels
        folder = work / "converted"
        shutil.rmtree(folder, ignore_errors=True)
        convert = [*_convert("org/model", options), "--stream"]
        unlimited = run(hub, work, [*convert, bare, "-o", str(folder)])
        size, written = _weights(source), _weights(folder)
        largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
        down = options.rate * MB
        up = down * written / size
        hub.bandwidth(down, up)
        print(
            f"generated Llama, {size / 1e9:.2f} GB, to {written / 1e9:.2f} GB by {options.method}; "
            f"the server sends {down / MB:.0f} and takes {up / MB:.1f} MB/s: both take as long\n"
        )
        table = Table(
            "what", "seconds", "efficiency", "weights move", "efficiency", "peak disk MB",
            "in output shards", "peak MB",
        )  # fmt: skip

        def row(what: str, done: Run, *alone: Run) -> float:
            whole = max((a.seconds for a in alone), default=0) / done.seconds
            moving = max((a.moving for a in alone), default=0) / done.moving
            disk, memory = f"{done.disk_bytes / MB:.0f}", f"{done.peak_bytes / MB:.0f}"
            table.add(
                what, f"{done.seconds:.1f}", f"{whole:.0%}" if alone else "",
                f"{done.moving:.1f}", f"{moving:.0%}" if alone else "",
                disk, f"{done.disk_bytes / largest:.1f}", memory,
            )  # fmt: skip
            return moving

        only_down = run(hub, work, client('snapshot_download("org/model")'))
        row("download alone (hf)", only_down)
        hub.add_repo("org/x")
        upload = f'HfApi().upload_folder(repo_id="org/x", folder_path="{folder}")'
        only_up = run(hub, work, client(upload))
        row("upload alone (hf)", only_up)
        row("--stream --no-validate, no limit on the server", unlimited)
        row("--stream --no-validate", run(hub, work, [*convert, bare, "-o", "out"]), only_down)
        push = [*convert, "--push", "--repo-id"]
        unproved = run(hub, work, [*push, "org/unproved", bare, "--push-unverified"])
        row("--stream --push --no-validate", unproved, only_down, only_up)
        both = run(hub, work, [*push, "org/result"])
        moving = row("--stream --push", both, only_down, only_up)
        targets.add("efficiency of --stream --push ≥ 85 %", moving >= 0.85, f"{moving:.0%}")
        shards = both.disk_bytes / largest
        targets.add("peak disk ≤ 3 output shards", shards < 3.05, f"{shards:.1f}")
        found, expected = (
            {name: entry.sha256 for name, entry in hub.repo(repo).tree().items() if entry.lfs}
            for repo in ("org/result", "org/x")
        )
        targets.add("the same weights", found == expected, f"{len(found)} files")
    targets.show()


def _convert(repo_id: str, options: argparse.Namespace) -> list[str]:
    verb, *rest = options.method.split()
    shard = ["--max-shard-size", str(int(options.shard * MB))]
    return [*QCONVERT, verb, repo_id, *rest, *shard, "--threads", str(options.threads)]


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def push(options: argparse.Namespace) -> None:
    """Seconds of a push of a finished folder, beside the Hub's own uploader."""
    folder = models.result(options.work / "result", int(options.size * 1e9), 4)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{size / 1e9:.2f} GB of random bytes in 4 files; no limit on the server\n")
    table = Table("who", "transfer", "seconds", "MB/s", "peak MB", "ratio")
    for xet in (False, True):
        seconds: dict[str, float] = {}
        for who in ("hf", "qconvert"):
            times: list[float] = []
            for _ in range(options.repeat):
                with served() as hub:
                    command = [*QCONVERT, "push", str(folder), "org/x"]
                    if who == "hf":
                        hub.add_repo("org/x")
                        command = client(
                            f'HfApi().upload_folder(repo_id="org/x", folder_path="{folder}")'
                        )
                    done = run(hub, options.work, command, xet=xet)
                    times.append(done.seconds)
            seconds[who] = statistics.median(times)
            ratio = f"{seconds['hf'] / seconds[who]:.2f}" if who != "hf" else ""
            rate = f"{size / seconds[who] / MB:.0f}"
            transfer = "Xet" if xet else "LFS"
            table.add(
                who, transfer, f"{seconds[who]:.1f}", rate, f"{done.peak_bytes / MB:.0f}", ratio
            )
