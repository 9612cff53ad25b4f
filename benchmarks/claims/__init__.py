"""The paper's claims, tried at small scale: `python -m benchmarks.claims`."""

from benchmarks.claims.arms import ARMS, Arm
from benchmarks.claims.experiment import Settings, run

__all__ = ["ARMS", "Arm", "Settings", "run"]
