"""LLaMA-Factory's YAML as a batch of one: what it would quantize while loading, made to keep.

Such a file trains, merges or chats; `quantization_bit` and what belongs to it say how the model is
loaded, and `export_*` where it goes. That much is honoured, and every other key is listed as
ignored. Refused is what would give another model than the file means: an adapter that is not
merged, GPTQ, a combination that LLaMA-Factory itself has not.

Source: LLaMA-Factory 0.9.5, hparams/model_args.py and model/model_utils/quantization.py. Older
versions spell `bnb` as `bitsandbytes`.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from qconvert import registry, strictyaml
from qconvert.batching import jobs
from qconvert.batching.jobs import Job
from qconvert.batching.values import FLAG, INTEGER, TEXT, Problems, Said, one_of, shown, within

KEY = "model_name_or_path"
"""The key that such a file has, and no other."""

_METHODS = {"bnb": "bitsandbytes", "bitsandbytes": "bitsandbytes", "hqq": "hqq", "eetq": "eetq"}
_BITS = {"bitsandbytes": (4, 8), "hqq": (2, 3, 4, 5, 6, 8), "eetq": (8,)}
_AQLM = (2, 3, 4)
"""Bits at which AQLM takes the place of GPTQ: it, too, is calibrated on text."""
_GPTQ = (
    "export_quantization_dataset",
    "export_quantization_nsamples",
    "export_quantization_maxlen",
)
_KINDS = {
    KEY: TEXT,
    "model_revision": TEXT,
    "quantization_method": TEXT,
    "quantization_bit": INTEGER,
    "quantization_type": one_of(("nf4", "fp4")),
    "double_quantization": FLAG,
    "export_dir": TEXT,
    "export_size": within(1, 10**6),
    "export_device": one_of(("cpu", "auto")),
    "export_legacy_format": FLAG,
    "export_hub_model_id": TEXT,
    "hub_private_repo": FLAG,
}
_COMMON = {
    "model_revision": "revision",
    "export_dir": "output",
    "export_device": "device",
    "export_hub_model_id": "repo_id",
}
_BNB_4BIT = {**_COMMON, "double_quantization": "double_quant"}
_RENAMED = {
    "int8": _COMMON,
    "nf4": _BNB_4BIT,
    "fp4": _BNB_4BIT,
    "hqq": {**_COMMON, "quantization_bit": "bits"},
    "eetq": _COMMON,
}
"""Method → keys of the file that are ours by another name."""
_NESTED = ("quantization_type", "double_quantization")
"""What means something to four bits of bitsandbytes alone."""
_REFUSED = ("adapter_name_or_path", "export_quantization_bit", "hf_hub_token", "hub_token")
_PLAIN = re.compile(r"[\w./]([\w./:-]*\w)?", re.ASCII)
_ALMOST = 0.9
"""Of all the keys that LLaMA-Factory and transformers know, none is as like one of ours as this."""


def translate(
    top: strictyaml.Mapping, problems: Problems
) -> tuple[Job | None, tuple[tuple[str, int], ...]]:
    """The conversion that a file means, None with its problems noted, and (key, line) ignored."""
    told = {
        key: Said(value, top.lines[key])
        for key, value in top.items()
        if value is not None or key == KEY
    }
    ignored = _ignored(told, problems)
    _refuse(told, problems)
    values = {
        key: problems.read(key, told[key], kind) for key, kind in _KINDS.items() if key in told
    }
    if "quantization_bit" not in told and "export_quantization_bit" not in told:
        what = "no quantization_bit: the file asks for no quantized model"
        problems.add(top.lines[KEY], f"{what} (quantization_bit: 4)")
    if problems.count:
        return None, ignored
    verb = _method(values, told, problems)
    if verb is None:
        return None, ignored
    where = (told["quantization_bit"].line,) * 2
    said = _said(verb, values, told)
    job = jobs.make(told[KEY], registry.info(verb), said, where, problems)
    if verb not in ("nf4", "fp4"):
        ignored += tuple((key, told[key].line) for key in _NESTED if key in told)
    return job, tuple(sorted(ignored, key=lambda it: it[1]))


def _ignored(told: dict[str, Said], problems: Problems) -> tuple[tuple[str, int], ...]:
    """What does not concern a conversion; a key that is almost one of ours is a mistake."""
    ours = (*_KINDS, *_REFUSED, *_GPTQ)
    found = []
    for key, said in told.items():
        if key in _KINDS or key in _REFUSED:
            continue
        close = difflib.get_close_matches(key[:64], ours, n=1, cutoff=_ALMOST)
        if key not in ours and close:
            problems.add(said.line, f"unknown key {shown(key)} (did you mean {close[0]}?)")
        found.append((key, said.line))
    return tuple(found)


def _refuse(told: dict[str, Said], problems: Problems) -> None:
    """Notes keys that would give another model than the file means, or that hold a secret."""
    for key in ("hf_hub_token", "hub_token"):
        if key in told:
            problems.add(told[key].line, f"{key}: write no token in a file: export HF_TOKEN=…")
    if adapter := told.get("adapter_name_or_path"):
        problems.add(
            adapter.line,
            "adapter_name_or_path: an adapter is merged first: llamafactory-cli export with this "
            "model and adapter, export_dir: merged and no quantization_bit; then here "
            "model_name_or_path: merged and no adapter",
        )
    if told.get("export_legacy_format", Said(False, 0)).value is True:
        problems.add(
            told["export_legacy_format"].line,
            "export_legacy_format: pickled weights "
            "are not written, safetensors are (export_legacy_format: false)",
        )
    if "export_quantization_bit" in told:
        _refuse_gptq(told, problems)


def _refuse_gptq(told: dict[str, Said], problems: Problems) -> None:
    """Says what to use instead, to be pasted: HQQ here, or AQLM with the same text."""
    line = told["export_quantization_bit"].line
    bits = problems.read("export_quantization_bit", told["export_quantization_bit"], INTEGER)
    if bits is None:
        return
    bits = bits if bits in _BITS["hqq"] else 4
    what = (
        "export_quantization_bit is GPTQ, which is not made here. Without calibration: "
        f"quantization_bit: {bits} and quantization_method: hqq"
    )
    if bits in _AQLM:
        renamed = dict(zip(_GPTQ, ("calibration", "nsamples", "seqlen"), strict=True))
        entry: dict[str, Any] = {"model": told[KEY].value, "method": f"aqlm:{bits}"}
        entry |= {renamed[key]: told[key].value for key in _GPTQ if key in told}
        entry |= {"output": told["export_dir"].value} if "export_dir" in told else {}
        listed = ", ".join(f"{key}: {_quoted(value)}" for key, value in entry.items())
        what += f". Calibrated on text, in a batch file: jobs: [{{{listed}}}]"
    problems.add(line, what)


def _quoted(value: Any) -> str:
    """A value as it can stand between the braces of a YAML mapping."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _method(values: dict[str, Any], told: dict[str, Said], problems: Problems) -> str | None:
    """The method; None for a combination that there is not."""
    bits: int = values["quantization_bit"]
    named = values.get("quantization_method", "bnb")
    valid = "; ".join(f"{name} {', '.join(map(str, have))}" for name, have in _BITS.items())
    method = _METHODS.get(named)
    if method is None:
        what = f"quantization_method: {shown(named)} is none of those that quantize: {valid}"
        problems.add(told["quantization_method"].line, what)
        return None
    if bits not in _BITS[method]:
        what = f"quantization_bit: {method} has no {bits} bits. There is: {valid}"
        problems.add(told["quantization_bit"].line, what)
        return None
    if method != "bitsandbytes":
        return method
    return "int8" if bits == 8 else str(values.get("quantization_type", "nf4"))


def _said(verb: str, values: dict[str, Any], told: dict[str, Said]) -> dict[str, Said]:
    """The job's options, in our names, each with its line."""
    said = {ours: told[theirs] for theirs, ours in _RENAMED[verb].items() if theirs in told}
    if verb in ("nf4", "fp4"):  # its default is ours, but not said to be for ever
        said.setdefault("double_quant", Said(True, told["quantization_bit"].line))
    if values.get("model_revision") == "main":  # its default, which a folder would refuse
        del said["revision"]
    if "export_size" in told:
        said["max_shard_size"] = Said(f"{values['export_size']}GB", told["export_size"].line)
    if "export_hub_model_id" in told:
        said["push"] = Said(True, told["export_hub_model_id"].line)
        if values.get("hub_private_repo"):
            said["private"] = told["hub_private_repo"]
    return said
