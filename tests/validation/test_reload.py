"""The third level: real loaders in a real child process, and what happens to that child."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qconvert import devices
from qconvert.errors import ContractViolation, ReloadFailed
from qconvert.source import open_checkpoint
from qconvert.stored import open_stored
from qconvert.types import Report, Verdict
from qconvert.validation import loaders, require, truncate, validate_folder
from qconvert.validation.reload import check_reload
from tests.models import tiny
from tests.test_signals import start
from tests.validation import faults
from tests.validation.faults import LAYER, failed

Folders = Callable[[str], Path]

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and /proc are Linux's")


def reload(folder: Path, source: Path | None = None, **options: Any) -> Report:
    made_from = open_checkpoint(str(source)) if source else None
    return check_reload(open_stored(folder), made_from, **options)


def check_figures(report: Report) -> None:
    data = report.data
    assert data["device"] == "cpu"
    assert data["tokens"] >= 64
    assert 0 <= data["kl_divergence"] < 0.1
    assert data["top1_agreement"] > 0.5
    assert data["perplexity"] == pytest.approx(data["source_perplexity"], rel=0.1)
    assert data["samples"].keys() == {"prompt", "source", "quantized"}
    assert all(len(sample.split()) > 5 for sample in data["samples"].values())
    assert data["device_name"] == devices.model_name("cpu")
    assert "peak_bytes" not in data  # a CPU keeps no count


def test_three_levels_make_verified(results: Folders, source: Path) -> None:
    steps: list[str] = []
    found = validate_folder(
        results("nf4"), against=source, device="cpu", progress=lambda *p: steps.append(p[2])
    )
    assert [failed(report) for report in found.reports] == [{}, {}, {}]
    assert found.verdict is Verdict.VERIFIED
    require(found.reports)
    check_figures(found.reports[2])
    stored = sum(info.nbytes for info in open_stored(results("nf4")).tensors.values())
    assert found.reports[2].data["loaded_bytes"] == pytest.approx(stored, rel=0.05)
    assert "from_pretrained" in found.reports[2].data["loader"]
    assert "reload: stock loader" in steps


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.METHODS)
def test_every_method_is_verified(name: str, results: Folders, source: Path) -> None:
    found = validate_folder(results(name), against=source, device="cpu")
    assert [failed(report) for report in found.reports] == [{}, {}, {}]
    if name == "eetq":  # its kernel needs a GPU, and a network
        assert found.verdict is Verdict.CHECKED
        return
    assert found.verdict is Verdict.VERIFIED
    loader = found.reports[2].data["loader"]
    assert "from_pretrained" in loader
    assert ("after import qconvert.loaders, hqq" in loader) == name.startswith("hqq")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "nf4", "hqq4"])
@pytest.mark.parametrize(
    "kind", ["llama-untied", "qwen2", "gemma2", "phi3", "gpt2", "bert", "bert-mlm", "vlm", "t5"]
)
def test_other_architectures_are_verified(name: str, kind: str, tmp_path: Path) -> None:
    if kind == "gpt2" and name == "hqq4":
        pytest.skip("HQQ stores no Conv1D")
    source = tiny(kind, tmp_path / "source")
    folder = faults.quantize(source, name, tmp_path / "out")
    found = validate_folder(folder, against=source, device="cpu")
    assert [failed(report) for report in found.reports] == [{}, {}, {}]
    assert found.verdict is Verdict.VERIFIED


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["int8", "nf4", "hqq8"])
def test_other_dtypes_are_verified(name: str, dtype: str, tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "source", dtype=dtype)
    folder = faults.quantize(source, name, tmp_path / "out")
    report = reload(folder, source, device="cpu")
    assert report.skipped == ""
    assert failed(report) == {}


@pytest.mark.slow
def test_a_source_that_asks_for_code_is_loaded_without_it(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "source")
    wishes = {"attn_implementation": "evil/kernels", "auto_map": {"AutoConfig": "evil.Config"}}
    faults.configure(source, lambda config: config.update(wishes))
    folder = faults.quantize(source, "hqq4", tmp_path / "out")
    assert failed(reload(folder, source, device="cpu")) == {}


@pytest.mark.slow
def test_without_a_source_the_loader_is_compared_with_our_decoder(results: Folders) -> None:
    found = validate_folder(results("hqq4"), device="cpu")
    assert found.verdict is None
    assert found.unproved == ("numeric: no source to compare with (--against SOURCE)",)
    assert found.reports[2].passed
    assert found.reports[2].data["loader_error"] <= 1e-5
    assert "kl_divergence" not in found.reports[2].data


@pytest.mark.slow
def test_a_layer_that_the_cpu_kernel_cannot_run_is_checked(tmp_path: Path) -> None:
    """bitsandbytes 0.50: out_features must be a multiple of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    folder = faults.quantize(tmp_path / "source", "nf4", tmp_path / "out")
    found = validate_folder(folder, against=tmp_path / "source", device="cpu")
    assert found.verdict is Verdict.CHECKED
    assert "4-bit CPU kernel cannot run" in found.reports[2].skipped


# ── planted faults ───────────────────────────────────────────────────────────────────────────


def test_a_missing_tensor_is_not_made_up(broken: Folders, source: Path) -> None:
    """transformers would initialise it at random, with a warning."""
    folder = broken("hqq4")
    faults.reseal(faults.rewrite(folder, lambda tensors: tensors.pop("model.norm.weight")))
    report = reload(folder, source, device="cpu")
    assert "model.norm.weight" in failed(report)["loading info is empty"]
    with pytest.raises(ReloadFailed, match="missing_keys"):
        require([report])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_layer_of_the_wrong_class(name: str, broken: Folders, source: Path) -> None:
    def list_it(config: dict[str, Any]) -> None:
        config["quantization_config"]["llm_int8_skip_modules"].append(LAYER)

    report = reload(faults.configure(broken(name), list_it), source, device="cpu")
    assert not report.passed
    assert LAYER in "".join(failed(report).values()) or "stock loader" in failed(report)


@pytest.mark.slow
def test_unused_tensors(broken: Folders, source: Path) -> None:
    extra = {"model.layers.7.mlp.up_proj.bias": ("BF16", (2,), bytes(4))}
    folder = faults.rewrite(broken("hqq4"), lambda tensors: tensors.update(extra))
    report = reload(folder, source, device="cpu")
    assert "model.layers.7.mlp.up_proj.bias" in "".join(failed(report).values())


@pytest.mark.slow
def test_a_type_name_that_is_code(broken: Folders, source: Path) -> None:
    """hqq evaluates this tensor; `os.getpid()` is as long as `torch.uint8`."""

    def smuggle(values: Any) -> None:
        values[:] = list(b"os.getpid()")

    folder = faults.edit(broken("hqq4"), f"{LAYER}.unpack_view_dtype", smuggle)
    report = reload(folder, source, device="cpu")
    assert f"not an option of HQQ in {folder}" in failed(report)["stock loader"]
    assert f"{LAYER}.unpack_view_dtype" in failed(report)["stock loader"]
    with pytest.raises(ContractViolation, match=r"expected torch.<type>, got os.getpid\(\)"):
        loaders.refuse_code(open_stored(folder))  # as other loaders than that one are protected


# ── too large ────────────────────────────────────────────────────────────────────────────────


def three_blocks(root: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).bfloat16()
    model.save_pretrained(root / "source", max_shard_size="50KB")
    return root / "source"


def test_a_cut_keeps_the_first_blocks_byte_for_byte(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = three_blocks(tmp_path)
    whole: dict[str, Any] = {}
    for shard in source.glob("*.safetensors"):
        whole |= load_file(shard)
    cut = load_file(
        truncate.cut(open_checkpoint(str(source)), tmp_path / "cut", 2) / "model.safetensors"
    )
    assert cut.keys() == {name for name in whole if ".layers.2." not in name}
    assert all(cut[name].equal(whole[name]) for name in cut)
    assert '"num_hidden_layers": 2' in (tmp_path / "cut" / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "hqq4"])
def test_a_model_too_large_is_reloaded_in_part(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = three_blocks(tmp_path)
    folder = faults.quantize(source, name, tmp_path / "out")
    monkeypatch.setattr(truncate, "available_memory", lambda: 0)
    report = reload(folder, source, device="cpu")
    assert failed(report) == {}
    assert report.passed
    assert report.data["truncated"].startswith("first 2 blocks")
    assert "loaded_bytes" not in report.data


def test_a_model_that_cannot_be_cut_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("t5", tmp_path)
    folder = faults.quantize(source, "int8", tmp_path / "out")
    monkeypatch.setattr(truncate, "available_memory", lambda: 0)
    monkeypatch.setattr(truncate, "_DEPTHS", ("no_such_key",))
    report = reload(folder, source, device="cpu")
    assert report.skipped.startswith(
        "the whole model is too large for this machine's memory, and no stack of"
    )


# ── the child ────────────────────────────────────────────────────────────────────────────────


def test_a_child_that_hangs_is_a_finding(results: Folders) -> None:
    report = reload(results("nf4"), device="cpu", timeout=0.3)
    assert "no answer after 0 s" in failed(report)["the reload process ends well"]


@LINUX
def test_a_child_that_is_killed_is_a_finding(results: Folders) -> None:
    def kill() -> None:
        os.kill(next(children(os.getpid(), "qconvert.validation.child")), signal.SIGKILL)

    killer = threading.Timer(1.0, kill)
    killer.start()
    report = reload(results("nf4"), device="cpu")
    killer.join()
    assert "killed: out of memory?" in failed(report)["the reload process ends well"]


@LINUX
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_the_child_does_not_outlive_its_parent(by: signal.Signals, results: Folders) -> None:
    code = (
        "from tests.validation.test_reload import reload\nfrom pathlib import Path\n"
        f"reload(Path({str(results('nf4'))!r}), device='cpu')"
    )
    parent = start([sys.executable, "-c", code])
    child = next(children(parent.pid, "qconvert.validation.child"))
    parent.send_signal(by)
    parent.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def children(parent: int, name: str) -> Iterator[int]:
    """Waits for child processes of `parent` whose command line holds `name`."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                stat = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
                line = (path / "cmdline").read_text(errors="replace")
            except OSError:
                continue
            if int(stat[1]) == parent and name in line and stat[0] != "Z":
                yield int(path.name)
        time.sleep(0.02)
    raise AssertionError(f"no child {name}")
