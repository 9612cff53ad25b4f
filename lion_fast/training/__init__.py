"""Training LION stage by stage with transformers' Trainer: `lion-fast train`."""

from lion_fast.training.data import LionCollator
from lion_fast.training.recipe import Recipe, RecipeError, load_recipe, shipped_recipe
from lion_fast.training.run import train
from lion_fast.training.trainer import LionTrainer, NonFiniteError

__all__ = [
    "LionCollator",
    "LionTrainer",
    "NonFiniteError",
    "Recipe",
    "RecipeError",
    "load_recipe",
    "shipped_recipe",
    "train",
]
