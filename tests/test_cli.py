"""The command line as its user meets it: words, exit codes, and what lands on which stream."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qconvert import registry
from qconvert.cli import app, hints
from tests.fault.test_kill import digest
from tests.models import tiny

QCONVERT = [sys.executable, "-m", "qconvert"]
METHODS = [method.verb for method in registry.METHODS]
LOOKING = ["plan", "inspect", "validate", "formats", "doctor"]
VERBS = [*METHODS, "bnb", "dequantize", "transcode", *LOOKING]
HEAVY = (
    "torch", "transformers", "numba", "numpy", "huggingface_hub", "bitsandbytes", "hqq",
    "accelerate",
)  # fmt: skip


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    more = {"capture_output": True, "text": True, "timeout": 120, **more}
    return subprocess.run([*QCONVERT, *words], **more)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "llama-nf4"
    done = run("nf4", str(source), "-o", str(output), "--no-validate", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return output


# ── help, and what it costs ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words", [[], *([verb] for verb in VERBS), *(["plan", m] for m in METHODS)]
)
def test_every_verb_has_help(words: list[str]) -> None:
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert "Usage: " in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "…│" not in shown.output.replace(" ", ""), "a word was cut off"


def test_every_verb_is_documented_at_the_top() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    there = typer.main.get_command(app).commands
    assert {name for name, it in there.items() if not it.hidden} >= {*VERBS, "batch", "convert"}
    assert all(it.hidden or f" {name} " in shown for name, it in there.items())


@pytest.mark.parametrize("verb", ["--help", "--version", "formats", "inspect", "contract"])
def test_looking_imports_nothing_heavy(verb: str, quantized: Path) -> None:
    words = {
        "inspect": ["inspect", str(quantized)],
        "contract": ["validate", str(quantized), "--level", "contract"],
    }.get(verb, [verb])
    script = (
        "import sys, atexit\n"
        f"sys.argv = {['qconvert', *words]!r}\n"
        f"heavy = {HEAVY!r}\n"
        "atexit.register(lambda: print('HEAVY', [m for m in heavy if m in sys.modules]))\n"
        "from qconvert.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────

MISTAKES: dict[str, tuple[int, str, str]] = {
    "hq MODEL": (2, "no such command 'hq'", "qconvert hqq MODEL"),
    "plan hq MODEL": (2, "no such command 'hq'", "qconvert plan hqq MODEL"),
    "hqq MODEL --bit 4": (2, "no such option: --bit", "qconvert hqq MODEL --bits 4"),
    "hqq MODEL --bit=4": (2, "no such option: --bit", "qconvert hqq MODEL --bits=4"),
    "hqq MODEL": (2, "missing option '--bits'", "qconvert hqq --help"),
    "plan hqq": (2, "missing argument 'MODEL'", "qconvert plan hqq --help"),
    "hqq MODEL --bits 7": (2, "expected one of 8, 6, 5, 4, 3, 2, 1, got 7", "qconvert hqq --help"),
    "hqq MODEL --bits x": (2, "invalid value for '--bits'", "qconvert hqq --help"),
    "hqq MODEL --bits 4 --group-size 60": (2, "got 60", "qconvert hqq --help"),
    "hqq MODEL --bits 4 --axis 3": (2, "expected one of 0, 1, got 3", "qconvert hqq --help"),
    "hqq MODEL --bits 4 --override bad": (
        2,
        "--override 'bad' is not REGEX=option:number",
        "qconvert hqq MODEL --bits 4 --override down_proj=bits:4,group_size:64",
    ),
    "hqq MODEL --bits 4 --override mlp=foo:4": (2, "hqq has no option foo", "qconvert hqq --help"),
    "hqq MODEL --bits 4 --skip '('": (
        2,
        "--skip '(' is not a regular expression",
        "qconvert hqq MODEL --bits 4 --skip down_proj",
    ),
    "nf4 MODEL --compute-dtype int4": (
        2,
        "--compute-dtype 'int4': expected one of float16, bfloat16, float32",
        "qconvert nf4 MODEL --compute-dtype bfloat16",
    ),
    "nf4 MODEL --max-shard-size=0": (
        2,
        "--max-shard-size '0' is not a size",
        "qconvert nf4 MODEL --max-shard-size 5GB",
    ),
    "nf4 MODEL --threads 0": (2, "invalid value for '--threads'", "qconvert nf4 --help"),
    "nf4 MODEL --device tpu9": (5, "unknown device 'tpu9'", "qconvert nf4 MODEL --device auto"),
    "aqlm MODEL --bits 5": (2, "expected one of 1, 2, 3, 4, got 5", "qconvert aqlm MODEL --bits 2"),
    "aqlm MODEL --bit 3": (2, "no such option: --bit", "qconvert aqlm MODEL --bits 3"),
    "aqlm MODEL --scheme 2y8": (2, "--scheme '2y8' is not", "qconvert aqlm MODEL --scheme 2x8g8"),
    "aqlm MODEL --bits 2 --scheme 4x8": (
        2, "disagree", "qconvert aqlm MODEL --scheme 4x8 --bits 4"
    ),
    "aqlm MODEL --override up=bits:4": (2, "no such option: --override", "qconvert aqlm --help"),
    "aqlm MODEL --output --dry-run": (2, "--dry-run: no folder is named", "qconvert aqlm --help"),
    "aqlm MODEL --quality great": (
        2,
        "--quality great: expected one of fast, default, best",
        "qconvert aqlm MODEL --quality fast",
    ),
    "aqlm MODEL --tune pv": (
        2, "--tune pv: expected one of none, kl", "qconvert aqlm MODEL --tune none"
    ),
    "aqlm MODEL --nsamples 0": (2, "invalid value for '--nsamples'", "qconvert aqlm --help"),
    "aqlm MODEL --seqlen 4096": (
        2, "reads at most 128 tokens", "qconvert aqlm MODEL --seqlen 128"
    ),
    "aqlm MODEL --calibration ./no.txt": (3, "no such file or folder: ./no.txt", ""),
    "aqlm MODEL --calibration MODEL/config.jsn": (
        3, "no such file or folder", "qconvert aqlm MODEL --calibration MODEL/config.json"
    ),
    "aqlm MODEL --calibration MODEL/model.safetensors": (
        2, "holds tensors, not text", "save the ids in Python"
    ),
    "aqlm MODEL": (3, "has no tokenizer", "qconvert aqlm MODEL --calibration TOKENS.npy"),
    "hqq MODEL --bits 4 --nsamples 3": (2, "no such option '--nsamples'", "qconvert hqq --help"),
    "nf4 MODEL more": (2, "unexpected extra argument", "qconvert nf4 --help"),
    "bnb MODEL --bits 3": (2, "8 and 4 bits, not 3", "qconvert hqq MODEL --bits 3"),
    "nf4 MODEL -o MODEL/inside": (2, "overlaps the source", "qconvert nf4 MODEL --output"),
    "nf4 MODEL -o MODEL/config.json/x": (2, "overlaps the source", "qconvert nf4 MODEL --output"),
    "nf4 MODEL -o /dev/null/x": (
        4, "not a folder in /dev/null", "qconvert nf4 MODEL --output DIR"
    ),
    "nf4 MODEL -o /nowhere/x": (4, "no such folder", "mkdir -p /nowhere"),
    "nf4 ./nowhere": (3, "no such folder: ./nowhere", ""),
    "nf4 MODEL/config.json": (2, "is not a folder", "name the folder that holds config.json"),
    "inspect nowhere": (3, "no such folder: nowhere", ""),
    "inspect MODEL/config.json": (3, "not a folder", ""),
    "inspect MODEL": (2, "the model is not quantized", "name a folder that qconvert wrote"),
    "validate MODEL": (2, "the model is not quantized", "name a folder that qconvert wrote"),
}  # fmt: skip


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `qconvert.cli.main` in this process: (exit code, stdout, stderr)."""
    from qconvert import cli

    monkeypatch.setattr(cli, "_catch_signals", lambda: None)
    monkeypatch.setattr(cli, "_open_streams", lambda: None)
    monkeypatch.setattr(hints, "program", lambda: ["qconvert"])

    def call(*words: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["qconvert", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


@pytest.mark.parametrize("typed", MISTAKES)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["", "json"])
def test_a_mistake_is_one_line_and_a_hint(
    typed: str, flags: list[str], main: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    code, message, hint = MISTAKES[typed]
    before = set(source.iterdir())
    found, out, err = main(*shlex.split(typed.replace("MODEL", str(source))), *flags)
    assert found == code, err
    assert out == ""
    first, _, rest = err.rstrip("\n").partition("\n\n")
    assert first.startswith("error: ")
    assert "\n" not in first
    assert message in first
    expected = hint.replace("MODEL", str(source))
    if (
        flags
        and expected.startswith("qconvert ")
        and "--help" not in expected
        and "bnb" not in typed
    ):
        assert "--json" in rest  # what was typed stays typed
        rest = rest.replace(" --json", "")
    assert rest.startswith(f"hint: {expected}") if hint else rest == ""
    assert set(source.iterdir()) == before


def test_a_hint_to_paste_is_a_command_that_works(source: Path, tmp_path: Path) -> None:
    here = {"cwd": tmp_path}
    wrong = run("nf4", str(source), "--no-validate", "--max-shard-size", "many", **here)
    assert wrong.returncode == 2
    command = shlex.split(wrong.stderr.partition("hint: ")[2])
    right = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert right.returncode == 0, right.stderr
    assert (tmp_path / "llama-NF4-4bit" / "config.json").is_file()


def test_a_bug_is_no_traceback(main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by \x1b[31mzero")

    monkeypatch.setattr("qconvert.cli.show_formats.show", broken)
    code, out, err = main("formats")
    assert (code, out) == (70, "")
    assert err.startswith("bug: ZeroDivisionError: division by \\x1b[31mzero\n\nhint: ")
    assert "QCONVERT_DEBUG=1 qconvert formats" in err


@pytest.mark.parametrize(
    ("hint", "typed", "expected"),
    [
        ("--group-size 64", "hqq m --group-size 60", "qconvert hqq m --group-size 64"),
        ("--group-size 64", "hqq m --group-size=60 -q", "qconvert hqq m -q --group-size 64"),
        ("--output 'a b'", "nf4 m -o x", "qconvert nf4 m --output 'a b'"),
        ("--restart", "nf4 m", "qconvert nf4 m --restart"),
        ("qconvert formats", "hq", "qconvert formats"),
        ("add --restart to begin anew", "nf4 m", "add --restart to begin anew"),
        ("mkdir -p /x", "nf4 m", "mkdir -p /x"),
        ("it's", "nf4 m", "it's"),
        ("", "nf4 m", ""),
    ],
)
def test_pasteable(hint: str, typed: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "program", lambda: ["qconvert"])
    monkeypatch.setattr(sys, "argv", ["qconvert", *typed.split()])
    assert hints.pasteable(hint) == expected


# ── output ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("verb", ["formats", "inspect", "plan", "doctor"])
def test_the_screen_is_readable(verb: str, columns: int, source: Path, quantized: Path) -> None:
    words = {"inspect": [verb, str(quantized)], "plan": [verb, "nf4", str(source)]}.get(
        verb, [verb]
    )
    done = run(*words, env={**os.environ, "COLUMNS": str(columns)})
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "\x1b" not in done.stdout
    expected = {
        "formats": [
            "vllm-bnb-plugin",
            "model.to(device,",
            "--compute-dtype",
            "import qconvert.loaders",
            "transformers 4.57: run 20",
        ],
        "inspect": ["model.layers.*.self_attn.q_proj", "blocksize=64", "not validated"],
        "plan": ["model.safetensors", "not a linear layer", "bits per weight"],
        "doctor": ["transformers", "everything that qconvert needs is installed"],
    }[verb]
    assert [word for word in expected if word not in done.stdout] == []


def test_inspect_says_a_shared_option_once(quantized: Path) -> None:
    shown = run("inspect", str(quantized)).stdout
    assert shown.count("blocksize=64") == 1


def test_json_is_all_that_stdout_holds(source: Path, quantized: Path, tmp_path: Path) -> None:
    commands = {
        "plan": ["plan", "hqq", str(source), "--bits", "4"],
        "dry-run": ["int8", str(source), "--dry-run"],
        "convert": ["int8", str(source), "-o", str(tmp_path / "out"), "--no-validate"],
        "inspect": ["inspect", str(quantized)],
        "formats": ["formats"],
        "doctor": ["doctor"],
        "validate": ["validate", str(quantized), "--level", "contract"],
    }
    found = {}
    done: Any
    for name, words in commands.items():
        if name in ("convert", "validate"):
            done = run(*words, "--json")
            assert (done.returncode, done.stderr) == (0, ""), name
        else:
            done = CliRunner().invoke(app, [*words, "--json"])
            assert (done.exit_code, done.stderr) == (0, ""), name
        found[name] = json.loads(done.stdout, parse_constant=pytest.fail)
    assert set(found["plan"]) == {
        "source", "revision", "method", "container", "architecture", "dtype", "files",
        "total_bytes", "weight_bytes", "source_bytes", "bits_per_weight", "layer_bits_per_weight",
        "peak_bytes", "disk_bytes", "tensors", "experts", "skip_modules", "loaders", "warnings",
        "fingerprint", "calibration", "repository", "target",
    }  # fmt: skip
    assert found["plan"]["total_bytes"] == sum(found["plan"]["files"].values())
    assert found["convert"]["folder"] == str(tmp_path / "out")
    assert found["convert"]["verdict"] is None
    assert found["convert"]["warnings"] == []
    assert set(found["formats"]["methods"]) == set(METHODS)
    assert found["validate"]["reports"][0]["level"] == "contract"
    assert found["doctor"]["fix"] == ""


def test_numbers_that_json_does_not_have_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    from qconvert.cli.show import print_json

    print_json({"kl": float("nan"), "error": (float("inf"), 1.5)})
    assert json.loads(capsys.readouterr().out) == {"kl": None, "error": [None, 1.5]}


def test_quiet_says_nothing_but_errors(source: Path) -> None:
    planned = run("plan", "nf4", str(source), "--quiet")
    assert (planned.returncode, planned.stdout, planned.stderr) == (0, "", "")
    failed = run("nf4", "./nowhere", "--quiet")
    assert (failed.returncode, failed.stdout) == (3, "")
    assert failed.stderr == "error: no such folder: ./nowhere\n"


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["talk", "json"])
def test_nobody_listens(flags: list[str], source: Path, tmp_path: Path) -> None:
    """`qconvert … | true`: the work is done, and done well."""
    output = tmp_path / "out"
    reading, writing = os.pipe()
    os.close(reading)
    words = ["nf4", str(source), "-o", str(output), "--no-validate", *flags]
    done = run(*words, capture_output=False, stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == 0
    assert (output / "qconvert-manifest.json").is_file()


@pytest.mark.parametrize("words", [["formats"], ["formats", "--json"]])
def test_a_full_disk_behind_stdout_is_no_bug(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(*words, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 4
    assert done.stderr.startswith("error: no space left")


def test_closed_streams_and_narrow_encodings() -> None:
    shell = shlex.join([*QCONVERT, "formats"])
    assert subprocess.run(f"{shell} >&-", shell=True, capture_output=True).returncode == 0
    assert subprocess.run(f"{shell}x 2>&-", shell=True, capture_output=True).returncode == 2
    done = run("formats", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr


# ── conversions ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("alias", "verb", "name"),
    [
        (["bnb", "--bits", "8"], "int8", "llama-INT8-8bit"),
        (["bnb", "--bits", "4"], "nf4", "llama-NF4-4bit"),
        (["bnb", "--bits", "4", "--no-double-quant"], "nf4 --no-double-quant", "llama-NF4-4bit"),
    ],
)
def test_bnb_is_another_name_for_int8_and_nf4(
    alias: list[str],
    verb: str,
    name: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte, and in the folder that has the model's name by default."""
    folders = []
    for place, words in (("alias", alias), ("verb", verb.split())):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        done = CliRunner().invoke(app, [*words, str(source), "--no-validate"])
        assert done.exit_code == 0, done.output
        assert [path.name for path in (tmp_path / place).iterdir()] == [name]
        folders.append(digest(tmp_path / place / name))
    assert folders[0] == folders[1]
    assert len(folders[0]) >= 4


@pytest.mark.parametrize("name", ["we ird\nmodel", os.fsdecode(b"caf\xe9")])
def test_names_that_are_hard_to_print(name: str, source: Path, tmp_path: Path) -> None:
    copied = tmp_path / "x" / name
    copied.parent.mkdir()
    copied.mkdir()
    for file in source.iterdir():
        os.link(file, copied / file.name)
    done = run("int8", str(copied), "--no-validate", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] is None
    made = [path for path in tmp_path.iterdir() if path.name.endswith("-INT8-8bit")]
    assert len(made) == 1
    assert made[0].name.isprintable()
    assert run("inspect", str(made[0])).returncode == 0


# ── doctor and formats ───────────────────────────────────────────────────────────────────────


def test_doctor_names_what_is_missing_and_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import metadata

    from qconvert.cli import show_doctor
    from qconvert.examination import examine

    needed = [
        "numpy>=1.26",
        "typer>=999",
        "a-library-that-is-not-there[cpu]>=1.2",
        "another-one>=1; extra == 'dev'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: needed)
    found = examine()
    assert {library.name: library.ok for library in found.libraries} == {
        "numpy": True,
        "typer": False,
        "a-library-that-is-not-there": False,
    }
    command = shlex.split(found.fix)
    assert command[1:4] == ["-m", "pip", "install"]
    assert command[4:] == ["typer>=999", "a-library-that-is-not-there[cpu]>=1.2"]
    show_doctor.show(json=False)
    shown = capsys.readouterr().out
    assert "missing or too old" in shown
    assert found.fix in shown, "the command must not be wrapped"
