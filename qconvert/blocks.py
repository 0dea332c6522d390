"""The stack of decoder blocks, found by structure: what a calibrated method works through.

A block is what repeats: modules `prefix.0`, `prefix.1`, … that hold linear layers. A model may have
more than one such stack. A vision or audio tower is told by its name, and the decoder by what feeds
it: its parent owns the token embedding. Two stacks that both claim to be fed by tokens are an
encoder and a decoder, whose blocks read two inputs, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qconvert.errors import UnsupportedConfig
from qconvert.types import Kind, Structure

_BLOCK = re.compile(r"(?P<prefix>.*?)\.(?P<index>\d+)\.")
_TOWERS = re.compile(r"(^|[._])(vision|visual|image|audio|speech)")


@dataclass(frozen=True, slots=True)
class Blocks:
    """The modules `prefix.0` … `prefix.{count - 1}` of the model in memory."""

    prefix: str
    """`model.layers`: the path of their list."""
    count: int


def find_blocks(structure: Structure) -> Blocks:
    """The decoder's blocks. Raises UnsupportedConfig where there are none, or more than one kind.

    Only layers of Kind.LINEAR count: where all are Conv1D (GPT-2) there is nothing to calibrate.
    """
    counts, with_layers = _stacks(structure)
    stacks = [prefix for prefix in counts if prefix in with_layers]
    if not stacks:
        raise UnsupportedConfig(_nothing(structure))
    towers = [prefix for prefix in stacks if _TOWERS.search(prefix)]
    stacks = [prefix for prefix in stacks if prefix not in towers] or stacks
    if len(stacks) > 1:
        stacks = _fed_by_tokens(structure, stacks) or stacks
    if len(stacks) > 1:
        raise UnsupportedConfig(
            f"{structure.architecture} is no decoder: AQLM calibrates one stack of blocks that "
            f"read each other's output, and here are {', '.join(sorted(stacks))}",
            hint="qconvert nf4 MODEL needs no calibration",
        )
    return Blocks(stacks[0], counts[stacks[0]])


def block_of(blocks: Blocks, module_path: str) -> int | None:
    """The number of the block that a module belongs to, or None."""
    rest = module_path.removeprefix(f"{blocks.prefix}.")
    index = rest.partition(".")[0]
    return int(index) if rest != module_path and index.isdigit() else None


def _stacks(structure: Structure) -> tuple[Mapping[str, int], frozenset[str]]:
    """Lists of modules numbered from 0 on → their length; and those that hold linear layers."""
    numbers: dict[str, set[int]] = {}
    with_layers = set()
    for role in structure.roles.values():
        found = _BLOCK.match(f"{role.module}.")
        if found is not None:
            numbers.setdefault(found["prefix"], set()).add(int(found["index"]))
            if role.kind is Kind.LINEAR:
                with_layers.add(found["prefix"])
    whole = {prefix: len(seen) for prefix, seen in numbers.items() if seen == set(range(len(seen)))}
    return whole, frozenset(with_layers)


def _fed_by_tokens(structure: Structure, stacks: list[str]) -> list[str]:
    """Those whose parent module owns an embedding."""
    owners = {
        role.module.rpartition(".")[0]
        for role in structure.roles.values()
        if role.kind is Kind.EMBEDDING
    }
    return [prefix for prefix in stacks if prefix.rpartition(".")[0] in owners]


def _nothing(structure: Structure) -> str:
    if any(role.kind is Kind.CONV1D for role in structure.roles.values()):
        return (
            f"the linear layers of {structure.architecture} are Conv1D, which no loader of AQLM "
            "replaces: it replaces nn.Linear alone"
        )
    return f"{structure.architecture} has no repeated blocks with linear layers to calibrate"
