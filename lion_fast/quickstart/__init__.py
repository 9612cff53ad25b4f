"""LION's training and evaluation on a laptop: `lion-fast quickstart`."""

from lion_fast.quickstart.data import SceneSet, render
from lion_fast.quickstart.evaluation import Metrics, evaluate
from lion_fast.quickstart.main import Settings, run

__all__ = ["Metrics", "SceneSet", "Settings", "evaluate", "render", "run"]
