"""Token ids from text and from files: spread over all of it, the same every time, in range."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qconvert import errors
from qconvert.calibration import sampling
from qconvert.calibration.documents import Passage
from qconvert.calibration.options import CalibrationOptions, max_positions, scarcity
from qconvert.calibration.tokenfile import open_ids
from qconvert.calibration.tokens import describe, read_tokens
from qconvert.source import open_checkpoint
from qconvert.types import Checkpoint

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The demo's headers with a tokenizer of words `0` to `9999`, whose ids are those + 10, and
    which begins every text with BOS."""
    words = {"<s>": BOS, "</s>": EOS, "?": 3, **{str(i): i + 10 for i in range(10_000)}}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    root = tmp_path_factory.mktemp("model")
    made.save(str(root / "tokenizer.json"))
    demo = open_checkpoint("demo")
    return replace(
        demo,
        root=root,
        config={"vocab_size": 10_010, "eos_token_id": EOS, "max_position_embeddings": 64},
    )


def numbers(path: Path, sizes: Sequence[int]) -> Path:
    """A text of documents, each of so many words, numbered through."""
    start = 0
    lines = []
    for size in sizes:
        lines.append(json.dumps({"text": " ".join(map(str, range(start, start + size)))}))
        start += size
    path.write_text("\n".join(lines))
    return path


def read(model: Checkpoint, source: Path | str | None, **options: Any) -> Any:
    given = None if source is None else str(source)
    return read_tokens(model, CalibrationOptions(source=given, **options))


# ── windows of text ──────────────────────────────────────────────────────────────────────────


def test_long_documents_give_windows_of_one_document(model: Checkpoint, tmp_path: Path) -> None:
    path = numbers(tmp_path / "x.jsonl", [200] * 40)
    found = read(model, path, nsamples=10, seqlen=32)
    assert found.ids.shape == (10, 32)
    assert found.ids.dtype == np.int32
    assert found.warnings == ()
    for row in found.ids:
        inside = row[row >= 10]
        assert len(inside) >= 31
        assert np.array_equal(np.diff(inside), np.ones(len(inside) - 1))
    origins = {int(row[-1] - 10) // 200 for row in found.ids}
    assert len(origins) >= 6, "windows come from few documents"
    assert {int(row[0]) - 10 for row in found.ids} != {200 * o for o in origins}


def test_short_documents_are_strung_together(model: Checkpoint, tmp_path: Path) -> None:
    path = numbers(tmp_path / "x.jsonl", [9] * 100)
    found = read(model, path, nsamples=1000, seqlen=16)
    stream = found.ids.reshape(-1).tolist()
    starts = [at for at, token in enumerate(stream) if token == BOS]
    assert len(starts) > 95
    for at in starts:  # a window that begins with a document needs nothing before it
        assert at % 16 == 0 or stream[at - 1] == EOS
    assert stream.count(EOS) == sum(at % 16 != 0 for at in starts) > 60
    words = [token for token in stream if token >= 10]
    assert len(words) == len(set(words)), "a token is in two windows"
    assert words != sorted(words), "documents come in random order"


def test_all_the_text_is_used_where_there_is_little(model: Checkpoint, tmp_path: Path) -> None:
    path = numbers(tmp_path / "x.jsonl", [500, 3, 77, 1, 300, 40])
    found = read(model, path, nsamples=100, seqlen=16)
    words = Counter(token for token in found.ids.reshape(-1).tolist() if token >= 10)
    assert max(words.values()) == 1
    assert len(words) > 921 - 16
    assert 921 // 16 <= len(found.ids) <= 65
    (warning,) = found.warnings
    assert f"x.jsonl holds {len(found.ids)} samples of 16 tokens, not 100" in warning


def test_windows_are_spread_over_the_whole_text(model: Checkpoint, tmp_path: Path) -> None:
    """One document of 10,000 words without a line break, far more than is kept of it."""
    path = tmp_path / "x.txt"
    path.write_text(" ".join(map(str, range(10_000))))
    found = read(model, path, nsamples=8, seqlen=8)
    starts = sorted(found.ids[:, 1].tolist())
    assert starts[0] < 3000
    assert starts[-1] > 7000
    seeds = {read(model, path, nsamples=8, seqlen=8, seed=s).source["sha256"] for s in range(5)}
    assert len(seeds) == 5


def test_only_the_beginning_of_a_document_has_a_bos(model: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text(" ".join(map(str, range(10_000))))
    found = read(model, path, nsamples=10_000, seqlen=8)
    assert np.count_nonzero(found.ids == BOS) == 1
    assert np.count_nonzero(found.ids >= 10) > 9990


def test_the_same_ids_in_another_process_and_folder(tmp_path: Path) -> None:
    """Of the demo: a hash that must not change from machine to machine, or version to version."""
    code = (
        "import sys; from qconvert.source import open_checkpoint\n"
        "from qconvert.calibration.options import CalibrationOptions\n"
        "from qconvert.calibration.tokens import read_tokens\n"
        "options = CalibrationOptions(sys.argv[1] or None, nsamples=16, seqlen=128, seed=3)\n"
        "found = read_tokens(open_checkpoint('demo'), options)\n"
        "print(found.source['sha256'], found.source['documents'], found.ids.shape)\n"
    )
    import qconvert

    copied = tmp_path / "other name.txt"
    copied.write_bytes((Path(qconvert.__file__).parent / "demo/calibration.txt").read_bytes())
    said = set()
    for source, seed in (("", "0"), (str(copied), "random")):
        done = subprocess.run(
            [sys.executable, "-c", code, source],
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C", "RAYON_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(done.stdout)
    assert said == {
        "28413a4e45e61f521cc25f2a7559caaa886e305d65066289855e6fe7e22f8464 66 (16, 128)\n"
    }


def test_the_demo_has_the_default_number_of_samples() -> None:
    found = read(open_checkpoint("demo"), None)
    assert found.ids.shape == (256, 1024)
    assert found.warnings == ()
    assert {k: found.source[k] for k in ("kind", "name", "revision", "documents")} == {
        "kind": "demo",
        "name": "calibration.txt",
        "revision": None,
        "documents": 66,
    }


def test_too_little_text(model: Checkpoint, tmp_path: Path) -> None:
    for text in ("", "\n\n\n", "1 2 3"):
        path = tmp_path / "x.txt"
        path.write_text(text)
        with pytest.raises(errors.UsageError, match="less than one sample of 16 tokens"):
            read(model, path, nsamples=2, seqlen=16)


def test_few_tokens_for_wide_layers(model: Checkpoint, tmp_path: Path) -> None:
    path = numbers(tmp_path / "x.jsonl", [500])
    options = CalibrationOptions(str(path), nsamples=4, seqlen=64)
    assert read_tokens(model, options, in_features=64).warnings == ()
    (warning,) = read_tokens(model, options, in_features=65).warnings
    assert "256 tokens of calibration are few for layers of 65 columns: 260 or more" in warning
    assert scarcity(256, 65) == warning


def test_a_tokenizer_of_another_model(model: Checkpoint, tmp_path: Path) -> None:
    path = numbers(tmp_path / "x.jsonl", [500])
    small = replace(model, config={**model.config, "vocab_size": 100})
    with pytest.raises(errors.CorruptFile, match=r"tokenizer\.json: expected 0 to 99, got 1 to"):
        read(small, path, nsamples=30, seqlen=16)
    nested = {"text_config": {"vocab_size": 100, "max_position_embeddings": 32}}
    with pytest.raises(errors.CorruptFile, match="expected 0 to 99"):
        read(replace(model, config=nested), path, nsamples=30)


@pytest.mark.parametrize("tokenizer", [None, b"not json", b"{}"])
def test_no_tokenizer(model: Checkpoint, tokenizer: bytes | None, tmp_path: Path) -> None:
    if tokenizer is not None:
        (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    bare = replace(model, root=tmp_path)
    with pytest.raises(errors.UnsupportedConfig, match="no tokenizer") as caught:
        read(bare, numbers(tmp_path / "x.jsonl", [500]), nsamples=2)
    assert caught.value.hint == "--calibration TOKENS.npy"
    np.save(tmp_path / "t.npy", np.arange(128).reshape(2, 64))
    assert read(bare, tmp_path / "t.npy").ids.shape == (2, 64)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), max_size=20),
    seqlen=st.integers(2, 20),
    nsamples=st.integers(1, 30),
    separator=st.sampled_from([None, 0]),
    seed=st.integers(0, 5),
)
def test_no_token_is_used_twice_or_lost(
    sizes: list[int], seqlen: int, nsamples: int, separator: int | None, seed: int
) -> None:
    """Of any passages: windows are as many as fit, and hold each token at most once."""
    starts = np.cumsum([1, *sizes])
    ids = {str(i): list(range(starts[i], starts[i + 1])) for i in range(len(sizes))}
    passages = [Passage(str(i), True) for i in range(len(sizes))]
    found = sampling.windows(
        passages,
        lambda batch: [ids[passage.text] for passage in batch],
        nsamples=nsamples,
        seqlen=seqlen,
        separator=separator,
        random=Random(seed),
    )
    assert found.shape[1:] == (seqlen,)
    used = [token for token in found.reshape(-1).tolist() if token != 0]
    assert len(used) == len(set(used))
    assert set(used) <= set(range(1, sum(sizes) + 1))
    assert len(found) >= min(nsamples, sum(sizes) // seqlen)
    assert len(found) <= nsamples


def test_every_passage_is_as_likely_to_be_kept() -> None:
    """First, last, long and short: 1,000 draws of about a tenth of the text."""
    texts = ["x" * (10 if i % 2 else 50) for i in range(40)]
    kept: Counter[int] = Counter()
    for seed in range(1000):
        passages = (Passage(text, True) for text in texts)
        found = sampling.keep(passages, 120, None, Random(seed))
        assert found.documents == 40
        held = sum(len(passage.text) for passage in found.passages)
        assert 120 <= held < 170
        again = sampling.keep((Passage(f"{i}" + t[2:], i > 3) for i, t in enumerate(texts)),
                              120, None, Random(seed))  # fmt: skip
        kept.update(int(passage.text.strip("x") or 0) for passage in again.passages)
    counts = [kept[i] for i in range(40)]
    assert min(counts) > 60
    assert max(counts) < 200


def test_an_endless_text_is_left_after_enough() -> None:
    seen = []

    def stream() -> Any:
        for number in range(10**9):
            seen.append(number)
            yield Passage("x" * 10, True)

    found = sampling.keep(stream(), 100, 1000, Random(0))
    assert len(seen) == 100
    assert len(found.passages) == 10


# ── token files ──────────────────────────────────────────────────────────────────────────────

ROWS = np.arange(20 * 32).reshape(20, 32)


@pytest.mark.parametrize("dtype", ["<i4", "<i8", ">i8", "u2"])
def test_rows_of_ids(dtype: str, model: Checkpoint, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", ROWS.astype(dtype))
    found = read(model, tmp_path / "t.npy", nsamples=20)
    assert found.ids.dtype == np.int32
    assert np.array_equal(found.ids, ROWS)
    assert found.warnings == ()
    assert found.source["kind"] == "tokens"
    assert found.source["documents"] is None
    some = read(model, tmp_path / "t.npy", nsamples=7).ids
    assert some.shape == (7, 32)
    assert len({row[0] for row in some.tolist()}) == 7
    assert {tuple(row) for row in some.tolist()} < {tuple(row) for row in ROWS.tolist()}
    assert (some[:, 0] // 32 > 10).any()
    cut = read(model, tmp_path / "t.npy", nsamples=20, seqlen=16).ids
    assert all(np.array_equal(np.diff(row), np.ones(15)) for row in cut)
    assert len({int(row[0]) % 32 for row in cut}) > 3


def test_one_stream_of_ids(model: Checkpoint, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(1000))
    found = read(model, tmp_path / "t.npy", nsamples=5, seqlen=16).ids
    whole = read(model, tmp_path / "t.npy", nsamples=62, seqlen=16)
    assert found.shape == (5, 16)
    assert len(np.unique(whole.ids)) == 62 * 16
    assert whole.warnings == ()
    many = read(model, tmp_path / "t.npy", nsamples=63, seqlen=16)
    assert "holds 62 samples of 16 tokens, not 63" in many.warnings[0]


def test_the_plan_knows_the_shape_of_a_token_file(model: Checkpoint, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", ROWS)
    settings, text = describe(model, CalibrationOptions(str(tmp_path / "t.npy")))
    assert (settings.nsamples, settings.seqlen) == (20, 32)
    assert text == {"kind": "tokens", "name": "t.npy", "revision": None}
    wide = replace(model, config={**model.config, "max_position_embeddings": 16})
    assert describe(wide, CalibrationOptions(str(tmp_path / "t.npy")))[0].seqlen == 16


def test_a_large_file_is_read_where_it_is_needed(model: Checkpoint, tmp_path: Path) -> None:
    header = tmp_path / "t.npy"
    np.lib.format.open_memmap(header, mode="w+", dtype=np.int64, shape=(1 << 20, 4096)).flush()
    assert header.stat().st_size > 30 << 30  # sparse
    open_model = replace(model, config={})
    found = read(open_model, header, nsamples=4)
    assert found.ids.shape == (4, 4096)


REFUSED: dict[str, tuple[Any, type[errors.QConvertError], str]] = {
    "floats": (ROWS.astype(np.float32), errors.UsageError, r"float32 \[20, 32\]"),
    "bools": (ROWS > 3, errors.UsageError, "bool"),
    "three dimensions": (ROWS[None], errors.UsageError, r"\[1, 20, 32\]"),
    "a number": (np.array(3), errors.UsageError, "expected token ids"),
    "by columns": (np.asfortranarray(ROWS), errors.UsageError, "stored by columns"),
    "narrow": (ROWS[:, :4], errors.UsageError, "seqlen ≥ 8"),
    "no rows": (ROWS[:0], errors.UsageError, "less than one sample"),
    "too few": (np.arange(10), errors.UsageError, "less than one sample"),
    "negative": (ROWS - 1, errors.CorruptFile, r"t\.npy: expected 0 to 10,009, got -1 to"),
    "out of the vocabulary": (ROWS + 10_000, errors.CorruptFile, "expected 0 to 10,009"),
    "beyond int32": (ROWS + 2**40, errors.CorruptFile, "expected 0 to 10,009"),
    "objects": (ROWS.astype(object), errors.UnsafeFormat, "pickle"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_are_no_token_ids(name: str, model: Checkpoint, tmp_path: Path) -> None:
    array, error, message = REFUSED[name]
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(error, match=message):
        read(model, tmp_path / "t.npy")


def test_broken_token_files(model: Checkpoint, tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", ROWS)
    data = (tmp_path / "whole.npy").read_bytes()
    broken = [data[:n] for n in (0, 5, 7, 30, 127, 128, len(data) - 1)]
    broken += [data[:6] + b"\x09" + data[7:], data[:10] + b"x" * 118 + data[128:], b"PK\x03\x04"]
    for number, content in enumerate(broken):
        path = tmp_path / f"{number}.npy"
        path.write_bytes(content)
        with pytest.raises(errors.CorruptFile, match=path.name):
            read(model, path)
    os.mkfifo(tmp_path / "fifo.npy")
    with pytest.raises(errors.UnsafePath):
        read(model, tmp_path / "fifo.npy")
    with pytest.raises(errors.NotFound):
        read(model, tmp_path / "absent.npy")
    with pytest.raises(errors.UsageError, match="less than --seqlen 64") as caught:
        read(model, tmp_path / "whole.npy", seqlen=64)
    assert caught.value.hint == "--seqlen 32"
    assert open_ids(tmp_path / "whole.npy").width == 32


# ── options ──────────────────────────────────────────────────────────────────────────────────


def test_defaults_by_quality() -> None:
    for quality, nsamples, epochs in (("fast", 128, 1), ("default", 256, 4), ("best", 512, 8)):
        found = CalibrationOptions(quality=quality).resolved(4096)
        assert (found.nsamples, found.seqlen, found.epochs) == (nsamples, 2048, epochs)
    assert CalibrationOptions().resolved(512).seqlen == 512
    assert CalibrationOptions().resolved(None).seqlen == 2048
    assert CalibrationOptions(epochs=0, nsamples=3, seqlen=9).resolved(10).tokens == 27


@pytest.mark.parametrize(
    "wrong",
    [
        {"nsamples": 0}, {"nsamples": -1}, {"nsamples": True}, {"nsamples": 1.5}, {"seqlen": 7},
        {"seed": -1}, {"epochs": -1}, {"quality": "great"}, {"tune": "pv"}, {"nsamples": 10**9},
    ],
)  # fmt: skip
def test_options_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError, match=f"--{next(iter(wrong))}"):
        CalibrationOptions(**wrong)


def test_samples_fit_the_model() -> None:
    with pytest.raises(errors.UsageError, match="reads at most 1024 tokens") as caught:
        CalibrationOptions(seqlen=1025).resolved(1024)
    assert caught.value.hint == "--seqlen 1024"
    assert max_positions({"n_positions": 128}) == 128
    assert max_positions({"text_config": {"max_position_embeddings": 64}}) == 64
    assert max_positions({"max_position_embeddings": -1}) is None
    assert max_positions({"max_position_embeddings": "many"}) is None
