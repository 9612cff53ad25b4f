"""Small-scale experiments on the paper's claims: `python -m benchmarks.claims`."""

from benchmarks.claims.arms import ARMS, Arm
from benchmarks.claims.experiment import Settings, run

__all__ = ["ARMS", "Arm", "Settings", "run"]
