"""`import qconvert.loaders`: stock `from_pretrained` of transformers 5 then reads HQQ checkpoints.

    import qconvert.loaders
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")

transformers 5.0 to 5.23 has no code that loads HQQ: it warns, leaves random weights, and returns
the model. Importing this package puts a quantizer that loads them in the place of the one that
does not, for this process, and does nothing else. It steps aside where transformers loads HQQ
itself: in 4.x, in a later release that can again, and where another package was first. It says
so once, when the first checkpoint is read. What cannot be loaded raises an error, never a model
with noise in it.

Works wherever transformers does; hqq (`pip install hqq`) is needed when a checkpoint is read.
"""

from __future__ import annotations

__all__ = ["reads_hqq"]


def _register() -> bool:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return False
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    present = auto.AUTO_QUANTIZER_MAPPING.get("hqq")
    from qconvert.loaders.hqq import HqqLoader, upstream_loads

    if present is not HqqHfQuantizer or upstream_loads(HqqHfQuantizer):
        return present is HqqLoader
    auto.AUTO_QUANTIZER_MAPPING["hqq"] = HqqLoader  # register_quantizer refuses a name in use
    return True


reads_hqq: bool = _register()
"""Whether HQQ checkpoints are read by qconvert now; False where transformers does it itself."""
