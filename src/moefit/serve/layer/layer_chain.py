"""Compute consecutive decoder layers of a step at once, as far as their experts are resident.

When the first of the layers is called, it and those after it are computed; they then return what is
there already. Absent experts are loaded between calls of the kernels, while those that are resident
are computed. A layer whose choice cannot be resident at once is computed by itself, and the next
one begins again. Layers without experts may stand between the others.

Shapes: B sequences, T tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import local
from typing import Any

from torch import Tensor
from torch.nn.modules import module as torch_module

from moefit.quant.cpu_kernels import kernels
from moefit.quant.layers.attention_block import BlockOutput
from moefit.quant.layers.decoder_layers import LayerCall, LayersOutput, compute_layers
from moefit.serve.hf.kv_cache import Int8Layer, ReservedLayer
from moefit.serve.layer.decoder_layer import (
    LayerForward,
    StepArguments,
    window_of,
)
from moefit.serve.layer.executor import StepLoads
from moefit.serve.layer.layer_parts import RoutedExperts

MASK = "attention_mask"  # the argument that may differ between layers, by its window


@dataclass(frozen=True, slots=True, eq=False)
class _Longer:
    """A layer's cache that has room for a step, and what it was before."""

    layer: Any
    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]

    def undo(self) -> None:
        """Remove the step, unless the cache was changed since."""
        if self.layer.keys is self.after[0] and self.layer.values is self.after[1]:
            self.layer.keys, self.layer.values = self.before


@dataclass(slots=True, eq=False)
class _Computed:
    """Layers of a step that were computed and not called yet.

    Attributes:
        next: The layer that is called next.
        first: The first layer of the call.
        x: What the next layer must be given.
        arguments: Its other arguments.
        made: What the call made.
        longer: Caches by layer.
        named: The arguments as the first layer was given them.
    """

    next: int
    first: int
    x: Tensor
    arguments: StepArguments
    made: LayersOutput
    longer: dict[int, _Longer]
    named: Mapping[str, Any]

    def undo(self) -> None:
        """Remove the step from the caches of the layers that were not called."""
        for place, one in self.longer.items():
            if place >= self.next:
                one.undo()


class _Loads:
    """Loads the absent experts of a call's layers; see `LoadsExperts`.

    Args:
        routed: The layers' experts; None for a layer without.

    Attributes:
        fetched: By layer, how many experts were absent.
    """

    def __init__(self, routed: Sequence[RoutedExperts | None]):
        self._routed = routed
        self._present: StepLoads | None = None
        self.fetched: dict[int, int] = {}

    def begin(self, layer: int, ids: Sequence[int]) -> bool:
        """Begin to load what a layer's choice lacks."""
        one = self._routed[layer]
        assert one is not None, "only layers with experts end a call"
        self._present = loads = one.experts.begin_loads(ids)
        if loads is not None:
            self.fetched[layer] = loads.number
        return loads is not None

    def wait(self) -> None:
        """Wait until it is resident."""
        assert self._present is not None
        self._present.wait()
        self._present = None

    def close(self) -> None:
        """End loads that nobody waits for, after an error."""
        if self._present is not None:
            self._present.close()


class LayerChain:
    """Layers that follow one another, each given the output of the one before.

    Args:
        forwards: Their `forward`, all of whose feed-forward blocks are known (`direct`), and at
            least one of which has experts.
    """

    def __init__(self, forwards: Sequence[LayerForward]):
        self._forwards = forwards
        self._reach = len(forwards)  # layers to try at once: fewer while experts are missing
        self._of_thread = local()
        routed = [one.routed for one in forwards if one.routed is not None]
        self._lock = routed[0].experts.shared.lock
        for place, one in enumerate(forwards):
            one.together, one.place = self, place

    @property
    def _computed(self) -> _Computed | None:
        """What was computed for the step of this thread."""
        return getattr(self._of_thread, "computed", None)

    @_computed.setter
    def _computed(self, computed: _Computed | None) -> None:
        self._of_thread.computed = computed

    def ready(self, place: int, x: Tensor, named: Mapping[str, Any]) -> Tensor | None:
        """Return the output of a layer that is computed already; see `LayersBefore`."""
        computed = self._computed
        if computed is None or place != computed.next or x is not computed.x:
            return None
        before = computed.named
        if named.keys() != before.keys() or window_of(named.get(MASK)) != self._window(computed):
            return None
        if any(value is not before[name] for name, value in named.items() if name != MASK):
            return None
        made = self._next(computed, x)
        return made if isinstance(made, Tensor) else None

    def output(
        self, place: int, x: Tensor, named: Mapping[str, Any], arguments: StepArguments
    ) -> Tensor | BlockOutput | None:
        """Return a layer's output, or what comes before its experts; see `LayersBefore`."""
        computed, self._computed = self._computed, None
        if computed is not None:
            expected = place == computed.next and x is computed.x
            expected = expected and arguments.window == self._window(computed)
            if expected and arguments.same_as(computed.arguments):
                return self._next(computed, x)
            computed.undo()
        computed = self._compute(place, x, named, arguments)
        return None if computed is None else self._next(computed, x)

    def _window(self, computed: _Computed) -> int | None:
        """Return the window that the next layer was computed with."""
        first = computed.next == computed.first
        return computed.arguments.window if first else self._forwards[computed.next].window

    def _next(self, computed: _Computed, x: Tensor) -> Tensor | BlockOutput:
        """Return the output of the next layer, or the beginning of a layer that lacks experts."""
        made, number = computed.made, computed.next - computed.first
        if number == made.complete:
            assert made.pending is not None
            return made.pending
        output = made.x_LTD[number].view(x.shape)
        more = number + 1 < made.complete or made.pending is not None
        self._computed = computed if more else None
        computed.next, computed.x = computed.next + 1, output
        return output

    def _compute(
        self, place: int, x: Tensor, named: Mapping[str, Any], arguments: StepArguments
    ) -> _Computed | None:
        """Compute layers from one on; None if that is not possible for the first."""
        compiled = kernels()
        if compiled is None or self._forwards[place].feed_kernels() is None:
            return None
        tokens = x.shape[0] * x.shape[1]
        with self._lock:
            self._begin_step(place)
            routed, longer = list[RoutedExperts | None](), dict[int, _Longer]()
            loads = _Loads(routed)
            try:
                calls = self._calls(place, x, arguments, routed, longer)
                if not calls:
                    return None
                x_TD = x.reshape(tokens, -1).contiguous()
                made = compute_layers(compiled, calls, x_TD, arguments.cos, arguments.sin, loads)
            except BaseException:
                loads.close()
                for one in longer.values():
                    one.undo()
                raise
            _observe(routed, made, tokens, loads.fetched)
        for absent in range(place + made.complete + 1, place + len(calls)):
            if (one := longer.pop(absent, None)) is not None:
                one.undo()
        self._adapt(made.complete, len(calls))
        return _Computed(place, place, x, arguments, made, longer, named)

    def _begin_step(self, place: int) -> None:
        """Do what comes before a step, if the model's first experts are the next ones."""
        following = (one.routed for one in self._forwards[place:] if one.routed is not None)
        if (routed := next(following, None)) is not None:
            routed.experts.begin_step()

    def _calls(
        self,
        place: int,
        x: Tensor,
        arguments: StepArguments,
        routed: list[RoutedExperts | None],
        longer: dict[int, _Longer],
    ) -> list[LayerCall]:
        """Return the calls of layers from one on; add their experts and their caches."""
        calls = list[LayerCall]()
        tokens, cache = x.shape[0] * x.shape[1], arguments.cache
        for at in range(place, min(place + self._reach, len(self._forwards))):
            forward = self._forwards[at]
            if at > place and (_are_hooked() or forward.has_hooks() or not forward.supports(x)):
                break
            if (feed := forward.feed_kernels()) is None:
                break
            experts = None
            if (one := feed.routed) is not None and feed.router is not None:
                sizes = feed.router.sizes
                if sizes.experts != one.experts.num_experts or any(
                    before.router is not None and before.router.sizes != sizes for before in calls
                ):
                    break
                if (experts := one.experts.addresses(prefilling=x.shape[1] > 1)) is None:
                    break
            layer = _own_cache(cache, forward.parts.index)
            before = None if layer is None else (layer.keys, layer.values)
            given = arguments if at == place else replace(arguments, window=forward.window)
            if (ready := forward.ready(tokens, given)) is None:
                break
            if layer is not None and before is not None:
                longer[at] = _Longer(layer, before, (layer.keys, layer.values))
            calls.append(LayerCall(*ready, feed.router, experts, feed.mlp))
            routed.append(one)
            if forward.has_hooks():  # which may change the layer's output
                break
        return calls

    def _adapt(self, complete: int, tried: int) -> None:
        """Try about as many layers next time as were computed before an expert was missing."""
        if complete == tried:
            self._reach = min(2 * self._reach, len(self._forwards))
        else:
            self._reach = max(1, 2 * complete)


def _observe(
    routed: Sequence[RoutedExperts | None],
    made: LayersOutput,
    tokens: int,
    fetched: Mapping[int, int],
) -> None:
    """Let the experts of complete layers observe the step."""
    done = slice(made.complete)
    ids, shares = made.ids_LTK[done].flatten(1).tolist(), made.shares_LE[done].tolist()
    for number, (one, of_rows, of_experts) in enumerate(
        zip(routed[done], ids, shares, strict=True)
    ):
        if one is None:
            continue
        absent = fetched.get(number, 0)
        one.experts.computed(of_rows, of_experts, tokens, made.logits_LTE[number], absent)


def _own_cache(cache: Any, index: int) -> Any:
    """Return a layer's cache if it becomes longer with a step."""
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    return layer if isinstance(layer, ReservedLayer | Int8Layer) else None


def _are_hooked() -> bool:
    """Return whether there are hooks on all modules."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def chains_of(
    forwards: Sequence[LayerForward], follows: Sequence[bool]
) -> list[Sequence[LayerForward]]:
    """Return runs of layers that may be computed at once, at least one of them with experts.

    Args:
        forwards: Layers in the order of a step.
        follows: Whether each is given just what the one before returns, with the same arguments
            but masks.
    """
    runs: list[list[LayerForward]] = []
    for number, one in enumerate(forwards):
        if not one.direct:
            continue
        if runs and number and forwards[number - 1].direct and follows[number]:
            runs[-1].append(one)
        else:
            runs.append([one])
    return [run for run in runs if len(run) > 1 and any(one.routed is not None for one in run)]
