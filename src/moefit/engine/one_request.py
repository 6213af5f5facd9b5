"""Answer a single request with an engine of its own, in the calling thread's time."""

from collections.abc import Callable, Sequence
from queue import SimpleQueue

from moefit.engine.api import EngineSettings, Event, FinishedEvent, SamplingParams, TokenEvent
from moefit.engine.engine import Engine
from moefit.engine.speculation.drafts import SpeculateSetting
from moefit.errors import MoefitError
from moefit.serve.model import ServedModel


def answer(
    served: ServedModel,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    speculate: SpeculateSetting = "off",
    show: Callable[[str], object] = lambda text: None,
    remark: Callable[[str], object] = lambda line: None,
) -> list[int]:
    """Generate a completion.

    Args:
        served: Loaded model.
        prompt_ids: Token ids of the prompt.
        sampling: Sampling parameters.
        speculate: As in `EngineSettings`.
        show: Called in this thread with each piece of text; what it raises ends the request.
        remark: Called with the reason if nothing is drafted although `speculate` asks for it.

    Returns:
        The generated tokens.

    Raises:
        RequestTooLargeError: Prompt and completion exceed what model or KV cache hold.
        MoefitError: The request failed.
    """
    events: SimpleQueue[Event] = SimpleQueue()
    tokens: list[int] = []
    settings = EngineSettings(
        max_concurrency=1, max_waiting=1, prefix_cache="off", speculate=speculate
    )
    engine = Engine(served, settings)
    coverage = engine.speculation_coverage
    try:
        if speculate != "off" and not coverage.active:
            remark(f"note: {coverage.describe()}")
        engine.submit(prompt_ids, sampling, events.put)
        engine.start()
        while True:
            event = events.get()
            if isinstance(event, TokenEvent):
                tokens.append(event.token)
                show(event.text)
            elif isinstance(event, FinishedEvent):
                show(event.text)
                if event.reason == "error":
                    raise MoefitError(event.message)
                return tokens
    finally:
        engine.close()
