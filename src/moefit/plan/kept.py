"""A served model that is kept from one measurement to the next.

Owns when it can be changed and when it must be loaded anew. Knows nothing of what is measured.
"""

from moefit.plan.configuration import Configuration
from moefit.plan.running import Subject
from moefit.serve.served import ServedModel


class Kept:
    """One exactly served model, kept from one configuration to the next.

    Where only placements differ, what they have in common is then read once: of a model that fills
    a machine, reading takes as long as measuring.
    """

    def __init__(self, subject: Subject, *, context: int):
        self._subject, self._context = subject, context
        self._served: ServedModel | None = None
        self._rest = ""

    def served(self, configuration: Configuration) -> ServedModel:
        """The model, so served until the next is asked for. Raises what `Subject.load` does."""
        assert configuration.mode == "exact", configuration.mode
        if self._served is not None and self._rest == configuration.rest:
            try:
                self._served.set_placement(
                    configuration.placement, memory=None, **configuration.policy_settings()
                )
            except BaseException:
                self.close()
                raise
            return self._served
        self.close()
        self._served = self._subject.load(configuration, context=self._context)
        self._rest = configuration.rest
        return self._served

    def close(self) -> None:
        """Give its memory back."""
        if self._served is not None:
            self._served.close()
            self._served = None
