"""Who takes part: quantized checkpoints, proved to be of one source, and that source.

A manifest names what a checkpoint was made from, and the headers of those files have a digest each;
two fine-tunes of one base have the same headers, so the digests of the contents, which a proof
leaves in the manifest, and the commit are compared as well. A checkpoint that somebody else made
has no manifest: then `--against` says what the source is, and the errors of its layers will tell.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qconvert import linears, manifest, registry
from qconvert.card.facts import Facts, as_mapping, as_number
from qconvert.comparing.result import SOURCE, Row
from qconvert.decoding import open_source
from qconvert.errors import NotFound, QConvertError, UsageError, printable
from qconvert.safepath import read_bytes
from qconvert.source import localize
from qconvert.stored import Stored, open_stored, open_target, split_revision
from qconvert.types import JSON, Checkpoint, Kind, Progress

_LINEAR = {Kind.LINEAR, Kind.CONV1D, Kind.HEAD, Kind.ROUTER, Kind.EXPERT, Kind.EXPERTS, Kind.KEPT}
_LAPS = ("plan", "calibrate", "pour")
"""Of a run: what belongs to the conversion itself."""
_MAX_LOG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entrant:
    """A quantized checkpoint on this disk, and what it is called here."""

    name: str
    target: str
    """As the user named it."""
    stored: Stored

    @property
    def facts(self) -> Facts:
        return Facts(self.stored.manifest or {})


def open_entrants(targets: Sequence[str | Path], progress: Progress | None = None) -> list[Entrant]:
    """The quantized checkpoints of that name, downloaded where they are on the Hub.

    Raises what `open_target` raises, and UsageError for one alone or the same twice.
    """
    found: list[Entrant] = []
    for target in targets:
        stored = open_target(target)
        if stored.checkpoint.remote:
            stored = open_stored(localize(stored.checkpoint, progress).root)
        if any(stored.root == other.stored.root for other in found):
            raise UsageError(f"{printable(target)} is named twice")
        found.append(Entrant("", str(target), stored))
    if len(found) == 1:
        only = printable(found[0].target)
        raise UsageError(
            f"{only} alone: there is nothing to compare it with",
            hint=f"qconvert validate {only} --against SOURCE compares it with its source",
        )
    return named(found)


def named(entrants: Sequence[Entrant]) -> list[Entrant]:
    """The same, each with a name of its own: the method's, or else the folder's."""
    names = [_short(entrant) for entrant in entrants]
    folders = [_folder(entrant) for entrant in entrants]
    found: list[Entrant] = []
    for entrant, name, folder in zip(entrants, names, folders, strict=True):
        if names.count(name) > 1 or name == SOURCE:
            name = folder if folders.count(folder) == 1 else entrant.target
        found.append(replace(entrant, name=printable(name, 60)))
    return found


def _folder(entrant: Entrant) -> str:
    """A folder's name without that of the model, which all of them have in common."""
    name = entrant.stored.root.name
    return name.removeprefix(f"{entrant.facts.source_name}-") or name


def _short(entrant: Entrant) -> str:
    """ "hqq:4", "nf4", "aqlm:2x8g8"; of a format that qconvert did not write, what it is."""
    stored, facts = entrant.stored, entrant.facts
    if not stored.layers:
        return stored.container.name
    options = shared_options(stored)
    method = next(iter(stored.layers.values()))[1]
    known = [info for info in registry.METHODS if info.verb == facts.verb]
    if not known:
        return f"{method.name}:{method.bits}"
    [info] = known
    detail = options.get("scheme") if "scheme" in info.options else None
    if detail is None and "bits" in info.options:
        detail = options.get("bits")
    name = info.verb if detail is None else f"{info.verb}:{detail}"
    unusual = info.unusual(stored.container.name)
    return f"{name} {unusual}" if unusual else name


def shared_options(stored: Stored) -> JSON:
    """The options that all quantized layers have in common."""
    found: JSON | None = None
    for _, method in stored.layers.values():
        options = method.options()
        if found is None:
            found = dict(options)
        else:
            found = {key: value for key, value in found.items() if options.get(key) == value}
    return found or {}


# ── one source ───────────────────────────────────────────────────────────────────────────────


def find_source(entrants: Sequence[Entrant], against: str | Path | None) -> Checkpoint:
    """What all of them were made from: `against`, or what their manifests and run logs name.

    Raises UsageError if they are of different sources, or it is not known where the source is.
    """
    first = entrants[0]
    for other in entrants[1:]:
        if why := _apart(first.facts, other.facts):
            raise UsageError(
                f"{printable(first.target)} and {printable(other.target)} are not of one source: "
                f"{why}"
            )
    if against is not None:
        name, revision = split_revision(against)
        checkpoint = open_source(name, revision=revision, anew=False)
        if wrong := next((e for e in entrants if not _made_from(checkpoint, e.facts)), None):
            raise UsageError(
                f"{printable(against)} is not what {printable(wrong.target)} was made from",
                hint="--against SOURCE",
            )
        return checkpoint
    for entrant in entrants:
        if (found := _claimed(entrant)) is not None:
            return found
    raise UsageError(
        f"where the source of {printable(first.target)} lies is not known", hint="--against SOURCE"
    )


def _claimed(entrant: Entrant) -> Checkpoint | None:
    """The source as manifest and run log name it, if it is there."""
    facts = entrant.facts
    if facts.source_id:
        return open_source(facts.source_id, revision=facts.commit, anew=False)
    path = run_log(entrant.stored.root).get("source")
    places = ["demo"] if facts.text("source", "name") == "demo" else []
    places += [path] if isinstance(path, str) and Path(path).is_absolute() else []
    for place in places:
        try:
            checkpoint = open_source(place, anew=False)
        except QConvertError:  # moved, or no longer what it was
            continue
        if facts.mapping("source", "files") and _made_from(checkpoint, facts):
            return checkpoint
    return None


def _made_from(checkpoint: Checkpoint, facts: Facts) -> bool:
    """Whether the headers are those that a manifest names; True without one."""
    told = _headers(facts)
    return not told or told == {n: file.header_sha256 for n, file in checkpoint.files.items()}


def _headers(facts: Facts) -> dict[str, object]:
    files = facts.mapping("source", "files")
    return {n: file.get("header_sha256") for n, file in files.items() if isinstance(file, dict)}


def _apart(one: Facts, other: Facts) -> str:
    """How two manifests differ in their sources, or ""."""
    if _headers(one) and _headers(other) and _headers(one) != _headers(other):
        return "the headers of their files differ"
    ids = [(facts.source_id, facts.commit) for facts in (one, other)]
    if all(name for name, _ in ids) and ids[0] != ids[1]:
        return f"{_at(*ids[0])} and {_at(*ids[1])}"
    known, seen = one.source_sha256, other.source_sha256
    changed = [name for name in known.keys() & seen.keys() if known[name] != seen[name]]
    return f"{printable(min(changed))} differs" if changed else ""


def _at(name: str | None, commit: str | None) -> str:
    return f"{name} at {commit[:12]}" if commit else str(name)


# ── what is known without running it ─────────────────────────────────────────────────────────


def static_row(entrant: Entrant, checkpoint: Checkpoint, *, kept: bool = True) -> Row:
    """Bits, bytes, time and words of one format; reads headers and the run log."""
    stored = entrant.stored
    numel = sum(info.numel for info in checkpoint.tensors.values())
    inside = sum(spec.nbytes for name in stored.layers for spec in stored.specs(name))
    weights = sum(layer.tensor.numel for layer, _ in stored.layers.values())
    seconds, notes = conversion_seconds(run_log(stored.root))
    return Row(
        name=entrant.name,
        folder=str(stored.root) if kept else None,
        method=_words(stored),
        verdict=entrant.facts.verdict,
        bits=8 * sum(info.nbytes for info in stored.tensors.values()) / max(1, numel),
        layer_bits=8 * inside / weights if weights else None,
        nbytes=sum(file.size for file in stored.checkpoint.files.values()),
        seconds=seconds,
        notes=tuple(notes),
    )


def source_row(checkpoint: Checkpoint, dtype: str) -> Row:
    """The full-precision model's own row."""
    tensors = checkpoint.tensors.values()
    held = {part.name: part.nbytes for info in tensors for part in checkpoint.parts(info)}
    return Row(
        name=SOURCE,
        folder=str(checkpoint.root),
        method=checkpoint.decoded_from or f"full precision, {dtype}",
        bits=8 * sum(held.values()) / max(1, sum(info.numel for info in tensors)),
        nbytes=sum(file.size for file in checkpoint.files.values()),
    )


def linear_layers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Every linear layer by its name on disk, in the order of the files."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    roles = linears.structure(checkpoint.config, shapes).roles
    return tuple(
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name in roles and roles[name].kind in _LINEAR and len(info.shape) > 1
    )


def conversion_seconds(log: JSON) -> tuple[float | None, list[str]]:
    """Wall seconds of a conversion by its run log, and what has to be said of them."""
    laps = as_mapping(log.get("seconds"))
    known = {lap: seconds for lap in _LAPS if (seconds := as_number(laps.get(lap))) is not None}
    if "pour" not in known:
        return None, [f"no conversion time: {manifest.RUN_LOG_NAME} does not tell it"]
    share, together = as_number(log.get("share")), as_number(log.get("together"))
    if share is None or together is None:
        return sum(known.values()), []
    known["pour"] *= share
    note = f"conversion time: its share of one pass that wrote {together:g} formats"
    return sum(known.values()), [note]


def run_log(root: Path) -> JSON:
    """The run log beside a result; {} where there is none, or it is not one."""
    try:
        found = json.loads(read_bytes(root, manifest.RUN_LOG_NAME, _MAX_LOG_BYTES))
    except (NotFound, ValueError, RecursionError):
        return {}
    return as_mapping(found)


def _words(stored: Stored) -> str:
    """ "hqq, bits 4, group_size 64"; a format that cannot say what made it is named itself."""
    if not stored.layers:
        return stored.container.name
    method = next(iter(stored.layers.values()))[1]
    name = stored.container.name if stored.container.name != method.name else method.name
    options = [f"{k} {v}" for k, v in shared_options(stored).items() if v is not None]
    return printable(", ".join([name, *options]))
