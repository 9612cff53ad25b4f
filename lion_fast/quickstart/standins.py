"""Stand-ins for EVA and Flan-T5: a small vision tower and a small language model, trained from scratch on scenes.

The vision tower learns to classify the content of every patch of an image. The language model learns, from text alone,
to talk about scenes described by one input token per object, the sum of the embeddings of the object's words. Both are
then frozen, and LION learns the connection between them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lion_fast.model.vision import LionVisionModel
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.quickstart.data import SceneSet, encode, pick, scenes_by_turns
from lion_fast.quickstart.loop import Run, train
from lion_fast.quickstart.muon import build_optimizers
from lion_fast.quickstart.vocabulary import coordinate_tokens
from lion_fast.scenes import BACKGROUNDS, COLORS, SHAPES, SIGN, SIZES, WORDS, Sample, Scene

_TRAITS = {  # name: values; "" means none
    "kind": (*BACKGROUNDS, *SHAPES, SIGN),
    "color": ("", *COLORS),
    "size": ("", *SIZES),
    "text": ("", *WORDS),
    "place": ("", 1, 2, 3),  # counted from the left
}
_EDGE_PERIODS = (2.0, 1.0, 0.5, 0.25)  # periods of the waves that encode an edge's position, in image sides
_OWN_SHARE = 0.12  # fraction of a patch's pixels above which the patch belongs to an object
_LANGUAGE_KINDS = ("caption", "rec", "vqa", "rec")
_LOOKUPS = ("What color", "What shape", "How large", "What does")  # beginnings of questions about a single object
_NUM_FACTS = (4, 8, 26)  # numbers of tokens per scene; the stages use 16 and 26 visual tokens
_FACT_NOISE = (0.3, 1.2)  # standard deviation, drawn per scene; a fact's root mean square is 1
_FACT_SCALE = (1.0, 5.0)


def train_vision(
    model: LionVisionModel, scene_set: SceneSet, *, steps: int, batch_size: int, rng: np.random.Generator
) -> Run:
    """Train the vision tower to predict the traits of each patch's object and the positions of the object's edges."""
    _init_vision(model, scene_set.pixel_values(range(min(256, len(scene_set)))))
    width = model.config.hidden_size
    sizes = [*(len(values) for values in _TRAITS.values()), 4 * 2 * len(_EDGE_PERIODS)]
    heads = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(sizes)))
    traits, edges = _patch_targets(scene_set.scenes, model.config.patch_size)
    last = model.config.num_hidden_layers - 1

    def losses() -> Iterator[Tensor]:
        while True:
            index = rng.integers(len(scene_set), size=batch_size)
            patches = model(scene_set.pixel_values(index), layers=[last])[:, 0, 1:]
            yield _patch_loss(heads(patches).split(sizes, dim=-1), traits[index], edges[index])

    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    optimizers = build_optimizers([model, heads], matrices, muon_lr=0.014, adamw_lr=1.5e-3, iterations=5)
    return train("vision stand-in", ("patches",), losses(), optimizers, steps)


def train_language(
    model: LionForCausalLM,
    processor: LionProcessor,
    scene_set: SceneSet,
    *,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> Run:
    """Train the language model, without its adapters, to caption, answer and locate from `Facts` about scenes."""
    language_model = model.language_model
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(".adapter." not in name)
    _init_language(language_model)
    facts = Facts(scene_set.scenes, language_model.get_input_embeddings(), processor.tokenizer)
    _init_coordinates(language_model, processor.tokenizer)

    def losses() -> Iterator[Tensor]:
        for scenes, samples in _language_samples(scene_set, batch_size, rng):
            batch = encode(processor, samples)
            told = facts.tell(scenes, int(rng.choice(_NUM_FACTS)), rng)
            yield told_loss(language_model, told, batch)

    matrices = [module.weight for name, module in linears(language_model) if ".adapter." not in name]
    optimizers = build_optimizers([language_model, facts], matrices, muon_lr=0.008, adamw_lr=9e-3)
    return train("language stand-in", _LANGUAGE_KINDS, losses(), optimizers, steps)


def told_loss(language_model: Any, told: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of answers about scenes whose facts precede the question.

    Args:
        told: facts [B, N, hidden size], from `Facts.tell`.
        batch: text inputs, from `encode`.
    """
    return language_model(
        inputs_embeds=torch.cat([told, language_model.get_input_embeddings()(batch["input_ids"])], dim=1),
        attention_mask=torch.cat([torch.ones(told.shape[:2], dtype=torch.long), batch["attention_mask"]], dim=1),
        labels=batch["labels"],
        task_ids=batch["task_ids"],
    ).loss


def _language_samples(
    scene_set: SceneSet, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, list[Sample]]]:
    """Yield indices of scenes and a sample of each, forever; questions about a single object have double weight."""
    for kind, scenes in scenes_by_turns(scene_set, _LANGUAGE_KINDS, batch_size, rng):
        samples = [scene_set.samples(i, kind) for i in scenes]
        if kind == "vqa":
            samples = [each + [q for q in each if q.text.startswith(_LOOKUPS)] for each in samples]
        yield scenes, [pick(each, rng) for each in samples]


class Facts(nn.Module):
    """Scenes as word embeddings: one token for the background and one per object, the sum of its words' embeddings.

    An object's words are its size, colour, kind and text, and "leftmost" or "rightmost". Its box is encoded by waves of
    the four edges (see `_waves`) in separate, learnt directions. The module is not used after the training.
    """

    def __init__(self, scenes: Sequence[Scene], embedding: nn.Embedding, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it is not a submodule: the language model owns it
        none = len(tokenizer)
        most = 1 + max(len(scene.objects) for scene in scenes)
        words = torch.full((len(scenes), most, 5), none)
        edges = torch.zeros(len(scenes), most, 4)
        for i, scene in enumerate(scenes):
            told = [(scene.background,), *(_words(scene, k) for k in range(len(scene.objects)))]
            for k, each in enumerate(told):
                words[i, k, : len(each)] = torch.tensor(tokenizer.convert_tokens_to_ids([f"▁{w}" for w in each]))
            edges[i, 1 : len(told)] = torch.tensor([o.box for o in scene.objects])
        self.words, self.is_word = words.where(words < none, 0), (words < none).unsqueeze(-1)
        self.waves = _waves(edges).flatten(2)
        self.waves[:, 0] = 0
        self.counts = torch.tensor([1 + len(scene.objects) for scene in scenes])
        width, size = embedding.embedding_dim, self.waves.shape[-1]
        self.directions = nn.Parameter(torch.linalg.qr(torch.randn(width, width)).Q[:size] * (width / size) ** 0.5)

    def tell(self, scenes: np.ndarray, length: int, rng: np.random.Generator) -> Tensor:
        """Return noisy facts in random order, float32 [B, length, width]: each one once, some again, mostly background.

        Visual tokens are similar: many of them describe the same object, in any order, inexactly, and with several
        times the norm of a word's embedding.
        """
        counts, most = self.counts[scenes].unsqueeze(1), self.words.shape[1]
        chosen = (torch.from_numpy(rng.random((len(scenes), length)) ** rng.uniform(1, 3)) * counts).long()
        chosen[:, :most] = torch.arange(most).minimum(counts - 1)
        chosen = chosen.gather(1, torch.from_numpy(rng.random(chosen.shape)).argsort(1))
        at = (torch.from_numpy(scenes).unsqueeze(1), chosen)
        told = (self._embedding[0](self.words[at]) * self.is_word[at]).sum(2) + self.waves[at] @ self.directions
        told = told / told.square().mean(-1).sqrt().mean().detach()
        noise, scale = (
            torch.from_numpy(rng.uniform(*limits, size=(len(scenes), 1, 1))).float()
            for limits in (_FACT_NOISE, _FACT_SCALE)
        )
        return scale * (told + noise * torch.randn_like(told))


def _words(scene: Scene, number: int) -> list[str]:
    """Return the words of one object."""
    o = scene.objects[number]
    position = "leftmost" if number == 0 else "rightmost" if number == len(scene.objects) - 1 else None
    return [word for word in (o.kind, o.color, o.size, o.text, position) if word]


def linears(language_model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield names and modules of the linear layers in a language model's blocks."""
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Linear) and ".block." in name:
            yield name, module


@torch.no_grad()
def _init_vision(model: Any, pixels: Tensor) -> None:
    """Initialise with whitened principal components of patches, sinusoidal positions, and attention to similar tokens.

    With LION's own initialisation, the same tower needs several times the steps.
    """
    width, patch = model.config.hidden_size, model.config.patch_size
    patches = F.unfold(pixels, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    mean, covariance = patches.mean(0), torch.cov(patches.T)
    variance, components = torch.linalg.eigh(covariance)
    scale = (variance[-width:] + 1e-4 * variance[-1]).rsqrt()
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    kernel = 0.5 * rotation @ (components[:, -width:] * scale).T
    model.patch_embed.proj.weight.copy_(kernel.view_as(model.patch_embed.proj.weight))
    model.patch_embed.proj.bias.copy_(-kernel @ mean)
    model.pos_embed[:, 1:].copy_(0.5 * _sinusoids(model.config.image_size // patch, width))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.7 * module.in_features**-0.5)
    for block in model.blocks:
        query, key, _ = block.attn.qkv.weight.chunk(3)
        key.copy_(query.mul_(1.5))


@torch.no_grad()
def _init_language(model: Any) -> None:
    """Initialise with attention to similar tokens, and output projections that copy the attended values.

    In the encoder, a bias keeps tokens from attending mostly to themselves. The decoder's first cross-attention is
    nearly uniform, so that the second block, which attends to similar tokens, prefers the question's object.
    """
    for name, module in linears(model):
        attention: Any = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".q"):
            rotation = torch.linalg.qr(torch.randn(module.in_features, module.in_features)).Q
            attention.k.weight.copy_(rotation)
            attention.q.weight.copy_(0.3 * rotation)
        elif name.endswith(".v"):
            rotation = torch.linalg.qr(torch.randn(module.in_features, module.in_features)).Q
            attention.v.weight.copy_(rotation)
            attention.o.weight.copy_(0.5 * rotation.T)
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight[0] = -5.0  # distance 0
    model.decoder.block[0].layer[1].EncDecAttention.q.weight.mul_(0.1)
    embeddings = model.get_input_embeddings().weight
    model.get_output_embeddings().weight.copy_(embeddings / math.sqrt(embeddings.shape[1]))


@torch.no_grad()
def _init_coordinates(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Initialise the embeddings of coordinate tokens with the waves that encode edges: close numbers become similar.

    With random embeddings, which make an edge a hundred unrelated classes, boxes are not learnt in the quickstart's
    time.
    """
    waves = _waves(torch.arange(101) / 100)  # [101, 2 * periods]
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    width, count = embeddings.shape[1], waves.shape[1]
    directions = torch.linalg.qr(torch.randn(width, width)).Q
    for number, before in enumerate(("▁[", ",")):
        ids = tokenizer.convert_tokens_to_ids(coordinate_tokens(before))
        head[ids] = waves @ directions[:count]
        sign = directions[count + number]  # distinguishes "[0.440" from ",0.440"
        embeddings[ids] = waves @ directions[:count] * (width / count) ** 0.5 + 0.5 * width**0.5 * sign


def _waves(edges: Tensor) -> Tensor:
    """Return sines and cosines of numbers between 0 and 1, [..., 2 * periods]."""
    angles = edges.unsqueeze(-1) * (2 * math.pi / torch.tensor(_EDGE_PERIODS))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _sinusoids(side: int, width: int) -> Tensor:
    """Return sines and cosines of the row, then of the column, [side * side, width]."""
    angles = torch.outer(torch.arange(side), 1.5 * 20 ** -(torch.arange(width // 4) / (width // 4)))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)


def _patch_targets(scenes: Sequence[Scene], patch: int) -> tuple[Tensor, Tensor]:
    """Return the traits of each patch, int64 [n, P, 5], and its object's edges as waves, float32 [n, P, 4 * 2 * 4]."""
    traits, edges = [], []
    side = scenes[0].mask.shape[0] // patch
    for scene in scenes:
        pixels = scene.mask.reshape(side, patch, side, patch).swapaxes(1, 2).reshape(side * side, -1)
        shares = np.stack([(pixels == k + 1).mean(1) for k in range(len(scene.objects))], axis=1)
        owner = np.where(shares.max(1) > _OWN_SHARE, shares.argmax(1) + 1, 0)
        rows = [[scene.background, "", "", "", ""]]
        rows += [[o.kind, o.color, o.size or "", o.text or "", number] for number, o in enumerate(scene.objects, 1)]
        numbers = [[values.index(v) for values, v in zip(_TRAITS.values(), row, strict=True)] for row in rows]
        traits.append(np.array(numbers)[owner])
        edges.append(np.array([(0.0,) * 4, *(o.box for o in scene.objects)])[owner])
    return torch.from_numpy(np.stack(traits)), _waves(torch.from_numpy(np.stack(edges)).float()).flatten(2)


def _patch_loss(outputs: Sequence[Tensor], traits: Tensor, edges: Tensor) -> Tensor:
    """Return the loss of edges plus the cross-entropy of traits, weighted: background 1, shapes 4, rare signs 12."""
    is_object, is_sign = (traits[..., 1] > 0).float(), (traits[..., 3] > 0).float()
    weight = 1 + 3 * is_object + 8 * is_sign
    weight = weight / weight.sum()
    loss = 16 * ((outputs[-1] - edges).square().mean(-1) * is_object).sum() / is_object.sum()
    for output, target in zip(outputs[:-1], traits.unbind(-1), strict=True):
        loss = loss + (F.cross_entropy(output.movedim(-1, 1), target, reduction="none") * weight).sum()
    return loss
