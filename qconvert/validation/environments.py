"""Virtual environments with other versions of the loaders than the one that qconvert runs in.

A loader is named as pip names it, pinned: `transformers==4.57.6`, with pins of its companions
behind commas if need be. What is not pinned gets the version that is installed here, so that one
requirement means one environment; it is made once, by venv and pip, and kept in the user's cache,
or in the folder that QCONVERT_ENVIRONMENTS names.

torch is the running one, and so is what torch requires: of several gigabytes, it is linked and not
installed again. The links lie outside of the environment, where pip installs over them and never
removes anything through them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from qconvert import contract
from qconvert.errors import DependencyMissing, NotWritable, UsageError, printable
from qconvert.types import JSON, Progress

VARIABLE = "QCONVERT_ENVIRONMENTS"
LOADERS = ("transformers", "hqq")
OURS = "qconvert"
"""Named without a version: the running one, for `import qconvert.loaders`."""

_PACKAGE = Path(__file__).parent.parent
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(\[[a-z,]+\])?==([0-9][A-Za-z0-9.!+_-]*)")
_EXTRAS = {"aqlm": "[cpu]"}
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
_BEAT_SECONDS = 30.0
_RECORD = "qconvert-environment.json"
_VERSIONS = (
    "import importlib.metadata as m, json, sys, torch.version; "
    "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
)
_NO_INDEX = re.compile(
    r"NewConnectionError|ConnectTimeoutError|ProxyError|Failed to establish|Max retries exceeded|"
    r"Temporary failure in name resolution|Connection refused|No route to host"
)


@dataclass(frozen=True, slots=True)
class Spec:
    """A loader as it was asked for: `transformers==4.57.6`, and pins beside it."""

    text: str
    loader: str
    """One of LOADERS: the first that is named."""
    pins: Mapping[str, str]
    """Name → version; "" for qconvert."""


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment that is there: its Python, what was asked for, and what it holds."""

    python: Path
    spec: Spec
    versions: Mapping[str, str]
    """Of the loader and its companions, by name."""

    def to_json(self) -> JSON:
        return {"python": str(self.python), "spec": self.spec.text, "versions": self.versions}

    @staticmethod
    def from_json(given: JSON | None) -> Environment | None:
        if given is None:
            return None
        return Environment(Path(given["python"]), parse(given["spec"]), given["versions"])


def parse(text: str) -> Spec:
    """The loader that `--loader` names; raises UsageError."""
    pins: dict[str, str] = {}
    for part in (word.strip() for word in text.split(",")):
        found = _PIN.fullmatch(part)
        if part == OURS:
            pins[OURS] = ""
        elif found is None:
            raise UsageError(
                f"--loader {printable(text)}: {printable(part)!r} is no pinned package",
                hint="--loader transformers==4.57.6",
            )
        else:
            pins[re.sub(r"[-_.]+", "-", found[1]).lower()] = found[3]
    loader = next(iter(pins))
    if loader not in LOADERS:
        raise UsageError(
            f"--loader {printable(text)}: expected {' or '.join(LOADERS)} first, got {loader}",
            hint=f"--loader transformers==4.57.6,{printable(text)}",
        )
    return Spec(text, loader, pins)


def make(spec: Spec, library: str, progress: Progress | None = None) -> Environment:
    """The environment with that loader, and the libraries of the format `library` beside it.

    It is made if it is not there, or no longer works, which takes minutes. Raises
    DependencyMissing where pip cannot install it, UsageError for a loader that does not read the
    format, and NotWritable.
    """
    if spec.loader == "hqq" != library:
        raise UsageError(
            f"--loader {printable(spec.text)}: hqq does not read {library}",
            hint="--loader transformers==4.57.6",
        )
    requirements = _requirements(spec, library)
    root = folder()
    ours = str(_PACKAGE) if OURS in spec.pins else ""
    key = hashlib.sha256("\n".join([*requirements, sys.version, sys.platform, ours]).encode())
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{spec.loader}-{spec.pins[spec.loader]}")
    home = root / f"{name}-{key.hexdigest()[:12]}"

    def beat() -> None:
        if progress is not None:
            progress(0, 1, f"installing {spec.text} and what it needs (minutes, once)")

    try:
        versions = _installed(home, requirements)
        if versions is None:
            root.mkdir(parents=True, exist_ok=True)
            with _alone(root, beat):
                versions = _installed(home, requirements)
                if versions is None:
                    _build(home, requirements, beat, linked=OURS in spec.pins)
                    versions = _installed(home, requirements)
    except OSError as e:
        raise NotWritable(
            f"no environment can be made in {printable(root)}: {e}", hint=f"export {VARIABLE}=DIR"
        ) from e
    if versions is None:
        raise DependencyMissing(
            f"{spec.text} was installed, and cannot be imported",
            file=home,
            hint="pin what it needs: --loader 'transformers==4.57.6,accelerate==1.10.0'",
        )
    return Environment(_python(home), spec, versions)


def folder() -> Path:
    """Where environments are kept."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser().resolve()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).resolve() / "qconvert" / "environments"


def _requirements(spec: Spec, library: str) -> list[str]:
    """What pip is asked for: the pins, then the companions, as they are here."""
    pins = {name: version for name, version in spec.pins.items() if name != OURS}
    for name in ("torch", "transformers", "accelerate", *contract.load(library).libraries):
        pins.setdefault(name, version_here(name))
    return [
        f"{name}{_EXTRAS.get(name, '')}" + (f"=={version}" if version else "")
        for name, version in pins.items()
    ]


def version_here(name: str) -> str:
    """Without a local part ("+cpu"), which no index has; "" where it is not installed."""
    found = _distribution(name)
    return found.version.partition("+")[0] if found else ""


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


# ── what is there ────────────────────────────────────────────────────────────────────────────


def _python(home: Path) -> Path:
    return home / "bin" / "python"


def _installed(home: Path, requirements: Sequence[str]) -> dict[str, str] | None:
    """Name → version of what was required; None if the environment is not there or is broken."""
    try:
        record = json.loads((home / _RECORD).read_text("utf-8"))
        names = list(record["versions"])
        done = subprocess.run(
            [_python(home), "-I", "-c", _VERSIONS, *names], capture_output=True, check=True
        )
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, ValueError, KeyError, TypeError, subprocess.CalledProcessError):
        return None
    whole = record["requirements"] == list(requirements) and record["versions"] == found
    return found if whole else None


@contextmanager
def _alone(root: Path, beat: Callable[[], None]) -> Iterator[None]:
    """Waits until no other process makes an environment there."""
    with (root / ".lock").open("w") as lock:
        beat()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ── making one ───────────────────────────────────────────────────────────────────────────────


def _build(
    home: Path, requirements: Sequence[str], beat: Callable[[], None], *, linked: bool
) -> None:
    """Makes it beside its place and moves it there, so that it is whole or not there.

    `beat` is called every few seconds.
    """
    part, links = Path(f"{home}.part"), Path(f"{home}.links")
    for old in (part, links, home):
        shutil.rmtree(old, ignore_errors=True)
    try:
        bare = ["--without-pip"] if find_spec("pip") else []
        made = _run([sys.executable, "-m", "venv", *bare, str(part)], beat)
        if made.returncode:
            raise DependencyMissing(
                f"Python's venv module makes no environment: {_complaint(made)}",
                hint="sudo apt install python3-venv",
            )
        _link(part, links, linked=linked)
        python = str(_python(part))
        pip = [sys.executable, "-m", "pip", "--python", python] if bare else [python, "-m", "pip"]
        pip += ["install", "--quiet", "--no-input", "--no-compile", "--disable-pip-version-check"]
        done = _run([*pip, *requirements], beat)
        if done.returncode:
            raise _refusal(requirements, done)
        names = [re.split(r"\[|==", it)[0] for it in requirements]
        seen = _run([python, "-I", "-c", _VERSIONS, *names], beat)
        versions = json.loads(seen.stdout) if seen.returncode == 0 else {}
        record = {"requirements": list(requirements), "versions": versions}
        (part / _RECORD).write_text(json.dumps(record, indent=2), "utf-8")
        part.rename(home)
    except BaseException:
        for unfinished in (part, links):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _run(command: Sequence[str], beat: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """With the network and pip's own settings, without this process's packages and any token."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_USER", "PIP_TARGET", *_SECRETS}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            while True:
                beat()
                with suppress(subprocess.TimeoutExpired):
                    out, err = child.communicate(timeout=_BEAT_SECONDS)
                    return subprocess.CompletedProcess(command, child.returncode, out, err)
        except BaseException:
            child.kill()
            raise


def _link(part: Path, links: Path, *, linked: bool) -> None:
    """Lets the environment see the running torch, and qconvert if it is to be imported there."""
    links.mkdir()
    for top in sorted({top for it in _torch() for top in _tops(it)}):
        (links / top.name).symlink_to(top)
    if linked:
        (links / OURS).symlink_to(_PACKAGE)
    [site] = part.glob("lib/python*/site-packages")
    (site / "qconvert.pth").write_text(f"{links}\n", "utf-8")


def _torch() -> list[Distribution]:
    """torch and what it requires; nothing where it was not installed by a wheel."""
    found: dict[str, Distribution] = {}
    left = ["torch"]
    while left:
        name = left.pop()
        known = _distribution(name)
        if name in found or known is None or not known.files:
            continue
        found[name] = known
        wanted = [line for line in known.requires or () if "extra ==" not in line]
        left += [it[0] for line in wanted if (it := re.match(r"[A-Za-z0-9._-]+", line))]
    return list(found.values())


def _tops(of: Distribution) -> Iterator[Path]:
    """The files and folders of a distribution that lie in site-packages itself."""
    for file in of.files or ():
        first = Path(file).parts[0]
        if first not in ("..", "__pycache__"):
            yield Path(str(of.locate_file(first)))


def _refusal(requirements: Sequence[str], done: subprocess.CompletedProcess[str]) -> Exception:
    """What pip had to say, in a sentence."""
    wanted, said = ", ".join(requirements), done.stderr
    missing = re.search(r"No matching distribution found for (\S+)", said)
    if _NO_INDEX.search(said) or (missing and "(from versions: none)" in said):
        return DependencyMissing(
            f"pip can install none of {wanted}: no package index was reached, or none has it",
            hint=f"with a network, or with environments made before: export {VARIABLE}=DIR",
        )
    if missing:
        name = re.split(r"\[|[<>=!~]", missing[1])[0]
        return DependencyMissing(
            f"pip finds no {missing[1]} for Python {platform.python_version()}",
            hint=f"{sys.executable} -m pip index versions {name}",
        )
    return DependencyMissing(f"pip cannot install {wanted}: {_complaint(done)}")


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The first error, or the last line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    return printable(next(iter(errors or lines[-1:]), f"exit code {done.returncode}"), 1000)
