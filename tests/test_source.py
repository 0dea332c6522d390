from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert import digest, sidefiles
from qconvert.errors import (
    CorruptFile,
    IndexMismatch,
    MissingShard,
    Network,
    NotFound,
    UnsafePath,
    UnsupportedConfig,
    UsageError,
)
from qconvert.source import SourceReader, open_checkpoint, open_folder
from qconvert.types import RemoteFile, Repository
from tests.tiny_case import make


def write(folder: Path, files: dict[str, bytes | None]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if data is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    weights = make.safetensors(make.base_weights())
    return write(
        tmp_path / "tiny", {"config.json": make.dump(make.CONFIG), "model.safetensors": weights}
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny", {"config.json": make.dump(make.CONFIG)} | make.sharded())


# ── folders ──────────────────────────────────────────────────────────────────────────────────


def test_the_demo() -> None:
    demo = open_checkpoint("demo")
    assert demo.name == "demo"
    assert demo.repo_id is None
    assert demo.revision is None
    assert demo.warnings == ()
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(demo.side_files)
    assert sum(t.nbytes for t in demo.tensors.values()) > 10**6


def test_a_folder_named_demo_needs_a_separator(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single.rename(single.with_name("demo"))
    monkeypatch.chdir(single.parent)
    assert open_checkpoint("./demo").root == single.with_name("demo")
    assert open_checkpoint("demo").root != single.with_name("demo")


def test_one_file_and_two_shards_hold_the_same(single: Path, tmp_path: Path) -> None:
    shards = write(tmp_path / "two", {"config.json": make.dump(make.CONFIG)} | make.sharded())
    one, two = open_checkpoint(str(single)), open_checkpoint(str(shards))
    assert (one.name, two.name) == ("tiny", "two")
    assert list(one.files) == ["model.safetensors"]
    assert list(two.files) == [make.FIRST, make.SECOND]
    assert one.warnings == two.warnings == ()
    assert one.config == two.config == make.CONFIG
    assert one.tensors.keys() == two.tensors.keys() == make.base_weights().keys()
    for checkpoint in (one, two):
        places = [(t.file, t.start) for t in checkpoint.tensors.values()]
        assert places == sorted(places)


def test_shards_in_a_subfolder(tmp_path: Path) -> None:
    files = make.sharded(lambda located: {name: f"sub/{s}" for name, s in located.items()})
    for shard in (make.FIRST, make.SECOND):
        files[f"sub/{shard}"] = files.pop(shard)
    write(tmp_path / "m", {"config.json": make.dump(make.CONFIG)} | files)
    assert list(open_checkpoint(str(tmp_path / "m")).files) == [
        f"sub/{make.FIRST}",
        f"sub/{make.SECOND}",
    ]


def test_a_wrong_total_size_is_a_warning(sharded: Path) -> None:
    index = json.loads((sharded / make.INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (sharded / make.INDEX).write_text(json.dumps(index))
    (warning,) = open_checkpoint(str(sharded)).warnings
    assert "total_size" in warning
    del index["metadata"]
    (sharded / make.INDEX).write_text(json.dumps(index))
    assert open_checkpoint(str(sharded)).warnings == ()


def test_weights_beside_the_index_are_warned_of(sharded: Path, single: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))  # both fixtures share the folder
    assert list(checkpoint.files) == ["model.safetensors"]
    ignored, strays = checkpoint.warnings
    assert make.INDEX in ignored
    assert make.FIRST in strays
    assert make.SECOND in strays


def test_missing_names_are_the_first_five_and_a_count(sharded: Path) -> None:
    index = json.loads((sharded / make.INDEX).read_text())
    index["weight_map"] |= {f"ghost.{i}": make.FIRST for i in range(9)}
    (sharded / make.INDEX).write_text(json.dumps(index))
    with pytest.raises(IndexMismatch, match=r"ghost\.0, .*ghost\.4 and 4 more"):
        open_checkpoint(str(sharded))


def test_names_from_the_index_cannot_write_on_the_terminal(sharded: Path) -> None:
    index = json.loads((sharded / make.INDEX).read_text())
    index["weight_map"]["\x1b[2Jghost"] = make.FIRST
    (sharded / make.INDEX).write_text(json.dumps(index))
    with pytest.raises(IndexMismatch) as caught:
        open_checkpoint(str(sharded))
    assert str(caught.value).isprintable()


def test_no_tensors_at_all(single: Path) -> None:
    (single / "model.safetensors").write_bytes(make.safetensors({}))
    with pytest.raises(CorruptFile, match="no tensors"):
        open_checkpoint(str(single))


@pytest.mark.parametrize(
    ("model", "error", "hint"),
    [
        ("./tinny", NotFound, "did you mean tiny?"),
        ("tinny", Network, "did you mean tiny?"),
        ("dmo", Network, "did you mean demo?"),
        ("./nothing/like/it", NotFound, ""),
        ("a/b/c", NotFound, ""),
        ("with space", NotFound, ""),
        ("nul\0", NotFound, ""),
        ("x" * 5000, NotFound, "neither a folder nor a Hub id"),
        ("tiny/config.json", UsageError, "folder"),
        ("", UsageError, "demo"),
        ("tiny/..", NotFound, "no config"),
    ],
)
def test_what_is_no_model(
    model: str, error: type[Exception], hint: str, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(single.parent)
    with pytest.raises(error) as caught:
        open_checkpoint(model)
    assert hint in f"{caught.value} {caught.value.hint}"  # type: ignore[attr-defined]
    assert str(caught.value).isprintable()


def test_a_folder_has_no_revision(single: Path) -> None:
    for model in ("demo", str(single)):
        with pytest.raises(UsageError, match="--revision"):
            open_checkpoint(model, revision="main")


def test_adapters_and_pipelines_are_named(tmp_path: Path) -> None:
    for name, word in {"adapter_config.json": "LoRA", "model_index.json": "diffusers"}.items():
        folder = write(tmp_path / name, {name: b"{}"})
        with pytest.raises(NotFound, match=r"no config\.json") as caught:
            open_checkpoint(str(folder))
        assert word in caught.value.hint


def test_a_quantized_checkpoint_passes_where_one_is_expected(single: Path) -> None:
    config = make.CONFIG | {"quantization_config": {"quant_method": "hqq"}}
    (single / "config.json").write_bytes(make.dump(config))
    assert open_folder(single, quantized=True).config == config
    with pytest.raises(UsageError, match="already quantized with hqq"):
        open_folder(single)


def test_a_config_of_11_mb(single: Path) -> None:
    (single / "config.json").write_bytes(b" " * 11_000_000 + b"{}")
    with pytest.raises(UnsupportedConfig, match="too large"):
        open_checkpoint(str(single))


# ── links and things that are no files ───────────────────────────────────────────────────────


def test_links_may_lead_anywhere_inside(single: Path) -> None:
    (single / "model.safetensors").rename(single / "real")
    (single / "model.safetensors").symlink_to("real")
    checkpoint = open_checkpoint(str(single))
    assert list(checkpoint.files) == ["model.safetensors"]
    with SourceReader(checkpoint) as reader:
        reader.check_unchanged("model.safetensors")


def test_the_cache_of_the_hub_is_made_of_links(single: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--nice-model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in single.iterdir():
        file.rename(repo / "blobs" / file.name.upper())
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name.upper()))
    assert open_checkpoint(str(snapshot)).name == "nice-model"
    (snapshot / "model.safetensors").unlink()
    elsewhere = tmp_path / "models--org--other" / "blobs" / "x"
    elsewhere.parent.mkdir(parents=True)
    (repo / "blobs" / "MODEL.SAFETENSORS").rename(elsewhere)
    (snapshot / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(UnsafePath, match=r"leads out .* in model\.safetensors"):
        open_checkpoint(str(snapshot))


def replaced_by(path: Path, kind: str) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    match kind:
        case "link out":
            path.symlink_to(outside)
        case "dangling link out":
            path.symlink_to("/nonexistent/file")
        case "link to a link out":
            (path.parent / "second").symlink_to(outside)
            path.symlink_to("second")
        case "link to itself":
            path.symlink_to(path.name)
        case "folder":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "dangling link":
            path.symlink_to("gone")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "kind",
    [
        "link out", "dangling link out", "link to a link out", "link to itself", "folder", "FIFO",
        "link to a device",
    ],
)  # fmt: skip
def test_only_regular_files_inside_the_folder(name: str, kind: str, single: Path) -> None:
    (single / "tokenizer.json").write_bytes(b"{}")
    replaced_by(single / name, kind)
    with pytest.raises(UnsafePath) as caught:
        open_checkpoint(str(single))
    assert f"in {name}" in str(caught.value)


def test_a_dangling_link_to_a_shard_is_a_missing_shard(sharded: Path) -> None:
    replaced_by(sharded / make.SECOND, "dangling link")
    with pytest.raises(MissingShard, match=make.SECOND):
        open_checkpoint(str(sharded))


def test_a_linked_subfolder_does_not_lead_out(tmp_path: Path) -> None:
    files = make.sharded(lambda located: {name: f"sub/{s}" for name, s in located.items()})
    for shard in (make.FIRST, make.SECOND):
        files[f"sub/{shard}"] = files.pop(shard)
    folder = write(tmp_path / "m", {"config.json": make.dump(make.CONFIG)} | files)
    (folder / "sub").rename(tmp_path / "elsewhere")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePath, match="leads out"):
        open_checkpoint(str(folder))


def test_the_folder_itself_may_be_a_link(single: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(single)
    assert open_checkpoint(str(tmp_path / "link")).root == single


# ── reading weights ──────────────────────────────────────────────────────────────────────────


def test_reads_any_range_into_arrays_and_views(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    with SourceReader(checkpoint) as reader:
        for name, (_, values) in make.base_weights().items():
            tensor = checkpoint.tensors[name]
            whole = np.empty(tensor.shape, np.uint16)
            reader.read(tensor, 0, tensor.numel, whole)
            np.testing.assert_array_equal(whole, values)
            view = bytearray(2 * 5)
            reader.read(tensor, 7, 12, memoryview(view))
            assert bytes(view) == values.ravel()[7:12].tobytes()
            reader.read(tensor, 3, 3, np.empty(0, np.uint16))
            with pytest.raises(ValueError, match="not within"):
                reader.read(tensor, 0, tensor.numel + 1, whole)
            with pytest.raises(ValueError, match="buffer of"):
                reader.read(tensor, 0, tensor.numel - 1, whole)


def test_threads_share_the_reader(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    wanted = make.base_weights()

    def check(job: int) -> bool:
        tensor = list(checkpoint.tensors.values())[job % len(wanted)]
        out = np.empty(tensor.shape, np.uint16)
        reader.read(tensor, 0, tensor.numel, out)
        return bool((out == wanted[tensor.name][1]).all())

    with SourceReader(checkpoint) as reader, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(check, range(400)))
        assert len(os.listdir("/proc/self/fd")) < 200
    assert results == [True] * 400


def change(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "shrinks":
            os.truncate(path, len(data) // 2)
        case "grows":
            path.write_bytes(data + b"x")
        case "is replaced by a copy":
            shutil.copyfile(path, path.with_name("copy"))
            os.replace(path.with_name("copy"), path)
        case "is rewritten":
            status = path.stat()
            path.write_bytes(data)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("how", ["shrinks", "grows", "is replaced by a copy", "is rewritten"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_file_that_changes_is_noticed(how: str, opened: bool, single: Path) -> None:
    checkpoint = open_checkpoint(str(single))
    tensor = list(checkpoint.tensors.values())[-1]
    out = np.empty(tensor.shape, np.uint16)
    with SourceReader(checkpoint) as reader:
        if opened:
            reader.read(tensor, 0, tensor.numel, out)
            reader.check_unchanged(tensor.file)
        change(single / tensor.file, how)
        if how == "shrinks" or not opened:
            with pytest.raises(CorruptFile, match=r"in model\.safetensors"):
                reader.read(tensor, 0, tensor.numel, out)
        with pytest.raises(CorruptFile, match="changed while it was read"):
            reader.check_unchanged(tensor.file)


def test_a_downloaded_file_is_hashed_once(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.safetensors"
    data = (single / name).read_bytes()
    promised = RemoteFile(len(data), "0" * 40, hashlib.sha256(data).hexdigest())
    repository = Repository("org/m", "0" * 40, "org/m", False, False, {name: promised})
    hashed: list[str] = []

    def counting(fd: int, *more: Any, **named: Any) -> str:
        hashed.append(os.readlink(f"/proc/self/fd/{fd}"))
        return sha256(fd, *more, **named)

    sha256 = digest.sha256
    monkeypatch.setattr(digest, "sha256", counting)
    checkpoint = open_folder(single, repository=repository)
    for _ in range(2):  # as calibration, pour and validation do, each with a reader of its own
        with SourceReader(checkpoint) as reader:
            reader.check(name)
            reader.check(name)
    assert hashed == [str(single / name)]

    (single / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with SourceReader(checkpoint) as reader, pytest.raises(CorruptFile, match="changed while"):
        reader.check(name)
    again = open_folder(single, repository=repository)
    with SourceReader(again) as reader, pytest.raises(CorruptFile, match="not what the Hub's tree"):
        reader.check(name)
    assert len(hashed) == 2


# ── side files ───────────────────────────────────────────────────────────────────────────────

COPIED = [
    "LICENSE", "LICENSE.txt", "Licence.md", "NOTICE", "USE_POLICY.md", "added_tokens.json",
    "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "qwen.tiktoken", "special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json",
    "vocab.txt",
]  # fmt: skip
LEFT = [
    "README.md", "config.json", "modeling_x.py", "tokenization_x.py", "LICENSE.py", "notice.bin",
    "pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.gguf", ".gitattributes",
    ".env", "trainer_state.json", "vocab.json.bak", "additional_chat_templates/x.py",
    "additional_chat_templates/.jinja", "onnx/tokenizer.json", "original/tokenizer.model",
    "xtokenizer.json", "tokenizer.json\n", "model.safetensors", "flax_model.msgpack",
    "NOTICE.SO", "USE_POLICY.zip",
]  # fmt: skip


def test_the_allow_list(tmp_path: Path) -> None:
    for name in COPIED + LEFT:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert sidefiles.find(tmp_path) == dict.fromkeys(sorted(COPIED), 1)
    assert [name for name in COPIED if not sidefiles.wanted(name)] == []
    assert [name for name in LEFT if sidefiles.wanted(name)] == []


def test_two_names_for_one_file_elsewhere(tmp_path: Path) -> None:
    for name in ("LICENSE", "license"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UnsafePath, match="differ only by case"):
        sidefiles.find(tmp_path)


def test_a_tokenizer_of_100_mb_and_a_byte(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", 100_000_001)
    with pytest.raises(CorruptFile, match=r"too large in tokenizer\.json"):
        sidefiles.find(tmp_path)


# ── config.json on the way out ───────────────────────────────────────────────────────────────

QUANTIZATION = {"quant_method": "hqq", "quant_config": {"nbits": 4}}

SOURCE_CONFIG = """{
  "_name_or_path": "kernels-community/not-code",
  "architectures": [
    "LlamaForCausalLM"
  ],
  "auto_map": {"AutoModel": "modeling_x.X"},
  "attn_implementation": "evil/kernels",
  "_attn_implementation_internal": "kernels-community/flash-attn3",
  "_attn_implementation_autoset": true,
  "custom_pipelines": {},
  "trust_remote_code": true,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
  "tiny": 1.0E-0006,
  "big": 9007199254740993,
  "text_config": {"experts_implementation": "sdpa", "conv_kernel": 4, "x": "a/b@v1:run"},
  "parts": [{"auto_map": 1, "kept": [1, 2.50]}],
  "torch_dtype": "float32",
  "note": "Ünï ⊗"
}"""

OUTPUT_CONFIG = """{
  "_name_or_path": "kernels-community/not-code",
  "architectures": [
    "LlamaForCausalLM"
  ],
  "_attn_implementation_autoset": true,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
  "tiny": 1.0E-0006,
  "big": 9007199254740993,
  "text_config": {
    "conv_kernel": 4
  },
  "parts": [
    {
      "kept": [
        1,
        2.50
      ]
    }
  ],
  "torch_dtype": "bfloat16",
  "note": "Ünï ⊗",
  "dtype": "bfloat16",
  "quantization_config": {
    "quant_method": "hqq",
    "quant_config": {
      "nbits": 4
    }
  }
}
"""


def test_config_loses_code_and_keeps_everything_else() -> None:
    data, removed = sidefiles.output_config(SOURCE_CONFIG.encode(), QUANTIZATION, "bfloat16")
    assert data.decode() == OUTPUT_CONFIG
    assert removed == (
        "auto_map",
        "attn_implementation",
        "_attn_implementation_internal",
        "custom_pipelines",
        "trust_remote_code",
        "text_config.experts_implementation",
        "text_config.x",
        "parts.0.auto_map",
    )
    assert sidefiles.output_config(data, QUANTIZATION, "bfloat16") == (data, ())


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.text("aé\"\\\n", max_size=4)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=3), values, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_config_that_json_wrote_comes_out_as_json_writes_it(config: dict[str, Any]) -> None:
    data, removed = sidefiles.output_config(json.dumps(config).encode(), QUANTIZATION, "float16")
    want = config | {"dtype": "float16", "torch_dtype": "float16"}
    want["quantization_config"] = QUANTIZATION
    assert removed == ()
    assert data.decode() == json.dumps(want, indent=2, ensure_ascii=False) + "\n"


IDS = {
    "org/model/": "org/model",
    "org/model@v1": "org/model with --revision v1",
    "https://huggingface.co/org/model": "org/model",
    "https://huggingface.co/org/model/tree/v1.0": "org/model with --revision v1.0",
}
NO_IDS = ["./no/where", "/no/where", "../no/where", "no//where", "where@v1", "https://elsewhere/"]


@pytest.mark.parametrize("typed", [*IDS, *NO_IDS])
def test_a_hub_id_with_something_around_it(typed: str) -> None:
    with pytest.raises(NotFound, match="no such folder") as caught:
        open_checkpoint(typed)
    expected = f"did you mean {IDS[typed]}, on the Hub?" if typed in IDS else ""
    assert caught.value.hint == expected
