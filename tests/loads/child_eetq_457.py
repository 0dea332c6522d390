"""`child_457.py` with a stand-in for the package `eetq`, which is built from source for a GPU.

Its EetqLinear has upstream's buffers; where upstream calls its kernel, the bytes are read one by
one as formats/eetq/FORMAT.md says. transformers' own code finds it, puts it in place and loads it.
"""

import importlib.util
import sys
import types

import child_457
import torch


class EetqLinear(torch.nn.Module):
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
        k = torch.arange(self.weight.shape[0])
        n = torch.arange(self.weight.shape[1])[:, None]
        at = (n // 2) * 2 * len(k) + (k // 64) * 128 + (n % 2) * 64
        at = at + (k % 64) // 16 * 16 + (k % 8) * 2 + (k % 16) // 8
        codes = self.weight.contiguous().view(torch.uint8).reshape(-1)[at].float() - 128
        product = (x.float() @ (codes * self.weight_scales.float()[:, None]).T).half()
        return product if self.bias is None else product + self.bias


def main():
    eetq = types.ModuleType("eetq")
    eetq.EetqLinear = EetqLinear
    eetq.__spec__ = importlib.util.spec_from_loader("eetq", None)
    sys.modules["eetq"] = eetq
    import transformers.utils.import_utils

    transformers.utils.import_utils._eetq_available = True
    from transformers.quantizers.quantizer_eetq import EetqHfQuantizer

    EetqHfQuantizer.validate_environment = lambda self, *args, **kwargs: None
    child_457.main()


if __name__ == "__main__":
    main()
