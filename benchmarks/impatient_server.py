"""`python -m moefit`, but its KV cache gives back after seconds what no request needs.

A server waits for a minute, and the soak test kills it about as often.
"""

import runpy

from moefit.engine.context import reservation

reservation.GIVE_BACK_AFTER = 2.0

if __name__ == "__main__":
    runpy.run_module("moefit", run_name="__main__")
