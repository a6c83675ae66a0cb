"""How a call is timed: on a GPU by CUDA graphs and events, on a CPU by the clock.

What is compared is run in turn (A B A B ...), so a drift of the clocks hits all alike. On a GPU each contender is captured
in a CUDA graph of many calls, one for each of several sets of inputs. A set is found in no cache: there are more sets than
the L2 cache holds, or else each set is used once a replay, and the cache is overwritten in front of every replay. That also
keeps the GPU busy while the host launches the next graph. Nothing waits for the GPU until all replays are queued.
"""

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

MIN_REPEATS = 20
MAX_REPEATS = 60
_REPLAY_BYTES = 1 << 30  # a replay moves about this much, so that its start and end do not count
_MAX_CALLS = 64
_QUEUED_US = 60_000.0  # repeats beyond the least number fit in this
_CACHES = 2  # sets between two uses of one, in sizes of the cache


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and quartiles over the repeats; each repeat is the mean of ``calls`` calls."""

    median_us: float
    q1_us: float
    q3_us: float
    repeats: int
    calls: int

    @classmethod
    def of(cls, samples_us: Sequence[float], calls: int) -> "Timing":
        """samples_us: microseconds of each repeat of ``calls`` calls; two or more."""
        q1, median, q3 = (value / calls for value in statistics.quantiles(samples_us, n=4, method="inclusive"))
        return cls(median, q1, q3, len(samples_us), calls)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How many sets of inputs there are, and how often one replay goes through them."""

    sets: int
    rounds: int


def rotation(set_bytes: int, cache_bytes: int) -> Rotation:
    """Enough sets that one is out of the cache when its turn comes again; else (tiny sets) each once a replay."""
    calls = min(max(1, -(-_REPLAY_BYTES // set_bytes)), _MAX_CALLS)
    sets = min(calls, -(-_CACHES * cache_bytes // set_bytes))
    return Rotation(sets, -(-calls // sets))


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do the work. ``call`` takes one set of inputs. One that is not required may refuse to run.

    Results of one work are compared with each other; names differ among all that are measured together.
    """

    name: str
    call: Callable[..., object]
    required: bool = True
    work: str = ""


@dataclasses.dataclass
class Measured:
    """By contender: timings, why it refused to run, and how far its result is from that of the first of its work."""

    timings: dict[str, Timing]
    refused: dict[str, str]
    distances: dict[str, float]


class Stopwatch:
    """Times contenders on one device. On a GPU, use it inside ``stream()``: graphs are captured there.

    quick: few repeats on a CPU, for trying the script out. On a GPU it changes nothing: there the sizes shrink.
    """

    def __init__(self, device: torch.device, quick: bool = False, min_repeats: int = MIN_REPEATS) -> None:
        self.device, self.on_gpu, self.min_repeats = device, device.type == "cuda", min_repeats
        self.quick = quick and not self.on_gpu
        self.cache_bytes = _cache_bytes(device)
        self._flush: torch.Tensor | None = None

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """All work inside on one stream that is not the default one, as capturing asks for."""
        with torch.cuda.stream(torch.cuda.Stream(self.device)) if self.on_gpu else contextlib.nullcontext():
            yield

    def rotation(self, set_bytes: int) -> Rotation:
        return Rotation(2, 1) if self.quick else rotation(set_bytes, self.cache_bytes)

    def measure(self, contenders: Sequence[Contender], sets: Sequence[tuple], rounds: int) -> Measured:
        """Times the contenders over the sets, in turn. What a required contender raises is raised."""
        found = Measured({}, {}, {})
        references, replays = {}, {}
        pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        for contender in contenders:
            try:
                out = _first_tensor(contender.call(*sets[0]))
                contender.call(*sets[-1])
                replays[contender.name] = self._replay(contender.call, sets, rounds, pool)
            except Exception as error:
                if contender.required:
                    raise
                found.refused[contender.name] = reason(error)
                continue
            found.distances[contender.name] = relative_distance(out, references.setdefault(contender.work, out))
            del out
        references.clear()
        found.timings = self.alternate(replays, len(sets) * rounds)
        return found

    def _replay(self, call: Callable[..., object], sets: Sequence[tuple], rounds: int, pool: object) -> Callable[[], None]:
        def run() -> None:
            for _ in range(rounds):
                for inputs in sets:
                    call(*inputs)

        return capture(run, pool).replay if self.on_gpu else run

    def alternate(
        self, replays: Mapping[str, Callable[[], object]], calls: int = 1, before: Callable[[], None] | None = None
    ) -> dict[str, Timing]:
        """Runs each in turn, many times; ``before`` in front of every run and outside of its time (else: flush L2)."""
        before = before or self.flush
        with _no_garbage_collection():
            if not self.on_gpu:
                samples = self._by_clock(replays, before, 3 if self.quick else self.min_repeats)
                return {name: Timing.of(values, calls) for name, values in samples.items()}
            warm = self._by_events(replays, before, 1)
            round_us = sum(samples[0] for samples in warm.values()) or 1.0
            repeats = int(min(max(_QUEUED_US / round_us, self.min_repeats), MAX_REPEATS))
            samples = self._by_events(replays, before, repeats)
        return {name: Timing.of(values, calls) for name, values in samples.items()}

    def samples_us(self, call: Callable[[], object], repeats: int, before: Callable[[], None]) -> list[float]:
        """Microseconds of each call, as it is called; for what cannot take turns call by call."""
        timed = self._by_events if self.on_gpu else self._by_clock
        with _no_garbage_collection():
            return timed({"": call}, before, repeats)[""]

    def _by_events(
        self, replays: Mapping[str, Callable[[], object]], before: Callable[[], None], repeats: int
    ) -> dict[str, list[float]]:
        events = {name: [] for name in replays}
        for _ in range(repeats):
            for name, replay in replays.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before()
                begin.record()
                replay()
                end.record()
                events[name].append((begin, end))
        torch.cuda.synchronize(self.device)
        return {name: [begin.elapsed_time(end) * 1e3 for begin, end in pairs] for name, pairs in events.items()}

    def _by_clock(
        self, replays: Mapping[str, Callable[[], object]], before: Callable[[], None], repeats: int
    ) -> dict[str, list[float]]:
        samples = {name: [] for name in replays}
        for _ in range(repeats):
            for name, replay in replays.items():
                before()
                started = time.perf_counter()
                replay()
                samples[name].append((time.perf_counter() - started) * 1e6)
        return samples

    def flush(self) -> None:
        """Overwrites the cache."""
        if self._flush is None:
            self._flush = torch.empty(2 * _CACHES * self.cache_bytes, dtype=torch.uint8, device=self.device)
        self._flush.zero_()

    def host_us(self, call: Callable[[], object], chunks: int, chunk: int) -> list[float]:
        """Host microseconds of each chunk of calls, divided by its length. The GPU is idle when a chunk begins."""
        samples = []
        with _no_garbage_collection():
            for _ in range(chunks):
                self.synchronize()
                started = time.perf_counter()
                for _ in range(chunk):
                    call()
                samples.append((time.perf_counter() - started) * 1e6 / chunk)
        self.synchronize()
        return samples

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def capture(run: Callable[[], None], pool: object = None) -> torch.cuda.CUDAGraph:
    """What ``run`` launches, as a CUDA graph. It must have run before, so that nothing is compiled in here.

    Not ``torch.cuda.graph``: that empties the allocator's cache each time, which costs more than what is measured.
    """
    graph = torch.cuda.CUDAGraph()
    with _no_garbage_collection():  # nothing may be freed that was allocated before
        graph.capture_begin(pool=pool)
        try:
            run()
        finally:
            graph.capture_end()
    return graph


def relative_distance(out: torch.Tensor, reference: torch.Tensor) -> float:
    """``|out - reference| / |reference|`` in float32; NaN where the result holds one. 0 for the reference itself."""
    if out is reference:
        return 0.0
    difference = torch.linalg.vector_norm(out.float() - reference.float())
    return float(difference / torch.linalg.vector_norm(reference.float()).clamp(min=1e-30))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    found = os.sysconf("SC_LEVEL2_CACHE_SIZE") if "SC_LEVEL2_CACHE_SIZE" in os.sysconf_names else 0
    return found if found > 0 else 1 << 20


def _first_tensor(out: object) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def reason(error: Exception) -> str:
    """Type and first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
