"""Reload's findings: what a loaded model must look like and how close it must come.

Against our own dequantization the tolerance is 1e-5 in float32 and 1e-2 in bfloat16, where both
sides round the same weights and may add in another order. LLM.int8 quantizes the activations too,
which no plain model does, so there the two are compared by KL divergence. Against the source the
bound depends on the method: the `kl` rows of formats/<name>/tensors.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconvert import contract
from qconvert.stored import Stored
from qconvert.types import JSON, Check, Kind, Structure
from qconvert.validation.measure import Text, divergence, relative_error
from qconvert.validation.reports import listed, rounded

Tensor = Any

LOGITS_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Relative error of logits against our own dequantization."""
ACTIVATIONS_KL = 0.01
"""The same where activations are quantized: nats a token. Measured with LLM.int8 in bfloat16 on a
trained 6 M Llama: 2.6e-4, a third of it bfloat16's own rounding."""
COPIES = (1e-3, 1e-2)
"""`bounds` of a checkpoint that holds the source's own weights and no codes."""
ACTIVATIONS_ERROR = 0.05
"""The same without a causal head: relative error of the output."""


def classes(stored: Stored, found: Mapping[str, str], structure: Structure) -> Check:
    """Every quantized layer has the loader's class, and nothing else has.

    `found` is the class of every module by its path in memory, as `class_of` names it. Another
    version may have a module elsewhere: then under its name on disk, alone or in "model". Experts
    that are merged as they are loaded have no class of their own.
    """
    variants = contract.load(stored.container.name).variants
    on_disk = structure.modules

    def there(path: str) -> str:
        name = on_disk.get(path) or path
        return next((it for it in (path, name, f"model.{name}") if it in found), path)

    merged = {
        name
        for name, (layer, _) in stored.layers.items()
        if there(layer.module) not in found
        and (role := structure.roles.get(layer.tensor.name)) is not None
        and (role.kind is Kind.EXPERT and role.module in found)
    }
    expected = {
        there(layer.module): variants[stored.container.variant(method)]["layer_class"]
        for name, (layer, method) in stored.layers.items()
        if name not in merged
    }
    wrong = [
        f"{path}: expected {wanted}, got {found.get(path, 'no such layer')}"
        for path, wanted in expected.items()
        if not _is(found.get(path, ""), wanted)
    ]
    # Where a loader dequantizes, all layers look alike.
    kinds_of_it = {_package_and_name(it) for it in expected.values()} - {("torch", "Linear")}
    packages = {package for package, _ in kinds_of_it} - {"transformers"}  # it has all the others
    wrong += [
        f"{path}: expected a layer in full precision, got {got}"
        for path, got in found.items()
        if path not in expected
        and (_package_and_name(got)[0] in packages or _package_and_name(got) in kinds_of_it)
    ]
    wrong += [f"{path}: no such layer" for path in on_disk if there(path) not in found]
    kinds = ", ".join(sorted(set(expected.values())))
    kept = sum(there(path) not in expected for path in on_disk)
    parts = [f"{len(expected)} × {kinds}"] if expected else []
    parts += [f"{len(merged)} experts, merged"] if merged else []
    return Check(
        "every layer has its class",
        not wrong,
        listed(wrong) or ", ".join([*parts, f"{kept} in full precision"]),
    )


def class_of(module: Any) -> str:
    """Package, module and name of an object's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is(found: str, wanted: str) -> bool:
    """`gptqmodel.*` is any class of that package, which has one for each kernel."""
    package, name = _package_and_name(found)
    return _package_and_name(wanted) in ((package, name), (package, "*"))


def _package_and_name(path: str) -> tuple[str, str]:
    """`bitsandbytes.nn.modules.Linear4bit` is exported as `bitsandbytes.nn.Linear4bit`."""
    return path.partition(".")[0], path.rpartition(".")[2]


def keys(complaints: frozenset[str], of_source: frozenset[str]) -> Check:
    """The loader misses nothing and has nothing left over, beyond what the source itself lacks."""
    new = sorted(complaints - of_source)
    detail = "no missing, unexpected or mismatched key"
    if of_source:
        detail += f" beyond the {len(of_source)} of the source itself"
    return Check("loading info is empty", not new, listed(new) or detail)


def hqq_layers(misread: Sequence[str]) -> Check:
    """The hqq library reads from the files what the loader has put into the model."""
    return Check("the hqq library reads the same layers", not misread, listed(misread))


def against_ours(
    stored: Stored, ours: Tensor, theirs: Tensor, text: Text, dtype: str, *, causal: bool
) -> tuple[list[Check], JSON]:
    """The loader's outputs are finite, and those of the weights that we decode."""
    finite = bool(theirs.isfinite().all())
    checks = [Check("outputs are finite", finite, f"{theirs.numel():,} values")]
    error = relative_error(ours, theirs)
    data: JSON = {"loader_error": rounded(error)}
    name = "loader agrees with our own dequantization"
    if any(method.name == "llm_int8" for _, method in stored.layers.values()):
        if causal:
            kl = divergence(ours, theirs, text.ids).kl
            data["loader_kl"] = rounded(kl)
            checks.append(_bounded(name, kl, ACTIVATIONS_KL, "KL divergence, nats a token"))
        else:
            checks.append(_bounded(name, error, ACTIVATIONS_ERROR, "relative error"))
    else:
        checks.append(_bounded(name, error, LOGITS_TOLERANCE[dtype], f"relative error, {dtype}"))
    return checks, data


def against_source(
    stored: Stored, reference: Tensor, theirs: Tensor, text: Text, *, causal: bool
) -> tuple[list[Check], JSON]:
    """How far the quantized model is from its source, and whether that is as expected."""
    kl_high, error_high = bounds(stored)
    if not causal:
        error = relative_error(reference, theirs)
        check = _bounded("output is close to the source's", error, error_high, "relative error")
        return [check], {"output_error": rounded(error)}
    found = divergence(reference, theirs, text.ids)
    check = _bounded("KL divergence from the source", found.kl, kl_high, "nats a token")
    data: JSON = {
        "kl_divergence": rounded(found.kl),
        "top1_agreement": rounded(found.top1),
        "source_perplexity": rounded(found.perplexity_reference),
        "perplexity": rounded(found.perplexity),
    }
    return [check], data


def continuations(
    text: Text,
    quantized: tuple[list[int], list[int]],
    source: tuple[list[int], list[int]] | None,
) -> tuple[list[Check], JSON]:
    """The text is not one repeated token. Greedy text of a small model may loop: then sampled."""
    greedy, sampled = quantized
    varied = len(set(greedy)) > 1 or len(set(sampled)) > 1
    samples = {
        "prompt": text.decode(text.prompt[0].tolist()),
        **({"source": text.decode(source[0])} if source else {}),
        "quantized": text.decode(greedy),
    }
    check = Check("text is not one repeated token", varied, f"{len(set(greedy))} different tokens")
    return [check], {"samples": samples}


def bounds(stored: Stored) -> tuple[float, float]:
    """The highest KL divergence (nats a token) and output error expected of a folder's methods.

    Layers may differ in their options: the loosest row counts.
    """
    if not stored.layers:
        return COPIES
    data = contract.load(stored.container.name)
    rows = []
    for layer, method in stored.layers.values():
        env = contract.environment(layer, method)
        for row in data.variants[stored.container.variant(method)]["kl"]:
            if contract.evaluate(row.get("when", "True"), env):
                rows.append((row["high"], row["output_high"]))
                break
    return max(high for high, _ in rows), max(high for _, high in rows)


def _bounded(name: str, value: float, high: float, unit: str) -> Check:
    return Check(name, value <= high, f"{value:.3g} ≤ {high:g} {unit}" if value <= high else
                 f"expected ≤ {high:g} {unit}, got {value:.3g}")  # fmt: skip
