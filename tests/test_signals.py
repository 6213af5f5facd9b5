import os
import signal

import pytest

from moefit.signals import note_hangups, stop_on_signal


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


def test_hangup_is_noted_once():
    before = signal.getsignal(signal.SIGHUP)
    with note_hangups() as hangup:
        assert not hangup.take()
        os.kill(os.getpid(), signal.SIGHUP)
        assert hangup.take() and not hangup.take()
    assert signal.getsignal(signal.SIGHUP) is before
