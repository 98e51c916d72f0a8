"""What the scores of layers say: {criterion: [score of layer 0, 1, ...]}, None where not known."""

from collections.abc import Sequence


def order(scores: Sequence[float | None]) -> list[int]:
    """Layers, the first to be replaced first; layers without a score are left out."""
    known = [layer for layer, score in enumerate(scores) if score is not None]
    return sorted(known, key=lambda layer: scores[layer])
