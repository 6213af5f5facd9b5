import os
import signal

import pytest

from moefit.signals import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_interrupts_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with stop_on_signal() as request:
        assert request.received is None
        os.kill(os.getpid(), number)
        assert request.received is number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
