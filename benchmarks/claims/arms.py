"""The arms of the experiment as data: what each trains, on which data, from which weights, and with which tags.

Every arm is the quickstart's small LION around the same frozen stand-ins. The arms differ only in their fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from lion_fast.processing_lion import TAG_SENTENCE
from lion_fast.quickstart.data import SceneSet
from lion_fast.quickstart.main import ADAMW_LR, KINDS, MUON_LR
from lion_fast.scenes import TAGS
from lion_fast.training.stages import STAGES, Stage

IMAGE, REGION, JOINT = STAGES[:3]
IMAGE_KINDS, REGION_KINDS = ("caption", "vqa"), ("rec",)
TRAINED_WRONG, WRONG_RATES = 0.25, (0.0, 0.25, 0.5)  # shares of true tags replaced by others
BLUR = 1.5  # noise of blurred vision features, in units of their standard deviation
PLAIN_SENTENCE = TAG_SENTENCE.removeprefix("According to {soft_prompt}, ")


@dataclass(frozen=True)
class Arm:
    """One training run.

    Args:
        name: of its result file.
        label: in tables.
        stage: the stage whose modules, kinds of instructions and learning rates it uses.
        steps: stages whose numbers of steps are summed.
        measured: kinds of instructions to evaluate.
        after: arms whose weights it starts from.
        shares_adapter: one adapter for both tasks, as large as two, instead of the mixture.
        routed: whether routers are trained; otherwise both adapters serve both tasks equally, with weight 1.
        aggregates: whether the aggregator is trained; otherwise it only normalises the last layer, as initialised.
        reads_tags: whether the language model has been taught to read tags.
        blurred: whether noise is added to the vision features, to model a weaker tower.
        tag_sentence: sentence of the tags, with `{tags}` and perhaps `{soft_prompt}`; None for no tags. In training,
            the share TRAINED_WRONG of tags is wrong; evaluation uses all WRONG_RATES.
        rates_of: stages whose learning rates are averaged; `stage` alone if empty.
    """

    name: str
    label: str
    stage: Stage
    steps: tuple[int, ...]
    measured: tuple[str, ...]
    after: tuple[str, ...] = ()
    shares_adapter: bool = False
    routed: bool = True
    aggregates: bool = True
    reads_tags: bool = False
    blurred: bool = False
    tag_sentence: str | None = None
    rates_of: tuple[int, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of instructions, whose batches alternate."""
        return KINDS[self.stage.number]

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peaks of the schedules, derived from the quickstart's."""
        numbers = self.rates_of or (self.stage.number,)
        return {name: mean(rates[n] for n in numbers) for name, rates in (("muon_lr", MUON_LR), ("adamw_lr", ADAMW_LR))}


_EVERYTHING = (*IMAGE_KINDS, *REGION_KINDS)
# Region-level training through the Q-Former, which is then the only visual input.
_REGION_BY_QFORMER = replace(REGION, visual_input=IMAGE.visual_input, modules=IMAGE.modules)

STAGED = (
    Arm("stage1", "stage 1 alone", IMAGE, (1,), IMAGE_KINDS),
    Arm("stage2", "aggregator", REGION, (2,), REGION_KINDS),
    Arm("routers", "staged, mixture with routers", JOINT, (3,), _EVERYTHING, after=("stage1", "stage2")),
    Arm("no-routers", "staged, mixture without routers", JOINT, (3,), _EVERYTHING, ("stage1", "stage2"), routed=False),
    Arm(
        "shared", "mixed data, one shared adapter", JOINT, (1, 2, 3), _EVERYTHING, shares_adapter=True, rates_of=(1, 2)
    ),
)
GROUNDING = (
    Arm("last-layer", "last layer alone, no aggregator", REGION, (2,), REGION_KINDS, aggregates=False),
    Arm("qformer", "Q-Former alone", _REGION_BY_QFORMER, (2,), REGION_KINDS),
)
_DOUBTFUL = Arm("blurred", "blurred, before tags", IMAGE, (1,), IMAGE_KINDS, reads_tags=True, blurred=True)
_TOLD = replace(_DOUBTFUL, steps=(3,), after=("blurred",), rates_of=(3,))
TAGGING = (
    replace(_TOLD, name="untagged", label="no tags"),
    replace(_TOLD, name="tags", label="tags", tag_sentence=PLAIN_SENTENCE),
    replace(_TOLD, name="soft-prompt", label="tags, soft prompt", tag_sentence=TAG_SENTENCE),
)
ARMS = (*STAGED, *GROUNDING, _DOUBTFUL, *TAGGING)


def noisy_tags(scene_set: SceneSet, wrong: float, seed: Sequence[int]) -> list[str]:
    """Return every scene's tags in LION's format, as from a tagger that always makes the same mistakes."""
    return [
        ", ".join(replace_tags(scene.tags, wrong, np.random.default_rng([*seed, index])))
        for index, scene in enumerate(scene_set.scenes)
    ]


def replace_tags(tags: Sequence[str], share: float, rng: np.random.Generator) -> tuple[str, ...]:
    """Replace each tag by a false one with probability `share`; the result has the order of `TAGS`."""
    kept = [tag for tag in tags if rng.random() >= share]
    absent = [tag for tag in TAGS if tag not in tags]
    wrong = rng.choice(absent, size=len(tags) - len(kept), replace=False)
    return tuple(sorted([*kept, *map(str, wrong)]))


def accuracy_name(kind: str, wrong: float | None = None) -> str:
    """Return the name of an accuracy in the results: `caption`, or `caption, 25% of tags wrong`."""
    return kind if wrong is None else f"{kind}, {wrong:.0%} of tags wrong"
