"""The batch file: what it asks for becomes the requests that the command line would make."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.batching import short, spec
from qconvert.calibration.options import CalibrationOptions
from qconvert.errors import UsageError
from qconvert.hub.target import PushOptions
from qconvert.layout import DEFAULT_SHARD_BYTES


def read(text: str) -> spec.BatchFile:
    return spec.parse(text, "jobs.yaml")


def labels(text: str) -> list[str]:
    return [job.label for job in read(text).jobs]


def request(entry: str) -> Any:
    """The request of the only job."""
    (job,) = read(f"jobs:\n  - {{{entry}}}").jobs
    return job.request


FILE = """\
defaults:
  output: "${QCONVERT_TEST_OUT:-results}/{name}"
  group-size: 32
  nsamples: 64
models:
  - org/a
  - {model: org/b, revision: v1}
methods: [int8, hqq:4, {method: hqq, bits: 3, group_size: 64, axis: 0}]
exclude:
  - {model: org/b, method: int8}
jobs:
  - {model: demo, method: aqlm, bits: 2, calibration: texts/, output: out/demo}
  - {model: demo, method: "aqlm:1x16g8", validate: false}
settings: {jobs: 2, disk: 200GB, retries: 3}
"""


def test_a_file_with_everything(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(FILE)
    batch = spec.read(path)
    assert batch.path == path
    assert [(job.label, job.where, str(job.request.output)) for job in batch.jobs] == [
        ("org/a int8", (6, 8), "results/a-INT8-8bit"),
        ("org/a hqq:4 group_size=32", (6, 8), "results/a-HQQ-4bit"),
        ("org/a hqq:3 axis=0 group_size=64", (6, 8), "results/a-HQQ-3bit"),
        ("org/b hqq:4 group_size=32", (7, 8), "results/b-HQQ-4bit"),
        ("org/b hqq:3 axis=0 group_size=64", (7, 8), "results/b-HQQ-3bit"),
        ("demo aqlm:2", (12, 12), "out/demo"),
        ("demo aqlm:1x16g8", (13, 13), "results/demo-AQLM-2bit-1x16"),
    ]
    assert [job.request.revision for job in batch.jobs] == [
        None,
        None,
        None,
        "v1",
        "v1",
        None,
        None,
    ]
    assert batch.jobs[2].request.options == {"bits": 3, "group_size": 64, "axis": 0}
    assert batch.jobs[0].request.calibration is None
    assert batch.jobs[5].request.calibration == CalibrationOptions(source="texts/", nsamples=64)
    assert [job.request.validate for job in batch.jobs] == [True] * 6 + [False]
    assert batch.jobs[0].line == 6
    assert batch.jobs[0].folder == Path.cwd() / "results/a-INT8-8bit"
    assert batch.settings == spec.Settings(jobs=2, disk=200 * 10**9, retries=3)
    assert batch.ignored == ()


def test_every_option_of_the_command_line() -> None:
    asked = request(
        "model: org/m, method: hqq, bits: 4, group-size: 64, axis: 1, revision: v1, skip: 'a$',"
        " override: ['down=bits:8', 'up=bits:6,group_size:32'], max-shard-size: 500MB, device: cpu,"
        " threads: 3, experts: quantize, stream: true, push: true, repo_id: 'me/{model}',"
        " private: true, push-revision: '{bits}bit', push_unverified: true"
    )
    assert (asked.model, asked.method, asked.revision) == ("org/m", "hqq", "v1")
    assert asked.options == {"bits": 4, "group_size": 64, "axis": 1}
    assert (asked.skip, asked.experts) == ("a$", "quantize")
    assert asked.overrides == ("down=bits:8", "up=bits:6,group_size:32")
    assert (asked.max_shard_bytes, asked.device, asked.threads) == (500 * 10**6, "cpu", 3)
    assert asked.push == PushOptions("me/m", True, "4bit", unverified=True)
    assert asked.hub_to_hub
    assert asked.output is None
    calibrated = request(
        "model: demo, method: aqlm, scheme: 2x8g8, quality: fast, calibration: ~/t, nsamples: 9,"
        " seqlen: 16, seed: 7, epochs: 0, tune: kl"
    )
    assert calibrated.options == {"scheme": "2x8g8", "quality": "fast"}
    home = str(Path("~/t").expanduser())
    assert calibrated.calibration == CalibrationOptions(home, 9, 16, 7, epochs=0, tune="kl")


def test_what_is_not_said_is_the_default() -> None:
    asked = request("model: demo, method: nf4")
    assert asked == type(asked)("demo", "nf4")
    assert asked.max_shard_bytes == DEFAULT_SHARD_BYTES


def test_types_are_those_of_the_method() -> None:
    asked = request("model: demo, method: nf4, double-quant: false, compute_dtype: float16")
    assert asked.options == {"double_quant": False, "compute_dtype": "F16"}


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "there")
    monkeypatch.setenv("N", "3")
    monkeypatch.setenv("YES", "true")
    monkeypatch.setenv("EMPTY", "")
    asked = request(
        'model: "org/${HERE}", method: "hqq:${N}", group_size: "${SIZE:-32}", push: "${YES}",'
        ' repo_id: "${EMPTY:-me}/${HERE}${EMPTY}", skip: "$", revision: "${N}"'
    )
    assert asked.model == "org/there"
    assert asked.options == {"bits": 3, "group_size": 32}
    assert asked.push == PushOptions("me/there")
    assert asked.skip == "$"
    assert asked.revision == "3"


def test_closer_words_win_and_a_null_takes_back() -> None:
    text = """
defaults: {skip: a, revision: r, device: cpu, experts: quantize}
models: [{model: org/m, skip: b, threads: 1}]
methods: [int8, {method: hqq:4, skip: c, revision: ~, threads: 2}]
jobs: [{model: demo, method: eetq, skip: null}]
"""
    found = [job.request for job in read(text).jobs]
    assert [(it.skip, it.revision, it.threads) for it in found] == [
        ("b", "r", 1), ("c", None, 2), (None, "r", None)
    ]  # fmt: skip
    assert {it.device for it in found} == {"cpu"}


def test_defaults_hold_for_the_methods_that_have_them() -> None:
    text = "models: [{model: demo, seed: 1}]\ndefaults: {bits: 3, tune: kl, blocksize: 128}\n"
    text += "methods: [int8, hqq]"
    batch = read(text)
    assert [dict(job.request.options) for job in batch.jobs] == [{}, {"bits": 3}]
    assert batch.ignored == (("seed", 1), ("tune", 2), ("blocksize", 2))


def test_a_container_is_a_default_where_there_is_a_choice() -> None:
    text = "defaults: {container: compressed-tensors}\nmodels: demo\nmethods: [int8, nf4, hqq:4]"
    assert [job.name for job in read(text).jobs] == [
        "demo-INT8-8bit-compressed-tensors",
        "demo-NF4-4bit",
        "demo-HQQ-4bit-compressed-tensors",
    ]


def test_details_of_a_push_wait_for_one() -> None:
    text = """
defaults: {repo_id: "me/{name}", private: true, push: false}
jobs:
  - {model: demo, method: int8}
  - {model: demo, method: nf4, push: true}
"""
    assert [job.request.push for job in read(text).jobs] == [
        None, PushOptions("me/demo-NF4-4bit", private=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "output", "folder"),
    [
        ("org/Some-Model", "x/{model}-{method}-{bits}", "x/Some-Model-hqq-3"),
        ("/data/my model (v2)/", "{name}", "my-model-v2-HQQ-3bit"),
        ("./m", "../up/{name}", "../up/m-HQQ-3bit"),
        ("demo", "/abs/{method}", "/abs/hqq"),
        ("~/m", "~/x", "~/x"),
        ("demo", "one two/ö", "one two/ö"),
    ],
)
def test_where_results_go(model: str, output: str, folder: str) -> None:
    asked = request(f"model: '{model}', method: 'hqq:3', output: '{output}'")
    assert asked.output == Path(folder).expanduser()
    assert asked.model == (str(Path(model).expanduser()) if model[0] == "~" else model)


@pytest.mark.parametrize(
    ("text", "verb", "options"),
    [
        ("int8", "int8", {}),
        ("hqq:4", "hqq", {"bits": 4}),
        (" hqq : 3 ", "hqq", {"bits": 3}),
        ("hqq", "hqq", {}),
        ("aqlm:2", "aqlm", {"bits": 2}),
        ("aqlm:1x16g8", "aqlm", {"scheme": "1x16g8"}),
        ("bnb:8", "int8", {}),
        ("bnb:4", "nf4", {}),
    ],
)
def test_methods_in_short(text: str, verb: str, options: dict[str, Any]) -> None:
    assert short.method_of(text) == (verb, options)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("hqq:7", "hqq has 8, 6, 5, 4, 3, 2, 1 bits, not 7"),
        ("hqq:four", "hqq:BITS"),
        ("hqq:", "hqq:BITS"),
        ("hqq:²", "hqq:BITS"),
        ("aqlm:", "aqlm:BITS or aqlm:SCHEME"),
        ("int8:8", "expected int8"),
        ("HQQ:4", "did you mean hqq"),
        ("dequantize", "unknown method"),
        ("bnb", "bnb:8 or bnb:4"),
        ("bnb:3", "bnb:8 or bnb:4"),
        ("", "unknown method"),
    ],
)
def test_methods_that_there_are_not(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what.replace("²", ".")):
        short.method_of(text)


METHODS = ["int8", "nf4", "hqq:4", "hqq:3", "aqlm:2", "aqlm:1x16g8"]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.from_regex(r"[a-c]/[a-z]{1,5}", fullmatch=True), min_size=1, max_size=5,
             unique_by=lambda model: model.partition("/")[2]),
    st.lists(st.sampled_from(METHODS), min_size=1, unique=True),
    st.data(),
)  # fmt: skip
def test_the_matrix_is_models_by_methods_less_what_is_excluded(
    models: list[str], methods: list[str], data: st.DataObject
) -> None:
    cells = [(model, method) for model in models for method in methods]
    out = data.draw(st.sets(st.sampled_from(cells), max_size=len(cells) - 1))
    text = f"models: {models}\nmethods: {methods}\nexclude:\n"
    text += "".join(f"  - {{model: {model}, method: {method}}}\n" for model, method in out)
    found = labels(text if out else text.replace("exclude:\n", ""))
    assert found == [f"{model} {method}" for model, method in cells if (model, method) not in out]
    assert found == labels(text)


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        ("{model: b}", ["a int8", "a hqq:4", "a hqq:3"]),
        ("{method: hqq}", ["a int8", "b int8"]),
        ("{method: hqq, bits: 3}", ["a int8", "a hqq:4", "b int8", "b hqq:4"]),
        ("{model: a, method: hqq:3}", ["a int8", "a hqq:4", "b int8", "b hqq:4", "b hqq:3"]),
    ],
)
def test_exclusions(excluded: str, left: list[str]) -> None:
    text = f"models: [a, b]\nmethods: [int8, hqq:4, hqq:3]\nexclude: [{excluded}]"
    assert labels(text) == left


def test_what_is_excluded_need_not_be_possible() -> None:
    text = """
models: [{model: a, stream: true}, b]
methods: [int8, aqlm:2]
exclude: [{model: a, method: aqlm}]
"""
    assert labels(text) == ["a int8", "b int8", "b aqlm:2"]


def test_reading_a_file_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(FILE)
    code = (
        "import sys; from qconvert.batching import spec; spec.read(sys.argv[1]);"
        "print({'torch', 'numpy', 'numba', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
