"""From questions and tags to the tokens of the language model and of the Q-Former."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from lion_fast.io.reading import shown
from lion_fast.model.padding import IGNORED
from lion_fast.model.processor_arguments import Settings


class TokenizingMixin:
    """The prompts of `LionProcessor` and their tokens."""

    tokenizer: Any
    qformer_tokenizer: PreTrainedTokenizerBase
    tag_sentence: str
    soft_prompt_token: str | None
    soft_prompt_token_id: int | None
    max_txt_len: int

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Decode sequences of token ids, [B, L], as the tokenizer does, without the -100 that pads labels."""
        return self.tokenizer.batch_decode(_without_ignored(sequences), *args, **kwargs)

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Decode token ids, [L], as the tokenizer does, without the -100 that pads labels."""
        return self.tokenizer.decode(_without_ignored(token_ids), *args, **kwargs)

    def _prompt(self, question: str, tags: str, index: int) -> str:
        if not question.strip():
            raise ValueError(f"text[{index}]: expected a question or an instruction, got {shown(question)}")
        for name, value in (("text", question), ("tags", tags)):
            if self.soft_prompt_token is not None and self.soft_prompt_token in value:
                raise ValueError(
                    f"{name}[{index}]: expected text without {self.soft_prompt_token!r}, the token of the soft prompt, "
                    f"got {shown(value)}"
                )
        if not tags:
            return question
        if self.soft_prompt_token_id is None:
            raise ValueError(
                f"tags[{index}]: expected none, as the tokenizer has no token for the soft prompt "
                f"(soft_prompt_token={self.soft_prompt_token!r}), got {shown(tags)}"
            )
        return self.tag_sentence.format(soft_prompt=self.soft_prompt_token, tags=tags) + question

    def _tokens(self, prompts: list[str], questions: list[str], settings: Settings, truncation: bool) -> dict[str, Any]:
        """Return the tokens of prompts and questions; `truncation` is the rule for prompts without a setting."""
        if settings.truncation is not None:
            truncation = settings.truncation
        elif settings.max_length is not None:
            truncation = True
        max_length = settings.max_length or self.max_txt_len
        lengths = {"max_length": max_length} if truncation or settings.padding == "max_length" else {}
        prompt = self.tokenizer(
            prompts,
            padding=settings.padding,
            truncation=truncation,
            return_attention_mask=True,  # whatever the tokenizer's settings
            **lengths,
            **settings.tokenizer,
        )
        question = self.qformer_tokenizer(
            questions,
            padding=settings.padding,
            truncation=True,
            max_length=min(max_length, self.max_txt_len),
            return_attention_mask=True,
            pad_to_multiple_of=settings.tokenizer.get("pad_to_multiple_of"),
        )
        return {
            "input_ids": prompt["input_ids"],
            "attention_mask": prompt["attention_mask"],
            "qformer_input_ids": question["input_ids"],
            "qformer_attention_mask": question["attention_mask"],
        }


def token_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int | None:
    """Return the token's id, or None if the tokenizer does not map it to one token."""
    if token is None:
        return None
    ids = tokenizer(token, add_special_tokens=False).input_ids
    return next((i for i in ids if tokenizer.convert_ids_to_tokens(i) == token), None)


def _without_ignored(ids: Any) -> Any:
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, list | tuple):
        return ids
    return [_without_ignored(entry) for entry in ids if not (isinstance(entry, int) and entry == IGNORED)]
