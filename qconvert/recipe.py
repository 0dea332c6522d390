"""The recipe in a manifest: what has to be asked for to make the same result again.

A manifest is a stranger's word. It names a Hub repository and a method, and nothing of it is taken
for a path on this machine: where a folder or a text was used, the user says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert import devices, mixture, registry
from qconvert.calibration.options import CalibrationOptions
from qconvert.calibration.public import C4
from qconvert.errors import CorruptFile, UsageError, printable
from qconvert.manifest import BESIDE, versions
from qconvert.request import Request
from qconvert.source import looks_local
from qconvert.staging import MANIFEST_NAME
from qconvert.stored import split_revision
from qconvert.types import JSON, Checkpoint, Plan

_DEMO = "demo"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a manifest says of how its result was made."""

    verb: str
    options: Mapping[str, Any]
    """The method's own, and skip, experts, overrides and max_shard_bytes."""
    calibration: JSON
    """Settings, text, device and threads; empty for a method that reads no data."""
    name: str
    repo_id: str | None
    revision: str | None
    headers: Mapping[str, str]
    """sha256 of the headers of the source's weight files, by name."""
    device: str | None
    versions: Mapping[str, str]


def read(manifest: JSON) -> Recipe:
    """The recipe of a manifest; raises CorruptFile where there is none in it."""
    source, method, options, made_with = (
        _table(manifest, key) for key in ("source", "method", "options", "versions")
    )
    calibration: JSON = {}
    if "calibration" in manifest:
        calibration = _table(manifest, "calibration")
        _table(calibration, "text")
    headers = {
        name: _text(file, "header_sha256")
        for name, file in _table(source, "files").items()
        if isinstance(file, dict)
    }
    return Recipe(
        verb=_text(method, "verb"),
        options=options,
        calibration=calibration,
        name=_text(source, "name"),
        repo_id=_text(source, "repo_id") if source.get("repo_id") else None,
        revision=_text(source, "revision") if source.get("revision") else None,
        headers=headers,
        device=_text(manifest, "device") if "device" in manifest else None,
        versions={name: str(number) for name, number in made_with.items()},
    )


def source_of(recipe: Recipe, given: str | Path | None) -> tuple[str, str | None]:
    """The model to convert and its revision; `given` is what the user says it is."""
    if given is not None:
        name, revision = split_revision(given)
        return name, revision or (recipe.revision if name == recipe.repo_id else None)
    if recipe.repo_id is not None and not looks_local(recipe.repo_id):
        return recipe.repo_id, recipe.revision
    if recipe.repo_id is None and recipe.name == _DEMO:
        return _DEMO, None
    raise UsageError(
        f"it was made from a folder: {printable(recipe.repo_id or recipe.name)}",
        hint="name that folder with --source FOLDER",
    )


def check_source(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raises UsageError unless the weight files are those that the manifest names."""
    found = {name: file.header_sha256 for name, file in checkpoint.files.items()}
    if found == recipe.headers:
        return
    names = recipe.headers.keys() | found.keys()
    odd = sorted(name for name in names if recipe.headers.get(name) != found.get(name))
    raise UsageError(
        f"{printable(checkpoint.repo_id or checkpoint.root)} is not what it was made from: "
        f"{printable(odd[0])} is another file",
        hint="name the right one with --source SOURCE",
    )


def request(
    recipe: Recipe, checkpoint: Checkpoint, model: str, calibration: str | Path | None
) -> Request:
    """What to ask for, of `model`, which is `checkpoint`. A stream where that can be.

    `calibration` is the text, where the manifest has no name for it that means the same here.
    Raises UsageError and CorruptFile.
    """
    options = dict(recipe.options)
    skip, overrides = options.pop("skip", None), options.pop("overrides", [])
    most, experts = options.pop("max_shard_bytes", None), options.pop("experts", mixture.KEEP)
    usable = (
        isinstance(skip, str | None)
        and isinstance(overrides, list)
        and all(isinstance(text, str) for text in overrides)
        and isinstance(most, int)
        and experts in mixture.CHOICES
    )
    if not usable:
        raise _unusable("options")
    calibrated = registry.info(recipe.verb).calibrated
    settings = recipe.calibration
    if calibrated != bool(settings):
        raise _unusable("calibration")
    return Request(
        model,
        recipe.verb,
        options,
        skip=skip,
        experts=experts,
        overrides=overrides,
        calibration=_calibration(settings, model, calibration) if calibrated else None,
        max_shard_bytes=most,
        threads=settings.get("threads"),
        validate=False,
        stream=checkpoint.remote and not calibrated,
    )


def check_text(recipe: Recipe, plan: Plan) -> None:
    """Raises UsageError unless the text has been read as the same token ids."""
    then, now = (c.get("text", {}).get("sha256") for c in (recipe.calibration, plan.calibration))
    if then != now:
        raise UsageError(
            "the calibration text is another than that of the manifest: sha256 of the token ids "
            f"{printable(now)}, expected {printable(then)}",
            hint="name the right one with --calibration TEXT",
        )


def changes(recipe: Recipe, plan: Plan, device: str) -> dict[str, tuple[str | None, str | None]]:
    """What is not as it was, then and now: device, threads, versions. `device` computes now."""
    then: dict[str, str | None] = dict(recipe.versions)
    now: dict[str, str | None] = dict(versions(plan))
    if plan.calibration:
        for key in ("device", "threads"):
            then[key], now[key] = (
                str(settings.get(key)) for settings in (recipe.calibration, plan.calibration)
            )
    else:  # the same on every CPU
        now["device"] = "cpu" if device == "cpu" else devices.model_name(device)
        then["device"] = recipe.device or "cpu"
    names = [n for n in (*then, *now) if then.get(n) != now.get(n)]
    return {name: (then.get(name), now.get(name)) for name in dict.fromkeys(names)}


def may_differ(changed: Mapping[str, Any]) -> bool:
    """Whether what has changed may change a bit of the result."""
    return bool(changed.keys() - {"python", *BESIDE})


def _calibration(settings: JSON, model: str, given: str | Path | None) -> CalibrationOptions:
    known = ("nsamples", "seqlen", "seed", "quality", "epochs", "tune")
    try:
        asked: dict[str, Any] = {name: settings[name] for name in known}
    except KeyError as missing:
        raise _unusable(f"calibration, {missing.args[0]}") from None
    text = settings["text"]
    kind, name = text.get("kind"), text.get("name")
    if given is not None:
        return CalibrationOptions(source=str(given), **asked)
    if kind == "dataset" and isinstance(name, str) and not Path(name).exists():
        return CalibrationOptions(source=name, **asked)
    default = kind == "public" and (name, text.get("revision")) == (C4.name, C4.revision)
    if default or (kind == "demo" and model == _DEMO):
        return CalibrationOptions(**asked)
    raise UsageError(
        f"it was calibrated on {printable(name)}, which the manifest does not hold",
        hint="name that text with --calibration TEXT",
    )


def _table(data: JSON, key: str) -> JSON:
    found = data.get(key)
    if not isinstance(found, dict):
        raise _unusable(key)
    return found


def _text(data: JSON, key: str) -> str:
    found = data.get(key)
    if not isinstance(found, str):
        raise _unusable(key)
    return found


def _unusable(key: str) -> CorruptFile:
    return CorruptFile(f"no {key} that says how the result was made", file=MANIFEST_NAME)
