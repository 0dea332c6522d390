"""What calibration tells while it runs and when it is done.

Events are values: `solve` hands them to whoever listens and knows nothing of screens. Figures (how
large the error of each layer is, what fine-tuning did to a block) depend on source, options and
device alone; they are kept in the journal, so that a resumed run knows those of the blocks that it
did not make, and they end in the manifest. Times and memory are of this run alone; they go to the
run log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from qconvert.methods.aqlm import TOKENS_PER_COLUMN
from qconvert.types import JSON


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """One quantized layer; `name` is that on disk, without ".weight"."""

    name: str
    error: float
    """‖(W - Ŵ)X‖² / ‖WX‖² on the calibration text, before its block was fine-tuned."""
    samples: int
    """Tokens that reached the layer (an expert sees a part of the text)."""
    notes: tuple[str, ...] = ()
    """What went differently: damping raised, columns never active, …"""


@dataclass(frozen=True, slots=True)
class TuneFigures:
    """Fine-tuning: the loss on held-out text before and after, and the epochs it took."""

    before: float
    after: float
    epochs: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertFigures:
    """How the calibration text fell on the experts that were quantized."""

    count: int
    few: int
    """Of them, those that read fewer tokens than `wanted` for each column of one of their layers:
    their Hessians were damped the more."""
    unread: int
    """Of these, those that no token reached: their weights were approximated, not their outputs."""
    least: int
    median: int
    """Tokens that an expert read."""
    wanted: int = TOKENS_PER_COLUMN

    def __str__(self) -> str:
        """ "3 of 8 experts read fewer than 4 tokens for each of their columns, 1 of them none"."""
        none = f", {self.unread} of them none" if self.unread else ""
        return (
            f"{self.few:,} of {self.count:,} experts read fewer than {self.wanted} tokens for each "
            f"of their columns{none} (the median expert read {self.median:,} tokens)"
        )


@dataclass(frozen=True, slots=True)
class BlockFigures:
    """A finished decoder block."""

    index: int
    layers: tuple[LayerFigures, ...]
    tuning: TuneFigures | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """Calibration begins, or goes on: `done` of `count` blocks are finished already."""

    scheme: str
    count: int
    done: int
    tokens: int
    seconds: float
    """Estimate of what is left, from a short measurement on the device."""


@dataclass(frozen=True, slots=True)
class Step:
    """Work goes on; `done` of `total` steps of the whole calibration are finished."""

    done: int
    total: int
    what: str
    """ "block 4 of 32: fine-tuning, step 12 of 128, loss 0.0031"."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """A layer is done."""

    block: int
    figures: LayerFigures
    seconds: float


@dataclass(frozen=True, slots=True)
class BlockReport:
    """A block is done."""

    index: int
    count: int
    scheme: str
    figures: BlockFigures
    seconds: float
    eta_seconds: float
    """Time left for the other blocks, from those that this run has made."""
    peak_bytes: int
    """Of this process, so far; `device_bytes` of the accelerator's memory."""
    device_bytes: int = 0


Event = Started | Step | LayerReport | BlockReport
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Figures:
    """All that calibration found out, as the manifest keeps it."""

    scheme: str
    blocks: tuple[BlockFigures, ...]
    end_to_end: TuneFigures | None = None
    experts: ExpertFigures | None = None

    def layers(self) -> list[LayerFigures]:
        """Every quantized layer, in the order of the model."""
        return [layer for block in self.blocks for layer in block.layers]

    def worst(self, count: int = 5) -> list[LayerFigures]:
        """The layers with the largest relative error, worst first."""
        return sorted(self.layers(), key=lambda layer: (-layer.error, layer.name))[:count]

    def mean_error(self) -> float:
        """Mean of the layers' relative errors."""
        layers = self.layers()
        return sum(layer.error for layer in layers) / max(1, len(layers))

    def as_json(self) -> JSON:
        """For the manifest: figures, no times."""
        return {
            "scheme": self.scheme,
            "mean_relative_error": self.mean_error(),
            "blocks": [asdict(block) for block in self.blocks],
            "end_to_end": asdict(self.end_to_end) if self.end_to_end else None,
            **({"experts": asdict(self.experts)} if self.experts else {}),
        }


def layer_from(data: JSON) -> LayerFigures:
    """Figures as the journal stores them."""
    return LayerFigures(**{**data, "notes": tuple(data["notes"])})


def tuning_from(data: JSON | None) -> TuneFigures | None:
    """Figures as the journal stores them."""
    return TuneFigures(**{**data, "notes": tuple(data["notes"])}) if data else None


def block_from(data: JSON) -> BlockFigures:
    """Figures as the journal stores them."""
    layers = tuple(layer_from(layer) for layer in data["layers"])
    return BlockFigures(data["index"], layers, tuning_from(data["tuning"]))


def figures_from(data: JSON) -> Figures:
    """The reverse of `Figures.as_json`."""
    blocks = tuple(block_from(block) for block in data["blocks"])
    experts = ExpertFigures(**data["experts"]) if "experts" in data else None
    return Figures(data["scheme"], blocks, tuning_from(data["end_to_end"]), experts)
