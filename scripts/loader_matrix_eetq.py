"""`elsewhere_child.py` with a stand-in for EETQ's kernel, which runs on some GPUs alone.

transformers' own code checks, puts its layers in place, loads and calls them; replaced are the
checks for a GPU and a package, and the kernel: it reads the bytes one by one, as
formats/eetq/FORMAT.md says. transformers 4 takes the layer from the package `eetq`, transformers 5
has one that takes the kernel from the Hub.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

CHILD = Path(__file__).parent.parent / "qconvert" / "validation" / "elsewhere_child.py"


def main() -> None:
    spec = importlib.util.spec_from_file_location("elsewhere_child", CHILD)
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    look = child.look

    def with_a_stand_in(case, device, seen):
        stand_in()
        look(case, device, seen)

    child.look = with_a_stand_in  # torch is imported after the child has cut itself off
    child.main()


def stand_in() -> None:
    import torch
    import transformers
    from transformers.quantizers.quantizer_eetq import EetqHfQuantizer

    EetqHfQuantizer.validate_environment = lambda self, *args, **kwargs: None

    def product(x, weight, scales):
        """What the kernel computes, from the bytes that it is given."""
        k = torch.arange(weight.shape[0])
        n = torch.arange(weight.shape[1])[:, None]
        at = (n // 2) * 2 * len(k) + (k // 64) * 128 + (n % 2) * 64
        at = at + (k % 64) // 16 * 16 + (k % 8) * 2 + (k % 16) // 8
        codes = weight.contiguous().view(torch.uint8).reshape(-1)[at].float() - 128
        return (x.float() @ (codes * scales.float()[:, None]).T).half()

    if int(transformers.__version__.split(".")[0]) < 5:
        _package(product)
        return
    from transformers.integrations import hub_kernels

    hub_kernels.get_kernel = lambda *args, **kwargs: types.SimpleNamespace(w8_a16_gemm=product)


def _package(product) -> None:
    """The package `eetq`: its layer has upstream's buffers."""
    import torch
    import transformers.utils.import_utils

    class EetqLinear(torch.nn.Module):
        __module__ = "transformers.integrations.eetq"  # as transformers 5 calls its own

        def __init__(self, in_features, out_features, bias=True, device="cpu"):
            super().__init__()
            shape, options = (in_features, out_features), {"dtype": torch.float16, "device": device}
            self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8, device=device))
            self.bias = None
            if bias:
                del self.bias
                self.register_buffer("bias", torch.zeros(out_features, **options))

        def register_scale(self, device):
            scales = torch.zeros(self.weight.shape[-1], dtype=torch.float16, device=device)
            self.register_buffer("weight_scales", scales)

        def forward(self, x):
            computed = product(x, self.weight, self.weight_scales)
            return computed if self.bias is None else computed + self.bias

    if "eetq" in sys.modules:
        return
    eetq = types.ModuleType("eetq")
    eetq.EetqLinear = EetqLinear
    eetq.__spec__ = importlib.util.spec_from_loader("eetq", None)
    sys.modules["eetq"] = eetq
    transformers.utils.import_utils._eetq_available = True


if __name__ == "__main__":
    main()
