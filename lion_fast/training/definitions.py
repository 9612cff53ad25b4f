"""The definitions of LION's training stages; `lion_fast.training.stages` applies them to models."""

from dataclasses import dataclass

from lion_fast.io.reading import shown
from lion_fast.tasks import TASKS

_IMAGE_PATH = ("vision_layernorm", "query_tokens", "qformer", "qformer_projection")
_REGION_PATH = ("aggregator", "aggregator_layernorm", "aggregator_projection")
_ADAPTER = ".adapter."


@dataclass(frozen=True)
class Stage:
    """A training stage.

    Args:
        number: 1, 2, 3 or 4.
        name: `image_level`, `region_level`, `joint` or `joint_published`.
        visual_input: `LionConfig.visual_input` of the stage's model.
        modules: parts of the model that are trained in addition to adapters, routers and soft prompt.
        tasks: names of the tasks, in equal shares.
        adapter_in_joint: index that this stage's single adapter gets in a joint stage; None for a joint stage.
    """

    number: int
    name: str
    visual_input: str
    modules: tuple[str, ...]
    tasks: tuple[str, ...]
    adapter_in_joint: int | None = None

    def trains(self, parameter_name: str) -> bool:
        """Return whether the stage trains this parameter of `LionForCausalLM`."""
        part = parameter_name.split(".", 1)[0]
        return part in self.modules or part == "soft_prompt" or _ADAPTER in parameter_name


STAGES = (
    Stage(1, "image_level", "QFORMER", _IMAGE_PATH, ("image_level",), TASKS.index("image_level")),
    Stage(2, "region_level", "AGGREGATOR", _REGION_PATH, ("region_level",), TASKS.index("region_level")),
    Stage(3, "joint", "ALL", _IMAGE_PATH + _REGION_PATH, ("image_level", "region_level")),
    Stage(4, "joint_published", "ALL", _IMAGE_PATH + _REGION_PATH, ("image_level", "region_level")),
)
STAGE_NUMBERS = tuple(stage.number for stage in STAGES)


def stage_of(number: int) -> Stage:
    """Return the stage with this number.

    Raises:
        ValueError: no stage has this number.
    """
    for stage in STAGES:
        if stage.number == number:
            return stage
    raise ValueError(f"stage: expected one of {', '.join(map(str, STAGE_NUMBERS))}, got {shown(number)}")
