"""The rows of the ledger, by which the project is judged: LION's operators at its own sizes, and the model.

`benchmarks/bench_headline.py` measures the operators on a GPU; the ledger shows all rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

SUITE = "headline"
FORWARD, BACKWARD = "forward", "backward"
BOTH = (FORWARD, BACKWARD)
Shape = Mapping[str, int | float | str]


@dataclass(frozen=True)
class Source:
    """The origin of a headline's results.

    Attributes:
        suite, shape: as in its entries.
        directions: the directions in which it measures the same as the headline.
    """

    suite: str
    shape: Shape
    directions: tuple[str, ...]


@dataclass(frozen=True)
class Headline:
    """One operator, or the whole model, at one shape: a row of the ledger for each direction.

    Attributes:
        operator: its name in `lion_kernels`, or the measured part of the model.
        label: the shape in words.
        shape: sizes and forms by name.
        directions: "forward", "backward", or for the whole model its suite's names.
        suite: the suite that measures it.
        elsewhere: other suites that measure the same, without any difference that affects the time.
    """

    operator: str
    label: str
    shape: Shape
    directions: tuple[str, ...] = BOTH
    suite: str = SUITE
    elsewhere: tuple[Source, ...] = field(default=())

    @property
    def entry_shape(self) -> dict[str, int | float | str]:
        """The shape of its entries, which includes the operator in the suite of all operators."""
        return {"operator": self.operator, **self.shape} if self.suite == SUITE else dict(self.shape)

    @property
    def sources(self) -> tuple[Source, ...]:
        return Source(self.suite, self.entry_shape, self.directions), *self.elsewhere


def _rowwise(operator: str, channels: int, label: str) -> Headline:
    """Return the headline for rows of 16 sequences of 1024, which the operator's own suite also measures."""
    shape = {"tokens": 16 * 1024, "channels": channels}
    return Headline(operator, label, shape, elsewhere=(Source(operator, shape, BOTH),))


def _step(pictures: int, checkpointed: bool = False, size: str = "LION-FlanT5-XL") -> Headline:
    label = f"{size}, {pictures} images{', with gradient checkpointing' if checkpointed else ''}"
    shape = {"pictures": pictures, "checkpointed": checkpointed}
    return Headline("training step", label, shape, ("",), f"training_step_{pictures}")


def _generation(pictures: int, beams: int, tokens: int, size: str = "LION-FlanT5-XL") -> Headline:
    words = [f"{n} {name}{'s' if n > 1 else ''}" for n, name in ((pictures, "image"), (beams, "beam"))]
    label = f"{size}, {', '.join(words)}, {tokens} tokens"
    shape = {"pictures": pictures, "beams": beams}
    return Headline("generation", label, shape, ("generation",), "model_generation")


_XL = {"channels": 2048, "experts": 2, "rank": 64}
_XL_WORDS = "D 2048, E 2, r 64, channel gates"
_MIXED = {"gate": "channel", "tasks": "mixed", "batch": 16, "length": 1024, **_XL}
_ENCODER = {"stack": "encoder", "batch": 16, "queries": 417, "keys": 417}

# On a GPU, at the sizes of LION-FlanT5-XL; sparse gates have XXL's width.
HEADLINES: tuple[Headline, ...] = (
    Headline(
        "mixture_of_adapters",
        f"16 x 1024 tokens, {_XL_WORDS}, mixed tasks",
        _MIXED,  # the suite of mixture_of_adapters has a single task for all sequences, which is less work
    ),
    Headline(
        "mixture_of_adapters",
        f"5 x 1 tokens (a step of decoding), {_XL_WORDS}",
        {"gate": "channel", "tasks": "one", "batch": 5, "length": 1, **_XL},
        (FORWARD,),
        elsewhere=(Source("mixture_of_adapters", {**_XL, "tokens": 5}, (FORWARD,)),),
    ),
    Headline(
        "mixture_of_adapters",
        "16 x 1024 tokens, D 4096, E 8, r 64, sparse gates, k 2",
        {"gate": "sparse", "chosen": 2, "batch": 16, "length": 1024, "channels": 4096, "experts": 8, "rank": 64},
    ),
    Headline(
        "mixture_of_lora_linear",
        "16 x 1024 tokens, 2048 to 2048, E 2, r 64, channel gates, mixed tasks",
        _MIXED,
    ),
    Headline(
        "mixture_of_lora_linear",
        "5 x 1 tokens (a step of decoding), 4096 to 4096, E 8, r 64, sparse gates, k 2",
        {"gate": "sparse", "chosen": 2, "batch": 5, "length": 1, "channels": 4096, "experts": 8, "rank": 64},
        (FORWARD,),
    ),
    Headline(
        "multi_scale_attention",
        "EVA: 64 x 16 heads of 88, 257 queries and keys",
        {"batch": 64, "heads": 16, "queries": 257, "keys": 257, "head_dim": 88},
        elsewhere=(Source("multi_scale_attention", {"part": "EVA", "batch": 64}, BOTH),),
    ),
    Headline(
        "multi_scale_attention",
        "Q-Former: 64 x 12 heads of 64, 32 queries, 257 keys",
        {"batch": 64, "heads": 12, "queries": 32, "keys": 257, "head_dim": 64},
        elsewhere=(Source("multi_scale_attention", {"part": "Q-Former", "batch": 64}, BOTH),),
    ),
    Headline(
        "relative_bias_attention",
        "T5's encoder: 16 x 32 heads of 64, 417 queries and keys; no gradient of the table",
        {"stack": "encoder", "batch": 16, "heads": 32, "queries": 417, "keys": 417, "head_dim": 64},
        # Its backward also computes the table's gradient.
        elsewhere=(Source("relative_bias_attention", _ENCODER, (FORWARD,)),),
    ),
    Headline(
        "relative_bias_attention",
        "T5's decoder: 16 x 32 heads of 64, 1 query, 417 keys",
        {"stack": "decoder", "batch": 16, "heads": 32, "queries": 1, "keys": 417, "head_dim": 64},
        (FORWARD,),
    ),
    _rowwise("rms_norm", 2048, "16,384 x 2048"),
    Headline(
        "residual_layer_norm",
        "64 x 257 x 1408, dropout 0.1",
        {"images": 64, "tokens": 257, "channels": 1408, "dropout": 0.1},
    ),
    _rowwise("gated_gelu", 5120, "16,384 x 5120"),
    Headline(
        "assemble_inputs",
        "16 x (289 + 128) x 2048",
        {"batch": 16, "prefix": 289, "length": 128, "channels": 2048},
    ),
    _step(16),
    _step(64),
    _step(64, checkpointed=True),  # with 64 images, eager exceeds the memory of one GPU
    _generation(64, 5, 20),
    _generation(1, 5, 20),
    _generation(1, 1, 20),
)


def _on_a_cpu(operator: str, label: str, shape: Shape, directions: tuple[str, ...] = BOTH) -> Headline:
    return Headline(operator, label, shape, directions, suite=operator)


def _beside_the_original(part: str) -> Headline:
    return Headline(part, "against the original's eager form", {"part": part}, ("",), "original")


# On a CPU: the shapes of the operators' own suites for which all peers are measured, including torch.compile, and the
# parts of the model that are compared with the original.
CPU_HEADLINES: tuple[Headline, ...] = (
    _on_a_cpu("mixture_of_adapters", f"320 tokens, {_XL_WORDS}", {**_XL, "tokens": 320}),
    _on_a_cpu("mixture_of_adapters", f"1,280 tokens, {_XL_WORDS}", {**_XL, "tokens": 1280}, ("forward+backward",)),
    _on_a_cpu(
        "mixture_of_adapters",
        f"5 x 1 tokens (a step of decoding), {_XL_WORDS}",
        {**_XL, "tokens": 5},
        (FORWARD,),
    ),
    _on_a_cpu(
        "mixture_of_lora_linear",
        "320 tokens, 2048 to 2048, E 8, r 8, dense gates",
        {"routing": "soft", "channels": 2048, "experts": 8, "rank": 8, "tokens": 320},
    ),
    _on_a_cpu("multi_scale_attention", "EVA: 16 heads of 88, 257 queries and keys", {"part": "EVA", "batch": 1}),
    _on_a_cpu(
        "multi_scale_attention",
        "Q-Former: 4 x 12 heads of 64, 32 queries, 257 keys",
        {"part": "Q-Former", "batch": 4},
    ),
    _on_a_cpu(
        "relative_bias_attention",
        "T5's encoder: 32 heads of 64, 417 queries and keys",
        {"stack": "encoder", "batch": 1, "queries": 417, "keys": 417},
    ),
    _on_a_cpu(
        "relative_bias_attention",
        "T5's decoder: 5 x 32 heads of 64, 1 query, 64 keys",
        {"stack": "decoder", "batch": 5, "queries": 1, "keys": 64},
        (FORWARD,),
    ),
    _on_a_cpu("rms_norm", "320 x 2048", {"tokens": 320, "channels": 2048}),
    _on_a_cpu("residual_layer_norm", "4 x 257 x 1408", {"images": 4, "channels": 1408}),
    _on_a_cpu("gated_gelu", "320 x 5120", {"channels": 5120, "tokens": 320}),
    _on_a_cpu("assemble_inputs", "4 x (289 + 64) x 2048", {"batch": 4, "channels": 2048}),
    _beside_the_original("aggregator"),
    _beside_the_original("RAM tagging"),
    _beside_the_original("training step"),
    _step(4, size="a small model"),
    _step(4, checkpointed=True, size="a small model"),
    _generation(4, 5, 4, size="a small model"),
    _generation(1, 1, 4, size="a small model"),
)
