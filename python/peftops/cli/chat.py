"""Conversations as token ids: the tokenizer's chat template, and which of the tokens an assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable

from .errors import InputError
from .model import first_line


def check_template(tokenizer, name: str) -> None:
    """Raise InputError if the tokenizer of the model `name` has no chat template."""
    if not tokenizer.chat_template:
        raise InputError(f"--model {name}: its tokenizer has no chat template, which rows with 'messages' need")


def encode(tokenizer, messages: list[dict], where: str, **how):
    """The conversation as token ids, as the tokenizer's chat template renders it; `how` goes to the template.

    Raises:
        InputError: the template refuses the messages; the line begins with `where`.
    """
    return _refusing(lambda: tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how), where)


def encode_completions(tokenizer, messages: list[dict], where: str) -> tuple[list[int], list[bool]]:
    """Like `encode`, and for each token whether the assistant wrote it (what follows its header, the end included).

    By the template's generation tags; without them a turn is what rendering it adds to the prompt that inference would
    use, which needs a template that renders a conversation's beginning the same whatever follows.

    Raises:
        InputError: as `encode`; no assistant's message; a template that gives no such beginning.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no message of an assistant, and --completion-only learns nothing else")
    if tokenizer.is_fast and re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        return _tagged(tokenizer, messages, where)
    ids = encode(tokenizer, messages, where)
    trained = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode(tokenizer, messages[:turn], where, add_generation_prompt=True) if turn else []
        whole = encode(tokenizer, messages[: turn + 1], where)
        if ids[: len(prompt)] != prompt or ids[: len(whole)] != whole:
            raise InputError(
                f"{where}: --completion-only: the chat template renders message {turn + 1} differently when others "
                "follow, and it has no generation tags"
            )
        trained[len(prompt) : len(whole)] = [True] * (len(whole) - len(prompt))
    return ids, trained


def _tagged(tokenizer, messages: list[dict], where: str) -> tuple[list[int], list[bool]]:
    """Tokens, and whether a generation tag encloses any of their characters.

    Not by `return_assistant_tokens_mask`: where a tag's last character belongs to no token, such as a blank,
    transformers 4.57 marks all tokens to the end of the conversation.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    def render() -> tuple[str, list[tuple[int, int]]]:
        template = tokenizer.get_chat_template()
        texts, spans = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
        return texts[0], spans[0]

    text, spans = _refusing(render, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    marked = [any(max(begin, a) < min(end, b) for a, b in spans) for begin, end in offsets]
    return encoded["input_ids"], marked


def _refusing(render: Callable, where: str):
    try:
        return render()
    except Exception as error:  # templates raise what they like
        raise InputError(f"{where}: the chat template refuses the messages ({first_line(error)})") from None
