"""What the scores of layers say: {criterion: [score of layer 0, 1, ...]}, None where not known."""

from collections.abc import Sequence


def order(scores: Sequence[float | None]) -> list[int]:
    """Layers, the first to be replaced first; layers without a score are left out."""
    known = [layer for layer, score in enumerate(scores) if score is not None]
    return sorted(known, key=lambda layer: scores[layer])


def disagreements(scores: dict[str, list], count: int | None = None) -> list[str]:
    """A sentence for each criterion whose first `count` layers (default: half) are mostly others.

    Compared is with "loss", which measures what the others estimate, or else with "residual".
    """
    reference = "loss" if "loss" in scores else "residual"
    right = order(scores[reference])
    count = count or max(1, len(right) // 2)
    notes = []
    for name in scores:
        first = order(scores[name])[:count]
        differ = len(set(first) - set(right[:count]))
        if differ > count / 4:
            notes.append(
                f"{name} and {reference} disagree on {differ} of the first {count} layers: "
                f"{_ids(first)} by {name}, {_ids(right[:count])} by {reference}"
            )
    return notes


def _ids(layers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
