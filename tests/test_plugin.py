"""A third party's method and format, from a package that pip has put into a new environment."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny
from tests.plugin import fresh_environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="builds without isolation"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_environment(tmp_path_factory.mktemp("environment") / "env")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("plugin-source"))


@pytest.fixture(scope="module")
def made(python: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the format, converted and proved by the command line."""
    folder = tmp_path_factory.mktemp("plugin-made") / "out"
    words = ("absmax8", str(source), "--skip", "k_proj", "-o", str(folder), "--json")
    assert json.loads(run(python, *words))["verdict"] == "verified"
    return folder


def run(python: Path, *words: str, code: int = 0) -> str:
    """`qconvert WORDS…` of that environment alone; what it prints on stdout."""
    return child(python, "-m", "qconvert", *words, code=code)


def child(python: Path, *words: str, code: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *words], env=environment, cwd=python.parent, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert not done.stderr or words[2] in ("absmax8", "plan") or code, done.stderr
    return done.stdout


def test_the_reload_level_ran_the_packages_own_loader(made: Path) -> None:
    manifest = json.loads((made / "qconvert-manifest.json").read_text())
    reload = manifest["validation"]["reports"][2]
    assert reload["data"]["loader"] == "qconvert_absmax8.loading:load of qconvert-absmax8 0.1.0"
    assert reload["data"]["loader_error"] < 1e-2
    classes = next(it for it in reload["checks"] if it["name"] == "every layer has its class")
    assert "12 × qconvert_absmax8.loading.Absmax8Linear" in classes["detail"]
    assert manifest["versions"]["qconvert-absmax8"] == "0.1.0"
    assert manifest["command"].startswith("qconvert absmax8 ")
    card = (made / "README.md").read_text()
    assert "from qconvert_absmax8.loading import load" in card
    assert "- absmax8" in card


def test_the_verbs_know_it(python: Path, source: Path, made: Path) -> None:
    helped = run(python, "absmax8", "--help")
    assert "--clip" in helped
    assert "The part of each row" in helped
    assert "absmax8" in run(python, "--help")
    known = json.loads(run(python, "formats", "--json"))
    assert known["methods"]["absmax8"]["formats"] == ["absmax8"]
    assert known["loaders"]["absmax8"][0]["readable_here"] is True
    added = json.loads(run(python, "doctor", "--json"))["extensions"]
    assert [(it["kind"], it["package"], it["problem"]) for it in added] == [
        ("method", "qconvert-absmax8 0.1.0", ""),
        ("format", "qconvert-absmax8 0.1.0", ""),
    ]
    planned = json.loads(run(python, "plan", "absmax8", str(source), "--clip", "0.9", "--json"))
    assert planned["container"] == "absmax8"
    run(python, "absmax8", str(source), "--clip", "2", code=2)
    run(python, "validate", str(made), "--loader", "transformers==4.57.6", code=2)


API = """
import json, sys
from pathlib import Path
import qconvert
from qconvert import batching
from qconvert.batching.spec import parse
from qconvert.errors import InvalidJobs

source, made, out = map(Path, sys.argv[1:])
said = {"torch": "torch" in sys.modules}
found = qconvert.inspect(made)
said["inspected"] = [found.format, found.verdict, found.fingerprint is not None]
levels = ["contract", "numeric"]
proved = qconvert.validate(made, against=source, levels=levels)
said["proved"] = [report.passed for report in proved.reports]
clipped = qconvert.convert(source, "absmax8", clip=0.9, output=out / "clipped", validate=False)
read = qconvert.validate(out / "clipped", against=source, levels=levels)
said["clipped"] = [report.passed for report in read.reports]
plain = qconvert.dequantize(made, output=out / "plain", validate=False)
said["dequantized"] = str(plain.plan.checkpoint.decoded_from)
said["card"] = qconvert.model_card(made) == (made / "README.md").read_text()
listed = qconvert.formats()
said["formats"] = [listed.methods[-1].verb, listed.loaders["absmax8"][0].loader]
job, = parse("models: [demo]\\nmethods: [{method: absmax8, clip: 0.75}]", "jobs.yaml").jobs
said["job"] = [job.name, dict(job.request.options)]
try:
    parse("models: [demo]\\nmethods:\\n- {method: absmax8, clip: high}", "jobs.yaml")
except InvalidJobs as error:
    said["mistake"] = str(error)
together = qconvert.convert_together(
    source, ["absmax8", "int8"], output=out / "both", validate=False
)
said["together"] = [result.folder.name for result in together]
print(json.dumps(said))
"""


def test_the_api_and_a_batch_file_know_it(
    python: Path, source: Path, made: Path, tmp_path: Path
) -> None:
    words = ("-c", API, str(source), str(made), str(tmp_path))
    said: dict[str, Any] = json.loads(child(python, *words).splitlines()[-1])
    assert said["inspected"] == ["absmax8", "verified", True]
    assert said["proved"] == said["clipped"] == [True, True]
    assert said["dequantized"] == "absmax8 (8 bits)"
    assert said["card"] is True
    assert said["formats"] == ["absmax8", "qconvert-absmax8"]
    assert said["job"] == ["demo-ABSMAX8-8bit", {"clip": 0.75}]
    assert "jobs.yaml:3: clip: expected a number, got 'high'" in said["mistake"]
    assert said["together"] == ["llama-ABSMAX8-8bit", "llama-INT8-8bit"]
    same_weights(made, tmp_path / "plain")


def same_weights(made: Path, plain: Path) -> None:
    """What was dequantized is the product of codes and scales, rounded once."""
    from safetensors.torch import load_file

    codes, weights = (load_file(folder / "model.safetensors") for folder in (made, plain))
    scaled = [name for name in codes if name.endswith("weight_scale")]
    assert len(scaled) == 12
    for name in scaled:
        weight = name.removesuffix("_scale")
        exact = codes[weight].float() * codes[name][:, None]
        assert weights[weight].equal(exact.to(weights[weight].dtype))


def test_help_imports_neither_torch_nor_numpy(python: Path) -> None:
    code = (
        "import sys; sys.argv = ['qconvert', '--help']; from qconvert.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    shown = child(python, "-c", code)
    assert "absmax8" in shown
    assert shown.splitlines()[-1] == "[]"
