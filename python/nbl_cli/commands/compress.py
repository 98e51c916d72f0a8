"""nbl compress: calibrate, rank, linearize, measure, save."""

import time

from .. import options as given
from ..options import CALIBRATION_TOKENS, parse_layers, parse_memory, parse_window
from ..output import new_folder
from ..show import done, note, progress, show_plan, show_points, show_scores, show_step


def compress(
    model: given.Model,
    text: given.Texts = None,
    mix: given.Mix = None,
    layers: given.Layers = None,
    output: given.Output = ...,
    speedup: given.Speedup = None,
    kv_bytes: given.KvBytes = None,
    context: given.Context = None,
    batch: given.Batch = None,
    window: given.WindowSize = None,
    sinks: given.Sinks = None,
    preset: given.Preset = None,
    criterion: given.Criterion = None,
    features: given.Features = None,
    bias: given.Bias = True,
    ridge: given.Ridge = 1e-4,
    rank: given.Rank = None,
    memory: given.Memory = False,
    lags: given.Lags = None,
    decays: given.Decays = None,
    choose_decays: given.ChooseDecays = None,
    sequential: given.Sequential = False,
    refit_mlp: given.RefitMlp = False,
    drop: given.Drop = False,
    calibration: given.CalibrationFolder = None,
    evaluate: given.Evaluate = False,
    eval_text: given.EvalText = None,
    other_text: given.OtherText = None,
    eval_tokens: given.EvalTokens = 65_536,
    sweep: given.Sweep = False,
    max_tokens: given.MaxTokens = None,
    length: given.Length = None,
    batch_size: given.BatchSize = None,
    overwrite: given.Overwrite = False,
    dtype: given.Dtype = "auto",
    device: given.Device = "auto",
    threads: given.Threads = None,
    as_json: given.Json = False,
) -> dict:
    """Calibrate, rank, replace M attention layers by linear maps, and save the model.

    Or bound what they see (--window), or choose the best kind for every layer (--speedup,
    --kv-bytes).

    Examples: `nbl compress meta-llama/Llama-3.2-1B --text book.txt --layers 6 -o llama-nbl-6`,
    `nbl compress demo --layers 4 --eval -o demo-nbl-4`,
    `nbl compress demo --layers 6 --memory --rank 24 --eval -o demo-memory-6`,
    `nbl compress smollm2 --text book.txt --layers 12 --window 128 -o smollm2-window-12`,
    `nbl compress demo --speedup 1.3 --context 1024 --batch 8 --eval -o demo-planned`
    """
    import nbl
    from nbl import pipeline

    from .. import models

    start = time.perf_counter()
    remembered = parse_memory(memory, lags, decays, choose_decays)
    bounded = parse_window(window, sinks)
    fitting = {"sequential": sequential, "refit_mlp": refit_mlp, "drop": drop, "sweep": sweep}
    pipeline.check_choices(memory=remembered, **fitting)
    with new_folder(output, overwrite=overwrite) as folder:
        known = nbl.Calibration.load(calibration) if calibration else None
        loaded, tokenizer = models.load(model, dtype, device)
        total = loaded.config.num_hidden_layers
        asked = None if layers is None else parse_layers(layers, total)
        maps = total if asked is None else asked if isinstance(asked, int) else len(asked)
        if drop or (bounded and asked is not None):
            maps = 0
        own = remembered if known is None else known.memory
        models.prepare_saving(loaded, tokenizer, folder, maps, own, rank)
        record = models.new_record("compress", model, loaded)
        documents, sources = [], []
        if known is None or text or model == "demo":
            most = max_tokens or (pipeline.PAPER["max_tokens"] if preset else CALIBRATION_TOKENS)
            documents, sources = models.read_texts(model, text, most, mix=mix)
        evaluate = evaluate or sweep or bool(eval_text or other_text)
        held_out, eval_sources, other, other_sources = None, [], None, []
        if evaluate:
            held_out, eval_sources = models.read_held_out(model, eval_text, sources, eval_tokens)
            read = sources + eval_sources
            other, other_sources = models.read_other(other_text, read, eval_tokens)
        with progress() as watch:
            compressed = nbl.compress(
                loaded,
                tokenizer,
                documents,
                layers=asked,
                speedup=speedup,
                kv_bytes=kv_bytes,
                context=context,
                batch=batch,
                window=bounded,
                preset=preset,
                criterion=criterion,
                features=features,
                memory=remembered,
                ridge=ridge,
                bias=bias,
                rank=rank,
                **fitting,
                calibration=known,
                evaluate=evaluate,
                eval_text=held_out,
                other_text=other,
                eval_tokens=eval_tokens,
                max_tokens=max_tokens,
                length=length,
                batch_size=batch_size,
                watch=watch,
                say=show_step,
            )
        record |= models.compressed_part(compressed, sources, eval_sources, other_sources)
        if known is not None:
            record["calibration"] = {"folder": str(calibration), "features": known.features}
        models.save(loaded, folder, record, start)
    show_scores(record["scores"], compressed.layers)
    show_plan(record["choice"])
    show_points(record)
    for sentence in record["notes"]:
        note(sentence)
    done(output, start)
    return {**record, "output": str(output)}
