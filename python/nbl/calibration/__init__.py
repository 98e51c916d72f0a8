"""What is measured of a model, and how.

calibration   Calibration: the sums of every layer, and the maps and scores that follow from them
calibrate     the pass over the text that fills it
sequential    the same, layer by layer, each on what those below have become
ranking       scores of layers, and their order
partial       some layers of a model, run on a stream that was kept
store         its files, and what identifies a model and its batches
"""

from .calibrate import calibrate, fit_sequentially, measure_moments
from .calibration import Calibration
from .ranking import CRITERIA, MEASURED, LayerScore, added_losses

__all__ = [
    "CRITERIA",
    "MEASURED",
    "Calibration",
    "LayerScore",
    "added_losses",
    "calibrate",
    "fit_sequentially",
    "measure_moments",
]
