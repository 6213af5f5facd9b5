"""Request and response bodies of the HTTP API, in OpenAI's format.

Request models are strict: an unknown parameter is an error, and a known but unsupported one is
rejected by name. Response models contain every field that OpenAI's clients read.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moefit.engine.sampler import MAX_BIAS, REPETITION
from moefit.server.schema.base import (
    Items,
    ReasoningEffort,
    StrictModel,
    TokenId,
    Unsupported,
)
from moefit.server.schema.structured import ResponseFormat, StructuredOutputs
from moefit.server.schema.tools import ToolCalls, ToolChoice, Tools

Stop = Annotated[str, Field(min_length=1, max_length=256)]


def _biases(given: Any) -> Any:
    """Reject the first invalid bias; an error for each would take too much memory."""
    if not isinstance(given, dict):
        return given  # rejected by the type
    for token, bias in given.items():
        name = str(token)[:40]
        if not (name.isascii() and name.isdigit() and int(name) < 2**31):
            raise PydanticCustomError("token", "'{name}' is not a token id", {"name": name})
        if type(bias) not in (int, float) or not abs(bias) <= MAX_BIAS:  # also rejects NaN
            raise PydanticCustomError(
                "bias",
                "the bias of token {name} must be a number from {low} to {high}",
                {"name": name, "low": f"{-MAX_BIAS:g}", "high": f"{MAX_BIAS:g}"},
            )
    return given


Biases = Annotated[dict[str, float], BeforeValidator(_biases)]
"""Values added to logits, by token id."""


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(StrictModel):
    """Parameters common to completions and chat completions.

    `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos`, `cache_salt`,
    `structured_outputs` and the older `guided_json`, `guided_regex`, `guided_choice` and
    `guided_grammar` are vLLM's. `store`, `metadata`, `service_tier` and `user` are accepted and
    have no effect.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {
        "min_tokens": 0, "length_penalty": 1, "use_beam_search": False, "early_stopping": False,
        "typical_p": 1, "no_repeat_ngram_size": 0, "skip_special_tokens": True,
        "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "priority": 0,
        "repeat_penalty": 1, "tfs_z": 1, "mirostat": 0,
    }  # fmt: skip

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=REPETITION[0], le=REPETITION[1])
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
    logit_bias: Biases | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[Items[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    NEUTRAL: ClassVar[Mapping[str, Any]] = {**GenerationRequest.NEUTRAL, "add_special_tokens": True}

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
    suffix: Annotated[str, Field(max_length=0)] | None = None


class TextPart(StrictModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(StrictModel):
    """A refusal in an assistant's message."""

    type: Literal["refusal"]
    refusal: str


def _kind_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    return "<refusal>" if kind == "refusal" else "<text>"


def _no_media(part: Any) -> Any:
    """Reject media that the model cannot read, naming the type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _MEDIA:
        raise PydanticCustomError(
            "media",
            "parts of type {kind} ({what}) are not supported by this text model; use "
            "parts of type text",
            {"kind": kind, "what": _MEDIA[kind]},
        )
    return part


def _kind_of_content(content: Any) -> str:
    return "<parts>" if isinstance(content, list) else "<text>"


_MEDIA = {
    "image_url": "an image", "input_image": "an image", "image": "an image",
    "input_audio": "a sound", "audio_url": "a sound", "audio": "a sound",
    "video_url": "a video", "video": "a video", "file": "a file", "input_file": "a file",
}  # fmt: skip
Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(_kind_of_part),
    BeforeValidator(_no_media),
]
Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Annotated[Items[Part], Field(min_length=1)], Tag("<parts>")],
    Discriminator(_kind_of_content),
]


class Message(StrictModel):
    """A message of a conversation. Fields of earlier responses may be sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    type: Literal["text", "message"] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    provider_specific_fields: Any = None
    parsed: Any = None  # added to answers by OpenAI's client
    annotations: Unsupported | None = None
    audio: None = None
    tool_calls: ToolCalls | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    function_call: None = None

    @model_validator(mode="after")
    def _fits_the_role(self) -> "Message":
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                why = f"only messages of the role {role} have {name}"
                raise PydanticCustomError("role", "{why}", {"why": why, "within": (name,)})
        if self.role == "tool" and not self.tool_call_id:
            why = "Field required: the id of the call that this answers"
            raise PydanticCustomError("missing", "{why}", {"why": why, "within": ("tool_call_id",)})
        return self

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and self.role != "assistant":
            why = "Field required: what the {role} says"
            context = {"role": self.role, "within": ("content",)}
            raise PydanticCustomError("missing", why, context)
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
        """The assistant's reasoning before its answer."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    NEUTRAL: ClassVar[Mapping[str, Any]] = {
        **GenerationRequest.NEUTRAL, "echo": False, "best_of": 1, "suffix": "",
        "add_generation_prompt": True, "continue_final_message": False,
        "add_special_tokens": False,
    }  # fmt: skip

    messages: Annotated[Items[Message], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Unsupported | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[Items[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: ReasoningEffort | None = None
    verbosity: None = None
    web_search_options: None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(StrictModel):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    tools: Tools | None = None
    prompt: str | None = None
    messages: Annotated[Items[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(StrictModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[Items[TokenId], Field(max_length=131072)]


class MemoryRequest(StrictModel):
    """POST /v1/memory; missing fields stay unchanged. bytes null: as much as the model needs.

    bytes "auto": follow free memory.
    """

    bytes: Annotated[int, Field(ge=1)] | Annotated[str, Field(max_length=64)] | None = None
    mode: Literal["exact", "bounded", "virtual"] | None = None
    prefill: Literal["exact", "bounded", "virtual"] | None = None
    bound: float | None = Field(default=None, ge=0, le=1)


Finish = Literal["stop", "length", "tool_calls"]
MIN_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON lacks, as in OpenAI's API and vLLM."""
LogProbability = Annotated[float, AfterValidator(lambda value: max(value, MIN_LOGPROB))]


class PromptTokensDetails(BaseModel):
    """How many of the prompt's tokens had keys and values of earlier requests."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts of a request; a prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Logprobs(BaseModel):
    """Log-probabilities of a completion, by token; null for the prompt's first token."""

    tokens: list[str]
    token_logprobs: list[LogProbability | None]
    top_logprobs: list[dict[str, LogProbability] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A completion, or a chunk of one."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Finish | None


class CompletionResponse(BaseModel):
    """Completions, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token with its log-probability."""

    token: str
    logprob: LogProbability
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of a chat completion."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat completion, by token."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatFunction(BaseModel):
    """A function with arguments as the text of a JSON object; in a stream, with more of it."""

    name: str | None = Field(default=None, exclude_if=lambda name: name is None)
    arguments: str


class ChatToolCall(BaseModel):
    """A call of a tool; in a stream, the beginning of one or more of its arguments."""

    index: int | None = Field(default=None, exclude_if=lambda index: index is None)
    id: str | None = Field(default=None, exclude_if=lambda id: id is None)
    type: Literal["function"] | None = Field(default=None, exclude_if=lambda kind: kind is None)
    function: ChatFunction


class ChatMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(default=None, exclude_if=lambda text: text is None)
    tool_calls: list[ChatToolCall] | None = Field(default=None, exclude_if=lambda some: not some)


class ChatChoice(BaseModel):
    """A chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletionResponse(BaseModel):
    """Chat completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """New content of a message."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=lambda role: role is None)
    content: str | None = Field(default=None, exclude_if=lambda content: content is None)
    reasoning_content: str | None = Field(default=None, exclude_if=lambda text: text is None)
    tool_calls: list[ChatToolCall] | None = Field(default=None, exclude_if=lambda some: not some)


class DeltaChoice(BaseModel):
    """A chunk of a chat completion."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatCompletionChunk(BaseModel):
    """A chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[DeltaChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """The served model; `max_model_len` and `chat` are additions to OpenAI's fields."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moefit"] = "moefit"
    max_model_len: int
    chat: bool


class ModelList(BaseModel):
    """List of served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """Tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(BaseModel):
    """Text of tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Tokenizer properties, as lm-evaluation-harness and vLLM's clients request them."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class HealthResponse(BaseModel):
    """Status of the server; problems if it is degraded."""

    status: Literal["ok", "degraded"] = "ok"
    problems: list[str] | None = None


class VersionResponse(BaseModel):
    """Version of moefit."""

    version: str
