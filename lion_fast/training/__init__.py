"""Training LION stage by stage with transformers' Trainer: `lion-fast train`."""

from typing import TYPE_CHECKING

from lion_fast import _lazy

if TYPE_CHECKING:
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

__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "data": ("LionCollator",),
        "recipe": (
            "Recipe",
            "RecipeError",
            "load_recipe",
            "shipped_recipe",
        ),
        "run": ("train",),
        "trainer": (
            "LionTrainer",
            "NonFiniteError",
        ),
    },
)
