"""Token ids to calibrate on: [nsamples, seqlen], from text or from a file of ids.

`describe` says what will be read, for a plan, and refuses a wrong path; it reads a header at most.
`read_tokens` reads it. Same text, tokenizer, options and seed: the same ids, on any machine; their
sha256 is what a result depends on, wherever the text lay.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np

from qconvert import modelconfig, tokenizer
from qconvert.calibration import sampling, texts, tokenfile
from qconvert.calibration.documents import Passage
from qconvert.calibration.options import CalibrationOptions, Settings, max_positions, scarcity
from qconvert.calibration.public import C4, PublicFile
from qconvert.calibration.texts import Source
from qconvert.errors import CorruptFile, UnsupportedConfig, UsageError, printable
from qconvert.types import JSON, Array, Checkpoint

_KEPT_PER_TOKEN = 16
"""Characters kept for each token that is needed: enough to choose from, and bounded."""
_LOOKED_AT = 4
"""Times as many are looked at where the text is endless."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What a model reads while it is calibrated."""

    ids: Array
    """int32 [nsamples, seqlen]."""
    source: JSON
    """kind, name and revision of the text, how many documents of it were looked at, and the
    sha256 of the ids (little-endian int32, row after row)."""
    settings: Settings
    """With as many samples as there are."""
    warnings: tuple[str, ...] = ()


def describe(
    checkpoint: Checkpoint, options: CalibrationOptions, public: PublicFile = C4
) -> tuple[Settings, JSON]:
    """Settings with nothing left open, and kind, name and revision of the text.

    Raises UsageError, NotFound, UnsafeFormat, UnsafePath, CorruptFile (a file of ids that is none)
    and DependencyMissing; fetches nothing.
    """
    settings, named, _ = _open(checkpoint, options, public)
    return settings, named


def read_tokens(
    checkpoint: Checkpoint,
    options: CalibrationOptions,
    *,
    in_features: int = 0,
    public: PublicFile = C4,
) -> Tokens:
    """Reads the calibration text as samples of token ids; `public` is what is read by default.

    Fewer samples than asked for, or fewer tokens than the widest layer (`in_features`) needs, are
    a warning; none is a UsageError. Raises what `describe` raises, CorruptFile for text that is
    none or a tokenizer that is not the model's, and Network where text cannot be fetched.
    """
    settings, named, opened = _open(checkpoint, options, public)
    random = Random(settings.seed)
    vocab = _size(checkpoint.config, "vocab_size")
    noted: list[str] = []
    if isinstance(opened, Path):
        ids = tokenfile.read_ids(opened, settings.nsamples, settings.seqlen, random)
        documents = None
        _check_range(ids, vocab, opened.name)
    else:
        ids, documents = _sample(opened, checkpoint, settings, random)
        _check_range(ids, vocab, tokenizer.FILE)
        noted += opened.warnings
    wanted = options.nsamples or options.resolved(None).nsamples
    if len(ids) < wanted:
        noted.append(
            f"{named['name']} holds {len(ids):,} samples of {settings.seqlen:,} tokens, not "
            f"{wanted:,}: calibrating on those"
        )
    if few := scarcity(ids.size, in_features):
        noted.append(few)
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<i4").data).hexdigest()
    return Tokens(
        ids,
        {**named, "documents": documents, "sha256": digest},
        replace(settings, nsamples=len(ids)),
        tuple(noted),
    )


def _open(
    checkpoint: Checkpoint, options: CalibrationOptions, public: PublicFile
) -> tuple[Settings, JSON, Source | Path]:
    """What `describe` says, and the text itself or the file of ids."""
    limit = max_positions(checkpoint.config)
    path = _token_file(options)
    if path is not None:
        ids = tokenfile.open_ids(path)
        if options.seqlen is None and ids.width is not None:
            options = replace(options, seqlen=min(ids.width, limit or ids.width))
        settings = options.resolved(limit)
        settings = replace(settings, nsamples=min(settings.nsamples, ids.samples(settings.seqlen)))
        return settings, {"kind": "tokens", "name": path.name, "revision": None}, path
    source = texts.open_source(options.source, checkpoint.root, public)
    return options.resolved(limit), _named(source), source


def _named(source: Source) -> JSON:
    return {"kind": source.kind, "name": printable(source.name), "revision": source.revision}


def _token_file(options: CalibrationOptions) -> Path | None:
    """The file of ids that --calibration names, if it names one that exists."""
    path = Path(os.path.expanduser(options.source or ""))
    return path if path.suffix.lower() == ".npy" and path.exists() else None


def _sample(
    source: Source, checkpoint: Checkpoint, settings: Settings, random: Random
) -> tuple[Array, int]:
    """Windows of a text, int32 [≤ nsamples, seqlen], and the number of documents looked at."""
    words = _tokenizer(checkpoint)

    def encode(passages: Sequence[Passage]) -> list[Sequence[int]]:
        openings = iter(words.encode([p.text for p in passages if p.opens]))
        others = iter(words.encode_inside([p.text for p in passages if not p.opens]))
        return [next(openings if p.opens else others) for p in passages]

    budget = _KEPT_PER_TOKEN * settings.tokens
    kept = sampling.keep(
        source.passages(sampling.CHARACTERS_PER_TOKEN * settings.seqlen),
        budget,
        _LOOKED_AT * budget if source.endless else None,
        random,
    )
    ids = sampling.windows(
        kept.passages,
        encode,
        nsamples=settings.nsamples,
        seqlen=settings.seqlen,
        separator=_size(checkpoint.config, "eos_token_id"),
        random=random,
    )
    if not len(ids):
        raise UsageError(
            f"{printable(source.name)} holds less than one sample of {settings.seqlen:,} tokens",
            hint="name a longer text with --calibration, or shorter samples with --seqlen",
        )
    return ids, kept.documents


def _tokenizer(checkpoint: Checkpoint) -> tokenizer.Tokenizer:
    try:
        return tokenizer.load(checkpoint.root)
    except (OSError, ValueError) as e:
        raise UnsupportedConfig(
            f"{checkpoint.name} has no tokenizer to read calibration text with ({printable(e)})",
            hint="--calibration TOKENS.npy",
        ) from e


def _check_range(ids: Array, vocab: int | None, file: str) -> None:
    """Raises CorruptFile for ids that the model has no embedding of."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab is not None and high >= vocab):
        raise CorruptFile(
            "token ids that the model does not have",
            file=file,
            expected=f"0 to {vocab - 1:,}" if vocab else "0 or more",
            got=f"{low:,} to {high:,}",
        )


def _size(config: JSON, key: str) -> int | None:
    """A number of config.json or of its text_config; the first where it is a list."""
    for where in modelconfig.sections(config):
        value = where.get(key)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            return first
    return None
