"""What this package adds to qconvert. Imported at every start of `qconvert`: keep it this small."""

from pathlib import Path

from qconvert.contract import FormatInfo
from qconvert.registry import Layout, MethodInfo

METHOD = MethodInfo(
    verb="absmax8",
    summary="Absmax: 8 bits, rounded to the nearest of 255 steps of each row",
    layouts={
        "absmax8": Layout(
            method="qconvert_absmax8.absmax8:Absmax8",
            container="qconvert_absmax8.absmax8:CONTAINER",
        )
    },
    bits=(8,),
    options={"clip": "the part of each row's largest magnitude that is kept (default 1)"},
    types={"clip": float},
)
FORMAT = FormatInfo(
    folder=Path(__file__).parent / "format",
    container="qconvert_absmax8.absmax8:CONTAINER",
    loader="qconvert_absmax8.loading:load",
)
