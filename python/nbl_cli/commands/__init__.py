"""The commands, a file each: parses its options, calls the library, shows and returns its result.

Libraries are imported where they are used: `--help` needs none, nor does `nbl report` need torch.
"""

from .bench import bench
from .calibrate import calibrate
from .compress import compress
from .demo import demo
from .doctor import doctor
from .evaluate import _eval
from .generate import generate
from .heal import heal
from .rank import rank
from .report import _report

COMMANDS = (calibrate, rank, compress, heal, _eval, generate, _report, bench, demo, doctor)
