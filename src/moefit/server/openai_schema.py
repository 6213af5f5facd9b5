"""What is answered: the bodies of responses, as OpenAI has them.

Owns their fields and the order of these. Knows nothing of how they come about.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

Finish = Literal["stop", "length"]
IMPOSSIBLE = -9999.0
"""The log-probability of what cannot be, as OpenAI and vLLM write it: JSON has no infinity."""
LogProbability = Annotated[float, AfterValidator(lambda value: max(value, IMPOSSIBLE))]


class Usage(BaseModel):
    """Tokens of a request; a prompt counts once, whatever n."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    """Of a completion, token by token; the prompt's first token has none."""

    tokens: list[str]
    token_logprobs: list[LogProbability | None]
    top_logprobs: list[dict[str, LogProbability] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or a piece of one."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Finish | None


class Completion(BaseModel):
    """A completion, whole, or a piece of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that might have been."""

    token: str
    logprob: LogProbability
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of a chat answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a chat answer, token by token."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The answer to a conversation."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Chat(BaseModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=lambda role: role is None)
    content: str | None = Field(default=None, exclude_if=lambda content: content is None)


class DeltaChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(BaseModel):
    """A piece of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[DeltaChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served; `max_model_len` and `chat` are no fields of OpenAI's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moefit"] = "moefit"
    max_model_len: int
    chat: bool


class ModelList(BaseModel):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    """A text's tokens."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    """Tokens' text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Of the tokenizer, as lm-evaluation-harness and vLLM's clients ask for it."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class Health(BaseModel):
    """That requests are taken; problems: what is wrong, if it is degraded."""

    status: Literal["ok", "degraded"] = "ok"
    problems: list[str] | None = None


class Version(BaseModel):
    """Of this program."""

    version: str
