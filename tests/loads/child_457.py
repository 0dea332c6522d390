"""Loads quantized folders with transformers 4.57: `python child_457.py` in its environment.

Knows nothing of qconvert, which needs transformers 5. A JSON list of
{folder, architecture, dtype, ids, logits} on stdin; on stdout one JSON object a line. `logits` is
the safetensors file with what the model must say.
"""

import json
import os
import sys
import traceback


def main():
    cases = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only results go to stdout
    for case in cases:
        try:
            seen = look(**case)
        except Exception as error:  # noqa: BLE001 - whatever a loader raises is a finding
            traceback.print_exc()
            seen = {"raised": f"{type(error).__name__}: {error}"}
        print(json.dumps(seen), file=channel, flush=True)


def look(folder, architecture, dtype, ids, logits):
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    dtype = getattr(torch, dtype)
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    hqq = any(type(module).__name__ == "HQQLinear" for module in model.modules())
    if hqq and dtype != torch.float32:
        model.to("cpu", dtype)  # 4.57 forgets to tell HQQLinear what it computes in
    inputs = {"input_ids": torch.tensor(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        out = model(**inputs)
    theirs = (out["logits"] if "logits" in out else out[0]).double()
    ours = load_file(logits)["logits"].double()
    return {
        "raised": None,
        "transformers": transformers.__version__,
        "complaints": sorted(
            f"{key}: {item}"
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
            for item in info.get(key, ())
        ),
        "classes": {path: type(module).__name__ for path, module in model.named_modules()},
        "finite": bool(theirs.isfinite().all()),
        "error": ((theirs - ours).norm() / ours.norm()).item(),
    }


if __name__ == "__main__":
    main()
