"""What the peers' workers share: requests on stdin, answers on stdout, a JSON line each.

A worker runs in the peer's own environment and imports nothing else of this repository. Requests:
{"prefill": [[token, ...], ...], "room": n} -> {"seconds": s, "tokens": [first new token of each]},
{"decode": n} -> {"seconds": s}. It says {"ready": {versions and settings}} once its model is
loaded, and waits on a read, at rest, until it is asked.
"""

import json
import os
import sys
import time
from collections.abc import Callable


def serve(load: Callable[[], tuple[object, dict]]) -> None:
    """load() returns (engine, settings); engine.prefill(prompts, room) and engine.decode(steps) do
    the work that is timed, engine.prepare(prompts, room) and engine.tokens() what is not."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(what: dict) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    engine, settings = load()
    answer({"ready": settings})
    for line in sys.stdin:
        request = json.loads(line)
        if "prefill" in request:
            prompts = request["prefill"]
            engine.prepare(prompts, request["room"])
            start = time.perf_counter()
            engine.prefill(prompts)
            answer({"seconds": time.perf_counter() - start, "tokens": engine.tokens()})
        else:
            start = time.perf_counter()
            engine.decode(request["decode"])
            answer({"seconds": time.perf_counter() - start})
