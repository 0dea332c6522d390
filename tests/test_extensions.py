"""What packages may add, and that one which cannot be used breaks nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from qconvert import contract, extensions, registry, stored, types
from qconvert.batching.values import CALIBRATION, COMMON
from qconvert.cli import app, convert_verbs
from qconvert.conversion import convert, plan
from qconvert.decoding import open_source
from qconvert.errors import UsageError
from qconvert.request import Request
from qconvert.source import SourceReader
from tests.fault.test_kill import digest, run_forked
from tests.models import tiny
from tests.plugin import FORMATS, METHODS, PLUGIN, ROOT, describe, forget, plug


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages for this process; what was read of it is forgotten at the end."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(PLUGIN)
    forget()
    yield folder
    forget()


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plug(monkeypatch, tmp_path / "site")
    yield
    monkeypatch.undo()
    forget()


def method(name: str, **changes: object) -> str:
    """A module whose METHOD is a copy of the example's, with these changes."""
    given = {"verb": name, **changes}
    listed = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return (
        "from dataclasses import replace\nfrom qconvert_absmax8 import METHOD as OTHER\n"
        f"METHOD = replace(OTHER, {listed})\n"
    )


def add(site: Path, name: str, code: str, package: str = "") -> None:
    """Installs a package with one method."""
    module = f"{package or 'added'}_{name}".replace("-", "_")
    (site / f"{module}.py").write_text(code)
    describe(site, package or f"pkg-{name}", f"[qconvert.methods]\n{name} = {module}:METHOD\n")
    forget()


# ── packages that cannot be used ─────────────────────────────────────────────────────────────

MISTAKES = {
    "boom": ("raise RuntimeError('torn\\nin two')", r"RuntimeError: torn\nin two"),
    "leave": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "nothing": ("", "has no attribute 'METHOD'"),
    "number": ("METHOD = 3", "expected a qconvert.registry.MethodInfo, got int"),
    "hqq": (method("hqq"), "qconvert has that name itself"),
    "batch": (method("batch"), "qconvert has that name itself"),
    "UPPER": (method("UPPER"), "a name is 1 to 32 of a-z"),
    "other": (method("another"), "its verb is another"),
    "trained": (method("trained", calibrated=True), "calibrated methods cannot be added"),
    "homeless": (
        method("homeless", layouts={"gguf": 0}).replace("0}", "OTHER.layouts['absmax8']}"),
        "no format gguf is installed",
    ),
    "shapeless": (
        method("shapeless", layouts={"hqq": None}),
        "expected a qconvert.registry.Layout",
    ),
    "bare": (method("bare", layouts={}), "it has no layouts"),
    "greedy": (method("greedy", options={"model": "x"}), "no option can be called model"),
    "keyword": (method("keyword", options={"class": "x"}), "no option can be called class"),
    "helpless": (method("helpless", options={"clip": 1}), "summary and help are texts"),
    "spaced": (method("spaced", options={"a b": "x"}), "no option can be called a b"),
    "typed": (method("typed", types={"clip": list}).replace("<class 'list'>", "list"), "types: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_method_that_cannot_be_used_is_left_out_and_named(site: Path, name: str) -> None:
    describe(site, "qconvert-absmax8", METHODS + FORMATS)
    code, expected = MISTAKES[name]
    add(site, name, code)
    (found,) = registry.unusable()
    assert (found.name, found.package) == (name, f"pkg-{name}")
    assert expected in found.problem
    assert "\n" not in found.problem
    assert registry.names() == (*(it.verb for it in registry.METHODS), "absmax8")
    assert registry.info("hqq") is next(it for it in registry.METHODS if it.verb == "hqq")
    if name not in ("hqq", "batch"):
        with pytest.raises(UsageError, match="cannot be used: ") as caught:
            registry.info(name)
        assert f"of pkg-{name} 0.1" in str(caught.value)


def test_the_second_package_of_a_name_is_left_out(site: Path) -> None:
    describe(site, "qconvert-absmax8", METHODS + FORMATS)
    add(site, "absmax8", method("absmax8", summary="mine"), package="zzz")
    (found,) = registry.unusable()
    assert str(found) == "the method absmax8 of zzz 0.1"
    assert found.problem == "qconvert-absmax8 has that name already"
    assert registry.info("absmax8").summary != "mine"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "FORMAT.md").unlink(), "has no FORMAT.md"),
        (lambda f: (f / "tensors.json").write_text("{"), "JSONDecodeError"),
        (lambda f: (f / "tensors.json").write_text("{}"), "no loaders, quant_method, skip_list"),
        (lambda f: edit(f, '"quant_method": "absmax8"', '"quant_method": "x"'), "of no format"),
        (
            lambda f: edit(f, '"layer_class"', '"class"'),
            "variant int8 in tensors.json has no layer",
        ),
    ],
)
def test_a_format_that_cannot_be_used_is_left_out(
    site: Path, damage: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "copied_absmax8", raising=False)
    shutil.copytree(PLUGIN / "qconvert_absmax8", site / "copied_absmax8")
    damage(site / "copied_absmax8" / "format")  # type: ignore[operator]
    describe(site, "copied", FORMATS.replace("qconvert_absmax8", "copied_absmax8"))
    forget()
    (found,) = registry.unusable()
    assert expected in found.problem
    assert contract.all_names() == contract.names()
    with pytest.raises(UsageError, match=r"the format absmax8 of copied 0\.1 cannot be used"):
        contract.load("absmax8")


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "tensors.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_broken_package_costs_one_line_and_nothing_else(tmp_path: Path) -> None:
    site = tmp_path / "site"
    describe(site, "torn", "[qconvert.methods]\ntorn = torn_module:METHOD\n")
    describe(site, "qconvert-absmax8", METHODS + FORMATS)
    (site / "torn_module.py").write_text("import a_library_that_is_not_there")
    add(site, "marked", method("marked", summary="[/bold] [8, 4]", options={"clip": "[/] 1"}))
    path = os.pathsep.join([str(ROOT), str(site), str(PLUGIN)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qconvert", *words]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    problem = "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"
    done = run("plan", "int8", "demo", "--json")
    assert done.returncode == 0
    assert done.stderr == f"warning: the method torn of torn 0.1 is left out: {problem}\n"
    assert "[/bold] [8, 4]." in run("--help").stdout
    assert "[/] 1." in run("marked", "--help").stdout
    shown = run("doctor")
    assert "method torn" in shown.stdout
    assert "method absmax8" in shown.stdout
    asked = run("torn", "demo")
    assert asked.returncode == 2
    assert "no such command 'torn'" in asked.stderr.lower()


# ── one that can ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("plugged")
def test_the_row_of_its_format_page() -> None:
    made, container = registry.info("absmax8").build("F32", {})
    assert container.name == "absmax8"
    codes = made.quantize(np.array([[0.5, -1, 0.25, 0], [0, 0, 0, 0]], np.float32), "F32")
    assert codes["weight"].tolist() == [[64, -127, 32, 0], [0, 0, 0, 0]]
    assert codes["weight_scale"].tolist() == [np.float32(1) / np.float32(127), 0]
    with pytest.raises(UsageError, match=r"clip of absmax8: expected 0\.5 to 1, got 3"):
        registry.info("absmax8").build("F32", {"clip": 3})


@pytest.mark.usefixtures("plugged")
def test_a_killed_conversion_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "source")
    one, other, *killed = (
        Request(str(source), "absmax8", output=tmp_path / name, validate=False, device="cpu")
        for name in ("one", "other", "early", "late")
    )
    convert(one)  # what it imports is not imported again in each child
    status, calls = run_forked(other)
    assert status == 0
    for request, at in zip(killed, (calls // 2, calls - 5), strict=True):
        status, _ = run_forked(request, at, "after")
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert request.output is not None
        assert not request.output.exists()
        convert(request)
        assert digest(request.output) == digest(tmp_path / "one")


@pytest.mark.usefixtures("plugged")
def test_any_range_of_a_decoded_weight_is_that_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama", tmp_path / "source")
    out = tmp_path / "out"
    convert(Request(str(source), "absmax8", output=out, validate=False, device="cpu"))
    opened = stored.open_stored(out)
    name = "model.layers.1.mlp.up_proj"
    with opened.reader() as reader:
        weight = stored.LayerReader(opened, name, reader).weight().reshape(-1)
    monkeypatch.setattr(stored, "TILE_ELEMENTS", 640)
    checkpoint = open_source(str(out))
    info = checkpoint.tensors[f"{name}.weight"]
    assert info.dtype == "BF16"
    with SourceReader(checkpoint) as reader:
        for start, stop in ((0, info.numel), (5, 6), (639, 1282), (info.numel - 1, info.numel)):
            bits = np.empty(stop - start, np.uint16)
            reader.read(info, start, stop, bits)
            values = (bits.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_allclose(values, weight[start:stop], rtol=2**-8)


@pytest.mark.usefixtures("plugged")
def test_a_plan_in_another_version_of_the_package_is_another_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(Request("demo", "absmax8")).fingerprint
    assert plan(Request("demo", "absmax8")).fingerprint == first
    shutil.rmtree(next((tmp_path / "site").glob("*.dist-info")))
    describe(tmp_path / "site", "qconvert-absmax8", METHODS + FORMATS, version="0.2")
    forget()
    assert plan(Request("demo", "absmax8")).fingerprint != first
    assert extensions.packages(object(), registry.METHODS) == {}


@pytest.mark.usefixtures("plugged")
def test_without_torch_code_tiles_are_quantized_on_the_cpu() -> None:
    from qconvert.accelerator import Accelerator

    made, _ = registry.info("absmax8").build("F32", {})
    block = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    there, here = Accelerator("cpu")(made, block, "F32"), made.quantize(block, "F32")
    assert there.keys() == here.keys()
    assert all(np.array_equal(there[name], here[name]) for name in here)


def test_without_a_loader_a_result_is_checked_and_no_more(site: Path, tmp_path: Path) -> None:
    describe(site, "qconvert-absmax8", METHODS + FORMATS.replace("qconvert_absmax8", "mute"))
    (site / "mute.py").write_text(
        "from dataclasses import replace\nimport qconvert_absmax8\n"
        "FORMAT = replace(qconvert_absmax8.FORMAT, loader='')\n"
    )
    forget()
    source = tiny("llama", tmp_path / "source")
    result = convert(Request(str(source), "absmax8", output=tmp_path / "out", device="cpu"))
    assert result.verdict == "checked"
    assert result.reports[2].skipped == "qconvert-absmax8 names no loader of absmax8"


def test_a_method_may_write_a_format_of_ours(site: Path) -> None:
    (site / "preset.py").write_text(
        "from qconvert.registry import Layout, MethodInfo\n"
        "LAYOUT = Layout('qconvert.methods.hqq:HQQ', 'qconvert.containers.hqq:HQQ_NATIVE',\n"
        "                {'bits': 3, 'zero': 'real'})\n"
        "METHOD = MethodInfo('hqq3', 'HQQ at 3 bits', {'hqq': LAYOUT}, (3,),\n"
        "                    {'group_size': 'weights in a group'}, {'group_size': int})\n"
    )
    describe(site, "preset", "[qconvert.methods]\nhqq3 = preset:METHOD\n")
    forget()
    planned = plan(Request("demo", "hqq3", {"group_size": 32}))
    assert planned.container.name == "hqq"
    assert (planned.method.bits, planned.method.group_size) == (3, 32)
    with pytest.raises(UsageError, match="hqq3 has no option bits"):
        plan(Request("demo", "hqq3", {"bits": 4}))


def test_what_must_be_given_is_asked_for(site: Path) -> None:
    describe(site, "qconvert-absmax8", METHODS + FORMATS)
    needs = "LAYOUT = replace(OTHER.layouts['absmax8'], method='needs_it:make')\n"
    add(site, "needy", method("needy", layouts=0).replace("=0)", "={'absmax8': LAYOUT})"))
    module = site / "added_needy.py"
    module.write_text(module.read_text().replace("METHOD = ", f"{needs}METHOD = "))
    (site / "needs_it.py").write_text("def make(clip): ...\n")
    with pytest.raises(UsageError, match="needy needs --clip"):
        plan(Request("demo", "needy"))


# ── what names are taken ─────────────────────────────────────────────────────────────────────


def test_every_verb_is_reserved_or_a_method() -> None:
    verbs = {command.name for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    assert verbs <= registry.RESERVED | {method.verb for method in registry.METHODS}


def test_every_common_option_is_taken() -> None:
    parameters = (*convert_verbs.WRITING, *convert_verbs.CALIBRATION)
    taken = {name for name, _, _ in parameters} | COMMON.keys() | CALIBRATION.keys()
    assert taken <= registry.COMMON_OPTIONS


def test_its_readme_explains_all_that_is_asked_of_a_package() -> None:
    text = (PLUGIN / "README.md").read_text()
    asked = {"quantize_torch", *contract._FILES, *contract._KEYS, *contract._VARIANT_KEYS}
    for info in (registry.MethodInfo, contract.FormatInfo):
        asked |= {field.name for field in fields(info)}
    for protocol in (types.Method, types.Container):
        asked |= {name for name in vars(protocol) if not name.startswith("_")}
    assert [name for name in sorted(asked - {"calibrated"}) if f"`{name}" not in text] == []
    for name in re.findall(r"^\| `([\w./]+/[\w.]*)`", text, re.MULTILINE):
        assert (PLUGIN / name).exists()
