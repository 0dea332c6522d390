"""The model card: facts only, all of them from the manifest.

A card is read by people who decide whether to trust a checkpoint, so nothing in it is a claim:
sizes are measured, figures come from the validation reports, what stayed in full precision is
listed with the reason, and what was not proved is said first. It is a pure function of the
manifest: whoever has that has the card, and `lint` tells whether a card says something else.

    manifest ─► Facts ─► front.py (YAML, for machines) + page.py (markdown, for people)

All the rest is foreign: names, reasons, a model's words, the source's own card. None of it is
interpreted by anybody (`markdown.py`, `upstream.py`), and there is no template language that
could be talked to.
"""

from qconvert.card.findings import Finding
from qconvert.card.lint import lint
from qconvert.card.page import render

__all__ = ["Finding", "lint", "render"]
