"""The tokens of a request, for `usage`."""

from moefit.engine.request import Finished
from moefit.server.answered import Usage


class Tally:
    """Counts as answers end; of the `n` to a prompt, the prompt's tokens count once."""

    def __init__(self, n: int):
        self._n, self._prompt, self._made = n, 0, 0

    def add(self, number: int, event: Finished) -> None:
        """Answer `number` has ended."""
        self._made += event.completion_tokens
        if number % self._n == 0:
            self._prompt += event.prompt_tokens

    def usage(self) -> Usage:
        """All that have ended."""
        total = self._prompt + self._made
        return Usage(prompt_tokens=self._prompt, completion_tokens=self._made, total_tokens=total)
