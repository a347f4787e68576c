# SPDX-License-Identifier: Apache-2.0
"""Fields that this server has no use for, and the values with which they ask for nothing.

Clients send whole forms, and what they received, back. A null, or a value that stands for "not
wanted", is taken; any other value asks for what the server does not do and is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _null_is_allowed_everywhere(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = {"type": "null"}


# Strict: "logprobs": false must not become 0, which asks for them.
STRICT = ConfigDict(
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    json_schema_extra=_null_is_allowed_everywhere,
)


class Form(BaseModel):
    """A JSON object of a request; a field that is null is a field that is not there."""

    model_config = STRICT

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return {name: value for name, value in given.items() if value is not None}
        return given


def only(*values: Any) -> Any:
    """The type of a field that may be null or one of these values."""

    def check(value: Any) -> Any:
        # JSON tells false from 0, Python does not.
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            return value
        raise PydanticCustomError("unsupported", "this server does not support it; leave it out")

    schema = WithJsonSchema({"enum": [None, *values]})
    return Annotated[Any, AfterValidator(check), schema]


# Of OpenAI's API, then of vLLM's and FastDeploy's requests.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # there are no tools to choose from
    "tools": ([],),
    "verbosity": ("medium",),  # OpenAI's default
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "bad_words_token_ids": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_json_object": (False,),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True, False),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}

Neutral = create_model(
    "Neutral", __base__=Form, **{name: (only(*values), None) for name, values in _NEUTRAL.items()}
)
