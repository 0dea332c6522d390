"""A batch file with mistakes is refused before anything starts: all of them, with their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.batching import spec, values
from qconvert.errors import CorruptFile, InvalidJobs, NotFound, SourceError, UnsafePath


def mistakes(text: str) -> list[tuple[int, str]]:
    with pytest.raises(InvalidJobs) as caught:
        spec.parse(text, "jobs.yaml")
    assert caught.value.exit_code == 2
    for line, what in caught.value.problems[:50]:
        assert f"jobs.yaml:{line}: {what}" in str(caught.value)
    return [*caught.value.problems]


def job(entry: str) -> str:
    """The only mistake of a file of one job, which stands on line 2."""
    ((line, what),) = mistakes(f"jobs:\n  - {{{entry}}}")
    assert line == 2
    return what


def test_all_mistakes_are_told_at_once() -> None:
    text = """\
default: {}
defaults:
  output: "results/{nam}"
  vaildate: true
  token: hf_secret
models:
  - org/a
  - {model: org/b, revison: x}
  - 5
methods:
  - int8
  - hqq:7
  - {method: hqq, bits: four}
  - {method: int8, bits: 8}
  - {hqq: 4}
jobs:
  - {model: demo, method: aqlm, nsamples: 0, seqlen: x, stream: true}
  - model: "${QCONVERT_UNSET}"
    method: hqq:4
    override:
      - down=bits:4
      - x
    device: tpu
settings: {jobs: 0, retry: 3}
"""
    found = mistakes(text)
    assert [line for line, _ in found] == [
        1,
        3,
        4,
        5,
        8,
        9,
        12,
        13,
        14,
        15,
        17,
        17,
        17,
        18,
        20,
        23,
        24,
        24,
    ]
    told = "\n".join(what for _, what in found)
    assert "hf_secret" not in told
    for part in (
        "no key 'default' (did you mean defaults?)",
        "output: {nam} is none of {name}, {model}, {method}, {bits}",
        "no key 'vaildate' (did you mean validate?)",
        "HF_TOKEN",
        "no key 'revison' (did you mean revision?)",
        "model: expected text, got 5 (put it in quotes)",
        "hqq has 8, 6, 5, 4, 3, 2, 1 bits, not 7",
        "bits: expected a whole number, got 'four'",
        "int8 has no option 'bits'",
        "method: hqq:…, with no space",
        "nsamples 0: expected a number from 1",
        "seqlen: expected a whole number, got 'x'",
        "cannot be streamed",
        "QCONVERT_UNSET is not set",
        "override 'x' is not REGEX",
        "device: expected auto, cpu, cuda or cuda:0, got 'tpu'",
        "jobs: expected a number from 1 to 1024, got 0",
        "no key 'retry' (did you mean retries?)",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("model: demo", "a job without a method"),
        ("method: int8", "model: expected text, got nothing"),
        ("model: '', method: int8", "model: expected text, got ''"),
        ("model: demo, method: hqk:4", "did you mean hqq?"),
        ("model: demo, method: hqq:4, bits: 3", "bits is said"),
        ("model: demo, method: hqq:4, group_size: 7", "a multiple of 8, at least 8"),
        ("model: demo, method: hqq:4, group_size: 64.0", "expected a whole number, got 64.0"),
        ("model: demo, method: hqq, bits: true", "expected a whole number, got true"),
        ("model: demo, method: hqq:4, group-size: 8, group_size: 8", "said twice"),
        ("model: demo, method: int8, group_size: 64", "int8 has no option 'group_size'"),
        ("model: demo, method: int8, nsamples: 3", "int8 has no option 'nsamples'"),
        ("model: demo, method: nf4, blocksize: 17", "expected one of 32, 64"),
        ("model: demo, method: nf4, double_quant: 'no'", "expected true or false, got 'no'"),
        ("model: demo, method: nf4, push: yes", "expected true or false, got 'yes'"),
        ("model: demo, method: nf4, compute_dtype: int8", "float16 or bfloat16 or float32"),
        ("model: demo, method: aqlm, scheme: 1x99g8", "bits of a code 99"),
        ("model: demo, method: aqlm, scheme: 2x8g8, bits: 3", "disagree"),
        ("model: demo, method: aqlm, quality: nice", "fast, default, best (quality: default)"),
        ("model: demo, method: aqlm, quality: []", "quality: expected text, got a list"),
        ("model: demo, method: aqlm, override: 'a=bits:3'", "aqlm has no option 'override'"),
        ("model: demo, method: hqq:4, override: 'a=bits:9'", "expected one of 8, 6"),
        ("model: demo, method: hqq:4, override: 'a=axes:0'", "no option axes"),
        ("model: demo, method: hqq:4, override: [5]", "override: expected text, got 5"),
        ("model: demo, method: hqq:4, container: gguf", "container of hqq: expected hqq or"),
        ("model: demo, method: nf4, container: hqq", "nf4 has no option 'container'"),
        ("model: demo, method: hqq:4, axis: 0, container: compressed-tensors", "expected 1, got 0"),
        ("model: demo, method: hqq:4, zero: middle", "no option zero in the container hqq"),
        ("model: demo, method: int8, skip: '('", "not a regular expression"),
        ("model: demo, method: int8, skip: 'a{99999999999}'", "not a regular expression"),
        (f"model: demo, method: int8, skip: '{'(' * 1300}'", "not a regular expression"),
        ("model: demo, method: int8, max_shard_size: 5XB", "a size such as 5GB, got '5XB'"),
        ("model: demo, method: int8, max_shard_size: 0", "a size such as 5GB, got 0"),
        ("model: demo, method: int8, threads: 0", "a number from 1 to 1024"),
        ("model: demo, method: int8, experts: drop", "keep or quantize"),
        ("model: demo, method: int8, revision: 123", "got 123 (put it in quotes)"),
        ("model: demo, method: int8, output: {name}", "got a mapping (put it in quotes)"),
        ("model: demo, method: int8, output: 'x/{name'", "output: { is none of {name}"),
        ("model: demo, method: int8, output: '~nobody-of-that-name/x'", "~nobody-of-that-name"),
        ('model: demo, method: int8, output: "a\\0b"', "output: expected text"),
        (f"model: demo, method: int8, output: {'x' * 5000}", "more than 4,096 characters"),
        ("model: demo, method: int8, output: '${a-b}'", "${a-b} is not ${NAME}"),
        ("model: demo, method: int8, output: '${OPEN'", "${OPEN is not ${NAME}"),
        ("model: demo, method: int8, repo_id: me/x", "repo_id is of a push, but no push"),
        ("model: demo, method: int8, push: true, repo_id: a/b/c", "not ORG/NAME"),
        ("model: demo, method: int8, push: true, validate: false", "push_unverified: true"),
        ("model: demo, method: int8, overwrite: true", "skips what is done"),
        ("model: demo, method: int8, no-validate: true", "write validate: false"),
        ("model: demo, method: int8, hf_token: hf_abc", "HF_TOKEN"),
        ("model: demo, method: dequantize", "unknown method 'dequantize'"),
    ],
)  # fmt: skip
def test_a_job(entry: str, what: str) -> None:
    told = job(entry)
    assert what in told
    assert "hf_abc" not in told


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("{}", 1, "no jobs"),
        ("jobs: []", 1, "no jobs"),
        ("jobs:\n", 1, "no jobs"),
        ("models: []\nmethods: [int8]", 1, "no jobs"),
        ("\nmodels: [demo]", 2, "models without methods"),
        ("\nmethods: [int8]", 2, "methods without models"),
        ("models: {a: b}\nmethods: int8", 1, "models: expected a list, got a mapping"),
        ("jobs: demo", 1, "jobs: expected a list"),
        ("jobs:\n- demo", 2, "expected {model: …, method: …}, got 'demo'"),
        ("models: demo\nmethods: int8\ndefaults: x", 3, "defaults: expected a mapping"),
        ("models: demo\nmethods: int8\nsettings: x", 3, "settings: expected a mapping"),
        ("models: demo\nmethods: int8\nsettings:\n  disk: huge", 4, "a size such as 5GB"),
        ("models: demo\nmethods: int8\nexclude:\n- {model: dmeo}", 4, "no model and method"),
        ("models: demo\nmethods: int8\nexclude:\n- {bits: 3}", 4, "a model, a method or both"),
        ("models: demo\nmethods: int8\ndefaults: {model: x}", 3, "no key 'model'"),
        ("models: demo\nmethods: int8\n<<: {}", 3, "no key '<<'"),
    ],
)
def test_a_file(text: str, line: int, what: str) -> None:
    ((where, told),) = mistakes(text)
    assert (where, what in told) == (line, True), told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "models:\n- org/m\n- you/m\nmethods: [int8]",
            [(3, "you/m int8 and org/m int8 (line 2) would both write m-INT8-8bit")],
        ),
        (
            "models: demo\nmethods:\n- hqq:4\n- {method: hqq:4, group_size: 32}",
            [
                (
                    4,
                    "demo hqq:4 group_size=32 and demo hqq:4 (line 3) "
                    "would both write demo-HQQ-4bit",
                )
            ],
        ),
        (
            "jobs:\n- {model: a, method: int8, output: x/../y}\n"
            "- {model: b, method: nf4, output: ./y/}",
            [(3, "b nf4 and a int8 (line 2) would both write y")],
        ),
        (
            "jobs:\n- {model: a, method: int8, output: y/z}\n- {model: b, method: nf4, output: y}",
            [(2, "a int8 and b nf4 (line 3) would write one inside the other's folder")],
        ),
        (
            "defaults: {push: true, repo_id: Me/x}\njobs:\n- {model: a, method: int8}\n"
            "- {model: b, method: nf4, repo_id: me/x}\n- {model: b, method: fp4, create_pr: true}\n"
            "- {model: b, method: eetq, push_revision: v2}",
            [(4, "b nf4 and a int8 (line 3) would both be pushed to me/x")],
        ),
    ],
)
def test_two_jobs_do_not_write_to_one_place(text: str, told: list[tuple[int, str]]) -> None:
    assert mistakes(text) == told


def test_links_to_one_folder_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    text = "".join(
        f"- {{model: {name}, method: int8, output: {tmp_path}/{where}/x}}\n"
        for name, where in (("a", "real"), ("b", "link"))
    )
    assert "would both write" in mistakes(f"jobs:\n{text}")[0][1]


def test_the_same_mistake_of_many_jobs_is_told_once() -> None:
    models = ", ".join(f"m{i}" for i in range(300))
    text = f"models: [{models}]\nmethods: [{{method: hqq, group_size: 7}}]"
    assert len(mistakes(text)) == 1


def test_a_file_of_nothing_but_mistakes_is_given_up() -> None:
    found = mistakes("models: [demo]\nmethods:\n" + "".join(f"- x{i}\n" for i in range(2000)))
    assert len(found) == values.MAX_PROBLEMS


def test_too_many_jobs() -> None:
    models = ", ".join(f"m{i}" for i in range(5001))
    assert "more than 10,000 jobs" in mistakes(f"models: [{models}]\nmethods: [int8, nf4]")[0][1]


def test_what_is_quoted_cannot_move_the_cursor() -> None:
    ((_, what),) = mistakes('"\\e[2J": 1\nmodels: demo\nmethods: int8')
    assert "\x1b" not in what


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "not a YAML mapping in"),
        (b"- a", "not a YAML mapping in"),
        (b"jobs:\n\t- a", "not valid YAML at line 2: "),
        (b"jobs: [\n", "not valid YAML at line 2: "),
        (b"a: 1\n\nb: 2\na: 3", "duplicate key 'a', line 4"),
        (b"a: &x 1", "anchors and aliases are not allowed, line 1"),
        (b"a: 1\nb: !!python/name:os.system x", "tags are not allowed, line 2"),
        (b"a: 1\n---\nb: 2", "more than one document"),
        (b"a: " + b"[" * 50, "nested more than 8 deep"),
        (b"a: 1\nb: \xff", "not UTF-8 at line 2"),
        ("models: demo".encode("utf-16"), "not UTF-8 at line 1"),
        (b"a: \x00", "not valid YAML"),
        (b"#" * 1_000_001, "more than 1,000,000 bytes"),
    ],
)
def test_what_is_no_batch_file(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match=what) as caught:
        spec.read(path)
    assert "jobs.yaml" in str(caught.value)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_windows_files_are_read(tmp_path: Path, newline: str) -> None:
    path = tmp_path / "jobs.yaml"
    text = f"models: [demo]{newline}methods: [int8]{newline}"
    path.write_bytes(text.encode("utf-8-sig"))
    assert len(spec.read(path).jobs) == 1


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", f"{tmp_path}/a\0b", f"{tmp_path}/\ud800", ""):
        with pytest.raises(SourceError):
            spec.read(path)
    with pytest.raises(NotFound, match=r"no such file in .*none\.yaml"):
        spec.read(tmp_path / "none.yaml")
    with pytest.raises(UnsafePath, match="not a regular file"):
        spec.read(tmp_path)
    with pytest.raises(SourceError):
        spec.read(tmp_path / ("x" * 300))
    (tmp_path / "link").symlink_to("real.yaml")
    (tmp_path / "real.yaml").write_text("models: demo\nmethods: int8")
    assert len(spec.read(tmp_path / "link").jobs) == 1
