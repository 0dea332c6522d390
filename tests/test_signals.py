"""Ctrl-C, SIGTERM and SIGHUP stop a real conversion in time, and the printed command resumes it."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault.test_kill import digest

HIDDEN, INTERMEDIATE, BLOCKS, VOCAB = 1024, 2816, 5, 256
SECONDS = 5.0
QCONVERT = [sys.executable, "-m", "qconvert"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 64 M random weights: some seconds of work for one thread."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("signals") / "llama"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": BLOCKS, "vocab_size": VOCAB,
        "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for block in range(BLOCKS):
        at = f"model.layers.{block}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{norm}.weight"] = (HIDDEN,)
    torch.manual_seed(0)
    tensors = {n: (torch.randn(s) * 0.02).to(torch.bfloat16) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def convert(model: Path, output: Path) -> list[str]:
    return [
        *QCONVERT, "hqq", str(model), "--bits", "3", "--output", str(output), "--threads", "1",
        "--device", "cpu", "--no-validate", "--max-shard-size", "10MB",
    ]  # fmt: skip


def start(command: list[str], cwd: Path | None = None) -> subprocess.Popen[str]:
    """The command as from a terminal, also where the tests run under nohup or in the background."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_listen_to_signals,
    )


def _listen_to_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_until(
    reached: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60
) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, f"it ended too soon: {process.communicate()[1]}"
        assert time.monotonic() < end
        time.sleep(0.005)


def finished_tensors(output: Path) -> int:
    journal = output.parent / f".{output.name}.qconvert-staging" / "journal.jsonl"
    return journal.read_text().count('"tensor"') if journal.exists() else 0


def stop(process: subprocess.Popen[str], *numbers: int) -> tuple[int, str]:
    """Sends the signals, all pending before the process runs on: (exit code, stderr)."""
    process.send_signal(signal.SIGSTOP)
    for number in numbers:
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=SECONDS)
    assert "Traceback" not in stderr
    return process.returncode, stderr


def test_interrupted_three_times_the_printed_command_ends_with_the_same_bytes(
    model: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(convert(model, whole), check=True, capture_output=True)

    command = convert(model, cut)
    for number, more in ((signal.SIGINT, 2), (signal.SIGTERM, 3), (signal.SIGHUP, 2)):
        moment = finished_tensors(cut) + more
        process = start(command)
        wait_until(lambda at=moment: finished_tensors(cut) >= at, process)  # type: ignore[misc]
        code, stderr = stop(process, number)
        assert code == 128 + number
        assert f"error: interrupted by {number.name}" in stderr
        assert not cut.exists()
        assert finished_tensors(cut) >= moment, "finished work was thrown away"
        command = shlex.split(stderr.partition("\n\nhint: ")[2])
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["resumed_bytes"] > 0
    assert digest(cut) == digest(whole)
    assert not list(tmp_path.glob(".cut*"))


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.8])
def test_a_signal_during_start_up_leaves_nothing(
    seconds: float, model: Path, tmp_path: Path
) -> None:
    process = start(convert(model, tmp_path / "out"))
    time.sleep(seconds)
    code, stderr = stop(process, signal.SIGTERM)
    # before `main` nobody has a handler yet, and the kernel's own way out is as good
    assert code in (128 + signal.SIGTERM, -signal.SIGTERM), stderr
    assert not (tmp_path / "out").exists()


def test_a_second_signal_ends_it_at_once(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(convert(model, output))
    wait_until(lambda: finished_tensors(output) >= 1, process)
    code, stderr = stop(process, signal.SIGINT, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "hint:" not in stderr
    assert not output.exists()


def test_the_resume_command_does_not_restart(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start([*convert(model, output), "--restart"])
    wait_until(lambda: finished_tensors(output) >= 1, process)
    _, stderr = stop(process, signal.SIGINT)
    assert "hint: " in stderr
    assert "--restart" not in stderr


def run_handler(body: str) -> subprocess.CompletedProcess[str]:
    script = "import os, signal, time\nfrom qconvert import cli\ncli._PATIENCE = 0.3\n" + body
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )


def test_an_exception_that_a_library_swallows_still_ends_the_process() -> None:
    done = run_handler(
        "cli._catch_signals()\n"
        "for _ in range(100):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM) if not _ else time.sleep(0.1)\n"
        "    except Exception:\n"
        "        print('swallowed', flush=True)\n"
    )
    assert done.stdout == "swallowed\n"
    assert done.returncode == 128 + signal.SIGTERM
    assert "error: interrupted by SIGTERM" in done.stderr


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """nohup, and jobs that a shell without job control puts into the background."""
    done = run_handler(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "cli._catch_signals()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('alive')\n"
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")


# ── the reload level's child ─────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reload") / "demo-int8"
    command = [*QCONVERT, "int8", "demo", "-o", str(output), "--no-validate", "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    return output


def children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*"):
        yield from map(int, (task / "children").read_text().split())


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_reload_child_dies_with_its_parent(number: signal.Signals, quantized: Path) -> None:
    process = start(
        [*QCONVERT, "validate", str(quantized), "--against", "demo", "--level", "reload"]
    )
    found: list[int] = []

    def at_work() -> bool:
        found[:] = children(process.pid)
        if not found:
            return False
        maps = Path(f"/proc/{found[0]}/maps").read_text()
        return "libtorch" in maps  # past its start-up, where it asks to die with its parent

    wait_until(at_work, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == (-number if number is signal.SIGKILL else 128 + number)
    assert "Traceback" not in stderr
    end = time.monotonic() + SECONDS
    while is_running(found[0]):
        assert time.monotonic() < end, "the child lives on"
        time.sleep(0.01)
