"""A checkpoint's tokenizer: text to token ids and back, without the model.

`tokenizer.json` says everything and holds no code, so `tokenizers` alone reads it. Only where a
checkpoint has older files instead is `transformers` asked, which builds the same thing from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qconvert.safepath import read_bytes
from qconvert.sidefiles import MAX_BYTES

FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Functions of token ids. `encode` puts a document's first token (BOS) where the model's own
    tokenizer does; `encode_inside` never does, for text from the middle of a document."""

    encode: Callable[[Sequence[str]], list[list[int]]]
    encode_inside: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; raises OSError or ValueError where none can be read."""
    if (folder / FILE).is_file():
        from tokenizers import Tokenizer as Fast

        try:
            fast = Fast.from_str(read_bytes(folder, FILE, MAX_BYTES).decode("utf-8"))
        except Exception as e:
            raise ValueError(f"{FILE} is not readable: {e}") from e
        fast.no_truncation()
        fast.no_padding()

        def ids(texts: Sequence[str], special: bool) -> list[list[int]]:
            found = fast.encode_batch(list(texts), add_special_tokens=special)
            return [encoding.ids for encoding in found]

        return Tokenizer(
            lambda texts: ids(texts, True),
            lambda texts: ids(texts, False),
            lambda tokens: str(fast.decode(list(tokens))),
        )
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:
        raise ValueError("no usable tokenizer") from e
    return Tokenizer(
        lambda texts: [slow.encode(text) for text in texts],
        lambda texts: [slow.encode(text, add_special_tokens=False) for text in texts],
        lambda tokens: str(slow.decode(list(tokens))),
    )
