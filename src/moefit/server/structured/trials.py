"""Try and compile new grammars one after another, on a thread of their own.

Clients decide how long that takes, so the threads that render and tokenize requests must not wait
for it.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from moefit.engine.structured.grammar import GrammarCompiler, UntriedError
from moefit.errors import QueueFullError

MAX_WAITING = 16


class GrammarTrials:
    """A bounded queue of new grammars. Use it on one event loop.

    Args:
        grammars: Compiles them.
        limit: How many may wait; requests for the same one wait together.
    """

    def __init__(self, grammars: GrammarCompiler, limit: int = MAX_WAITING):
        self._grammars, self._limit = grammars, limit
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moefit-grammar")

    async def prepare(self, untried: UntriedError) -> None:
        """Return when a grammar has been tried, and compiled if nothing is wrong with it.

        Raises:
            QueueFullError: If too many wait.
            ConfigError: If the library is not installed.
        """
        text = untried.grammar
        if text not in self._waiting:
            if len(self._waiting) >= self._limit:
                raise QueueFullError(
                    f"{self._limit} new schemas or grammars of other requests are waiting to be "
                    "tried; try again in a few seconds"
                )
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._thread, self._grammars.prepare, text, untried.parts)
            self._waiting[text] = work
            work.add_done_callback(lambda _: self._waiting.pop(text, None))
        await asyncio.shield(self._waiting[text])  # a client that leaves does not stop the others

    def close(self, *, wait: bool) -> None:
        """Stop the thread.

        Args:
            wait: Return only after a running trial has ended.
        """
        self._thread.shutdown(wait=wait, cancel_futures=True)
