"""The paper's claims, tried at small scale: `lion-fast claims`."""

from lion_fast.claims.arms import ARMS, Arm
from lion_fast.claims.experiment import Settings, run

__all__ = ["ARMS", "Arm", "Settings", "run"]
