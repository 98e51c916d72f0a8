"""nbl generate: a text continued."""

from typing import Annotated

import typer

from ..options import Device, Dtype, Json, Model, Threads, Weights
from ..streams import err


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option(help="Text to continue; - reads stdin.", show_default=False)
    ] = ...,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Sample from the likeliest tokens of this total probability."
        ),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from the K likeliest tokens; 0: from all.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    weights: Weights = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """Continue a text, token by token, and say how fast that went.

    Example: `nbl generate llama-nbl-6 --prompt "The residual stream" --temperature 0.7`
    """
    import torch
    from nbl.pipeline import length_limit
    from nbl.text import load_texts

    from .. import models

    prompt = load_texts(["-"])[0] if prompt == "-" else prompt
    loaded, tokenizer = models.load(model, dtype, device, weights)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not prompt or not ids.numel():
        raise ValueError("prompt: expected some text, got none")
    limit = length_limit(loaded)
    if ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max-new-tokens: expected at most {max(0, limit - ids.shape[1])} after a prompt of "
            f"{ids.shape[1]} tokens (the model's limit is {limit}), got {max_new_tokens}"
        )
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": False}
    if temperature:
        sampling = {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p or 1e-9,
            "top_k": top_k,
        }
    result = models.continue_text(loaded, tokenizer, ids, max_new_tokens, stream=True, **sampling)
    result = {"model": model, "prompt": prompt, **result, "seed": seed, "weights": weights}
    speed = result["decode_tokens_per_second"]
    err.print(
        f"prompt {result['prompt_tokens']} tokens, {result['prefill_tokens_per_second']:,.0f} "
        f"tokens/s; {result['new_tokens']} new tokens"
        + (f", {speed:,.1f} tokens/s" if speed else ""),
        style="dim",
    )
    return result
