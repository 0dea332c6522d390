"""The card of a folder or a Hub repository: the one its manifest makes, and the one that is there.

`card/` knows manifests and texts; here is where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qconvert import card, strictjson
from qconvert.card import Finding
from qconvert.errors import ContractViolation, NotFound, printable
from qconvert.naming import CARD_NAME
from qconvert.safepath import read_bytes
from qconvert.source import did_you_mean, looks_local
from qconvert.staging import MANIFEST_NAME
from qconvert.stored import MAX_MANIFEST_BYTES
from qconvert.types import JSON

_MAX_CARD = 4_000_000


@dataclass(frozen=True, slots=True)
class _Found:
    """What is looked at: `readme` and `manifest` are None where there are none."""

    readme: str | None
    manifest: JSON | None
    files: frozenset[str]


def model_card(path: str | Path, *, revision: str | None = None) -> str:
    """The card that the manifest of a folder, or a Hub repository, makes: README.md as text.

    Raises NotFound where there is no manifest, SourceErrors and HubErrors.
    """
    found = _open(path, revision)
    if found.manifest is None:
        raise NotFound(
            f"no manifest to make a card of in {printable(path)}",
            hint=f"qconvert card {path} --lint",
        )
    return card.render(found.manifest).decode()


def lint_card(path: str | Path, *, revision: str | None = None) -> list[Finding]:
    """What is wrong with the README.md of any folder or repository, whoever made it.

    Raises as `model_card` does, but for what is not there: that is a finding.
    """
    found = _open(path, revision)
    findings = card.lint(found.readme or "", manifest=found.manifest, files=found.files)
    if found.readme is None:
        fix = f"qconvert card {path} > {path}/{CARD_NAME}" if found.manifest else ""
        return [Finding("error", CARD_NAME, "there is no card", fix), *findings]
    return findings


def _open(path: str | Path, revision: str | None) -> _Found:
    folder = Path(path).expanduser()
    if folder.is_dir():
        files = {entry.name for entry in folder.iterdir()}
        return _read(folder, frozenset(files))
    if folder.exists() or looks_local(str(path)):
        what = "not a folder" if folder.exists() else "no such folder"
        raise NotFound(f"{what}: {printable(path)}", hint=did_you_mean(str(path)))
    from qconvert.hub import snapshot, tree

    repository = tree.resolve(str(path), revision)
    names = [name for name in (CARD_NAME, MANIFEST_NAME) if name in repository.files]
    if not names:
        return _Found(None, None, frozenset(repository.files))
    return _read(snapshot.small_files(repository, names), frozenset(repository.files))


def _read(root: Path, files: frozenset[str]) -> _Found:
    readme = manifest = None
    if CARD_NAME in files:
        readme = read_bytes(root, CARD_NAME, _MAX_CARD).decode("utf-8", "replace")
    if MANIFEST_NAME in files:
        data = read_bytes(root, MANIFEST_NAME, MAX_MANIFEST_BYTES)
        manifest = strictjson.loads(data, file=MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
        if not isinstance(manifest, dict):
            raise ContractViolation(f"not a manifest: {MANIFEST_NAME}")
    return _Found(readme, manifest, files)
