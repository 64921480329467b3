"""A chat as the text that a model was trained on: the tokenizer's chat template on its messages.

Messages are `{"role": "user", "content": "..."}`, or as ShareGPT has them, `{"from": "human", "value": "..."}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from jinja2 import TemplateError

from mxcompile.errors import InputError

_ROLES: Final = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def is_chat(item: object) -> bool:
    """Whether an item is a list of messages."""
    if not isinstance(item, Sequence) or isinstance(item, str) or not item:
        return False
    return all(
        isinstance(message, Mapping)
        and any(keys <= message.keys() for keys in ({"role", "content"}, {"from", "value"}))
        for message in cast(Sequence[object], item)
    )


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Any, place: str) -> str:
    """The text of a chat by the tokenizer's template; raises InputError if it has none, or refuses the messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{place} is a chat, and the tokenizer has no chat template: use the model's own tokenizer, set its "
            "chat_template, or calibrate on texts"
        )
    try:
        return tokenizer.apply_chat_template(list(map(_message, messages)), tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise InputError(f"{place}: the tokenizer's chat template refuses the chat: {error}") from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if "role" in message:
        return dict(message)
    return {"role": _ROLES.get(str(message["from"]), message["from"]), "content": message["value"]}
