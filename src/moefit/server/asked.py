"""What may be asked for: the bodies of requests, strictly.

Owns which parameters there are. One that is not done here is refused, unless it has the value that
clients send when they want nothing of it: those are `None`, `False` or one word below. Also that a
body of nothing but mistakes gives few errors: one would take a kilobyte for each of a million.
Knows nothing of how a request is carried out.
"""

from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

T = TypeVar("T")
_TOLD = 8  # unknown fields of one object

Items = Annotated[list[T], Field(fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
NothingHere = Annotated[Items[str], Field(max_length=0)]
Empty = Annotated[dict[str, Any], Field(max_length=0)]


class Strict(BaseModel):
    """An unknown field is an error, and so is a number in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, given: Any) -> Any:
        """The same without all but a few of its unknown fields."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        known = {name: given[name] for name in cls.model_fields if name in given}
        unknown = (name for name in given if name not in cls.model_fields)
        return known | {name: given[name] for name in islice(unknown, _TOLD)}


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(Strict):
    """What completions and chats have in common.

    `top_k`, `stop_token_ids` and `ignore_eos` are no parameters of OpenAI's.
    """

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    n: int | None = Field(default=None, ge=1, le=1024)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[Items[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[Items[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    logit_bias: Empty | None = None


class CompletionAsked(Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[Items[str], Field(min_length=1)]
        | Annotated[Items[TokenId], Field(min_length=1)]
        | Annotated[Items[Annotated[Items[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=1024)
    suffix: None = None


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    """A piece of an assistant's message that says no."""

    type: Literal["refusal"]
    refusal: str


def _kind_of_content(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


def _kind_of_part(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "refusal" if kind == "refusal" else "text"


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")],
    Discriminator(_kind_of_part),
]
Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Annotated[Items[Part], Field(min_length=1)], Tag("parts")],
    Discriminator(_kind_of_content),
]


class Message(Strict):
    """One turn of a conversation. What clients give back of an earlier answer may be in it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    provider_specific_fields: Any = None
    annotations: NothingHere | None = None
    audio: None = None
    tool_calls: NothingHere | None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing_content", "content is missing: give a text")
        return self

    @property
    def texts(self) -> list[str]:
        """The texts of the content's parts."""
        if self.content is None:
            return [self.refusal or ""]
        if isinstance(self.content, str):
            return [self.content]
        return [p.text if isinstance(p, TextPart) else p.refusal for p in self.content]

    @property
    def thoughts(self) -> str | None:
        """What the assistant thought before it answered."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content


class TextFormat(Strict):
    """The one format of answers there is."""

    type: Literal["text"]


class ChatAsked(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[Items[Message], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: NothingHere | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NothingHere | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[Items[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: Empty | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeAsked(Strict):
    """POST /tokenize: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeAsked(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[Items[TokenId], Field(max_length=131072)]


class MemoryAsked(Strict):
    """POST /v1/memory; what is not given stays. bytes None: all that the model takes."""

    bytes: Annotated[int, Field(ge=1)] | Annotated[str, Field(max_length=64)] | None = None
    mode: Literal["exact", "bounded", "virtual"] | None = None
    prefill: Literal["exact", "bounded", "virtual"] | None = None
    bound: float | None = Field(default=None, ge=0, le=1)
