"""What an adapter is: its kind and the modules it acts on, as PEFT's configuration."""

from __future__ import annotations

import re
from typing import Any, Literal

Kind = Literal["lora", "dora", "loha", "lokr"]
"""Low rank (arXiv 2106.09685), the same with a trained magnitude (2402.09353), Hadamard product of two low ranks
(2108.06098), Kronecker product (2309.14859)."""

# SVD's cross-attention sees one CLIP token, so its softmax is constant and attn2.to_q / to_k get no gradient: left out.
_ATTENTION = r"(attn1\.(to_q|to_k|to_v|to_out\.0)|attn2\.(to_v|to_out\.0))"
_FEED_FORWARD = r"(ff|ff_in)\.net\.(0\.proj|2)"
_TRANSFORMERS = rf"(temporal_)?transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})"
_CONVOLUTIONS = r"(spatial|temporal)_res_block\.conv[12]"
TARGET_PRESETS: dict[str, str] = {
    "temporal": rf".*\.temporal_transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})",
    "spatial": rf".*\.transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})",
    "all": rf".*\.{_TRANSFORMERS}",
    # What Generative Inbetweening trains (arXiv 2408.15239).
    "motion": r".*\.temporal_transformer_blocks\.\d+\.attn1\.(to_v|to_out\.0)",
    "conv": rf".*\.{_CONVOLUTIONS}",
    "all_conv": rf".*\.({_TRANSFORMERS}|{_CONVOLUTIONS})",
}
"""Regular expressions, matched against whole module names of the UNet."""


def target_pattern(targets: str) -> str:
    """Regular expression of a preset (one of `TARGET_PRESETS`), or `targets` itself if it is one already.

    Raises:
        ValueError: if `targets` is neither a preset nor a valid regular expression.
    """
    if targets in TARGET_PRESETS:
        return TARGET_PRESETS[targets]
    try:
        re.compile(targets)
    except re.error as error:
        raise ValueError(
            f"targets={targets!r}: neither a preset ({', '.join(TARGET_PRESETS)}) nor a regular expression: {error}."
        ) from None
    return targets


def adapter_config(
    *,
    targets: str,
    rank: int,
    alpha: float,
    kind: Kind = "lora",
    rslora: bool = False,
    dropout: float = 0.0,
) -> Any:
    """PEFT's configuration of an adapter.

    Args:
        targets: preset or regular expression, see `target_pattern`.
        rank: rank of the update, or of its factors.
        alpha: scale of the update: `alpha / rank`, or `alpha / sqrt(rank)` with `rslora` (arXiv 2312.03732).
        kind: see `Kind`.
        rslora: see `alpha`; `lora` and `dora` only.
        dropout: on the adapter's input; `lora` and `dora` only.

    Raises:
        ValueError: for invalid targets, or what the kind has not.
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    shared: dict[str, Any] = {"r": rank, "target_modules": target_pattern(targets)}
    if kind in ("lora", "dora"):
        return LoraConfig(
            **shared, lora_alpha=alpha, use_rslora=rslora, lora_dropout=dropout, use_dora=kind == "dora", bias="none"
        )
    if rslora or dropout:
        raise ValueError(f"kind={kind} knows neither rslora nor dropout; leave them out, or choose lora or dora.")
    return LoHaConfig(**shared, alpha=alpha) if kind == "loha" else LoKrConfig(**shared, alpha=alpha)
