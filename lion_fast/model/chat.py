"""Conversations as transformers' chat templates take them, and LION's template."""

from collections.abc import Mapping, Sequence
from typing import Any

from lion_fast.io.image_sources import base64_content
from lion_fast.io.reading import shown

# LION's prompts are plain text. The image has no token in it: the model puts the visual tokens before the text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if not loop.first -%}{{ "\\n" }}{%- endif -%}
  {%- if message.content is string -%}{{ message.content }}
  {%- else -%}{{ message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join("\\n") }}
  {%- endif -%}
{%- endfor -%}"""


def expect_conversations(conversation: Any, texts_and_images: bool) -> bool:
    """Check a conversation, or several, and return whether it is several.

    Args:
        conversation: what a caller passes as one.
        texts_and_images: whether all content has to be text and images, which LION's template takes; it would drop
            anything else. Videos and sounds are named by the processor's call.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise TypeError(f"conversation: expected a list of messages, got {shown(conversation)}")
    several = isinstance(conversation[0], list | tuple)
    for place, messages in enumerate(conversation if several else [conversation]):
        name = f"conversation[{place}]" if several else "conversation"
        if not isinstance(messages, list | tuple) or not messages:
            raise TypeError(f"{name}: expected a list of messages, got {shown(messages)}")
        for number, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            fits = isinstance(content, str) or (
                isinstance(content, list | tuple)
                and all(isinstance(block, Mapping) and isinstance(block.get("type"), str) for block in content)
            )
            if not fits or not isinstance(message.get("role"), str):
                raise TypeError(
                    f"{name}[{number}]: expected a dict of 'role' and 'content', text or a list of dicts with 'type', "
                    f"got {shown(message)}"
                )
            if texts_and_images and isinstance(content, list | tuple):
                _expect_texts_and_images(f"{name}[{number}].content", content)
    return several


def _expect_texts_and_images(name: str, content: Sequence[Mapping[str, Any]]) -> None:
    for place, block in enumerate(content):
        if block["type"] not in ("text", "image", "image_url", "video", "audio"):
            raise ValueError(f"{name}[{place}].type: expected 'text' or 'image', got {shown(block['type'])}")
        if block["type"] == "text" and not isinstance(block.get("text"), str):
            raise TypeError(f"{name}[{place}]: expected a key 'text' with a string, got {shown(block)}")


def with_content(conversations: Sequence[Any]) -> list[Any]:
    """Return conversations in which an image given as `{"type": "image", "base64": ...}` is decoded."""
    return [[_message_with_content(message, number) for number, message in enumerate(c)] for c in conversations]


def _message_with_content(message: Any, number: int) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return message
    blocks = []
    for block in content:
        if isinstance(block, Mapping) and block.get("type") == "image" and isinstance(block.get("base64"), str):
            encoded = block["base64"].removeprefix("data:").rpartition(",")[2]
            block = {"type": "image", "image": base64_content(encoded, f"conversation[{number}]")}
        blocks.append(block)
    return {**message, "content": blocks}


class ChatMixin:
    """Chats for `LionProcessor`."""

    is_encoder_decoder: bool
    chat_template: Any

    def apply_chat_template(self, conversation: Sequence[Any], chat_template: str | None = None, **kwargs: Any) -> Any:
        """Turn a conversation, or several, into a prompt, or with `tokenize=True` into the model's inputs.

        LION's prompts are plain text, so the default template joins the texts of all messages by line breaks. The
        published models were trained on single questions: a conversation of several turns is read as one long question.

        Args:
            conversation: messages, each a dict of `role` and `content`, as transformers' chat templates take them, with
                one image in all; or a list of such conversations.
            chat_template: another template, in Jinja.
            kwargs: as for `ProcessorMixin.apply_chat_template`; `tags`, `task`, `text_target` and `allow_urls` go to
                the processor's call, as `processor_kwargs` do.

        Raises:
            ValueError, TypeError: as for the processor's call; a message is not a dict of role and content, or an
                encoder-decoder is to continue an answer.
        """
        several = expect_conversations(conversation, texts_and_images=(chat_template or self.chat_template) is None)
        conversations = with_content(conversation if several else [conversation])
        last = conversations[0][-1]["role"]
        if self.is_encoder_decoder and (kwargs.get("continue_final_message") or last == "assistant"):
            raise ValueError(
                "conversation: expected a question last, because an encoder-decoder cannot continue an answer, got "
                f"a message of role {last!r}"
            )
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError(
                "return_assistant_tokens_mask: expected False, because LION's answers are labels and no part of the "
                "prompt; pass them as text_target"
            )
        own = {name: kwargs.pop(name) for name in ("tags", "task", "text_target", "allow_urls") if name in kwargs}
        kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **own}
        return super().apply_chat_template(  # type: ignore[misc]
            conversations if several else conversations[0],
            chat_template or self.chat_template or CHAT_TEMPLATE,
            **kwargs,
        )
