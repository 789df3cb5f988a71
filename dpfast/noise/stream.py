"""The noise stream: a standard normal ``z(key, step, parameter, element)``, the same on every backend and device."""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dpfast.distributed.ranks import Ranks
from dpfast.ops import KEY_WORDS, Noise
from dpfast.reference.rounding import rounded_up
from dpfast.refusals import CheckpointError, ReplayedNoiseError

# The secure mode works in whole steps of this many bits below the noise's standard deviation.
GRID_BITS = 24


class NoiseStream:
    """Where the noise of one private optimizer comes from: a key, and a counter of steps.

    A key and a step are handed out once, by :meth:`next`, to the stream that drew the key: the same noise on two
    batches would lay the difference of their sums bare. What becomes of a stream:

    | | |
    |---|---|
    | a copy (``copy``, ``deepcopy``, ``pickle``) | has no key and no generator: it draws a key of its own |
    | ``os.fork``, a multiprocessing worker | the child draws a key of its own, the parent goes on |
    | :meth:`renew`, thus ``PrivacyEngine.load_checkpoint`` | the next step has a new key |
    | :meth:`load_state_dict` | the same key: only for a caller that also brings the very same batches back |
    | a CUDA graph's capture, a trace | refused: what it replays would have the noise of one step for ever |
    | ``dpfast.graphed`` | each call asks :meth:`next`, outside of the graph, which is given key and step as tensors |

    ``fast`` (the default): Philox4x32-10 with a key of 64 bits, drawn once, at the first step. It is the operating
    system's, whatever ``torch.manual_seed`` was given; only ``generator`` repeats it. It is no cryptographic generator.

    ``secure``: ChaCha20 with a key of 256 bits from the operating system, a new one for every step; nothing repeats
    it, no seed and no checkpoint. Against attacks on floating-point noise (Mironov 2012; Holohan and Braghin 2021),
    which tell sums apart by the set of floats that each can become, the clipped sum is rounded to whole steps of a grid
    of 2⁻²⁴ to 2⁻²⁵ standard deviations, the noise is a whole number of steps that does not depend on the sum, and the
    two are added exactly: what can come out, and how likely, depends on the sums' distance alone. Rounding d elements
    moves two neighbouring sums apart by at most ``√d`` steps, which the standard deviation is raised for. (Opacus
    adds up four draws, which makes the attack costly, not impossible.) A draw is itself a sum of three: a float32
    Gaussian, and two uniform 16-bit numbers that fill its low bits. Limits: it is a Gaussian to float32 accuracy, made
    of 96 random bits for two elements, and it ends between 8.2 and 9.5 standard deviations; the time that a step takes
    is not guarded; and the sums' own distance is the sensitivity up to the rounding of adding up many samples.

    The fast mode adds floats: its (ε, δ) is that of real arithmetic, as in Opacus without ``secure_mode``.

    Args:
        generator: what the fast mode's key is made of, all 64 bits of its seed included. Whoever knows its seed can
            take the noise off, and two runs with one seed have the same noise: for experiments on public data.
        secure: the mode; a secure stream takes no generator.
        ranks: who has to draw the same noise; keys are rank 0's.
    """

    def __init__(self, generator: torch.Generator | None = None, secure: bool = False, ranks: Ranks | None = None):
        if secure and generator is not None:
            raise ValueError("noise_generator: secure_mode takes its keys from the operating system, never from a seed")
        self.generator = generator
        self.secure = secure
        self.ranks = ranks or Ranks()
        self.step = 0
        self.key: tuple[int, ...] | None = None
        self._rounding_key: tuple[int, int] | None = None
        self._used: dict[tuple[int, ...], int] = {}  # of every key of this stream the first step that it has not used
        self._process = this_process()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: nothing that the noise is made of."""
        secret: dict[str, Any] = {"generator": None, "step": 0, "key": None, "_rounding_key": None, "_used": {}}
        return vars(self) | secret

    def next(self, noise_multiplier: float, sensitivity: float, elements: int, scale: float) -> Noise:
        """The noise of one step, which then counts as used. Nothing else hands out a key and a step.

        Args:
            noise_multiplier: standard deviation over sensitivity.
            sensitivity: the most that one sample moves the clipped sum (L2).
            elements: how many elements of all parameters together get noise.
            scale: what the noisy sum is multiplied with.

        Raises:
            OverflowError: the step counter is at its end (2³² steps); nothing was drawn.
            RuntimeError: the step is being captured or traced; nothing was drawn.
        """
        self.check()
        key = self._key_of_step() if noise_multiplier * sensitivity > 0 else (0,) * KEY_WORDS
        noise = Noise(key, self.step, *self._std_and_grid(noise_multiplier, sensitivity, elements), scale)
        self.step += 1
        if self.key is not None:
            self._used[self.key] = max(self.step, self._used.get(self.key, 0))
        return noise

    def check(self) -> None:
        """What :meth:`next` raises. A process that was forked off lets go of its parent's key, a step that was set
        back of its own."""
        if recorder := _recorder():
            raise ReplayedNoiseError(
                f"step: it is being recorded by {recorder}, which would replay the noise of this one step on other "
                f"batches, and account for none of them: call optimizer.step() outside of it"
            )
        if self._process != this_process() or (self.key is not None and self.step < self._used.get(self.key, 0)):
            self.renew()
        if self.step >= 1 << 32:
            raise OverflowError(f"noise step {self.step} does not fit in 32 bits: start a new run, with a new key")

    def beside(self, noise: Noise, noise_multiplier: float, sensitivity: float, elements: int, scale: float) -> Noise:
        """Noise of the same step as ``noise``, for other sums: they must have parameter indices of their own."""
        return Noise(noise.key, noise.step, *self._std_and_grid(noise_multiplier, sensitivity, elements), scale)

    def _std_and_grid(self, noise_multiplier: float, sensitivity: float, elements: int) -> tuple[float, float]:
        std = noise_multiplier * sensitivity
        if std > 0 and self.secure:
            grid = math.ldexp(1.0, math.frexp(std)[1] - 1 - GRID_BITS)
            return noise_multiplier * (sensitivity + math.sqrt(elements) * grid), grid
        return (rounded_up(std) if std > 0 else std), 0.0

    def _key_of_step(self) -> tuple[int, ...]:
        if self.secure:
            return self.ranks.from_rank(0, tuple(secrets.randbits(32) for _ in range(KEY_WORDS)))
        if self.key is None:
            self.key = (*self._draw(2), *(0,) * (KEY_WORDS - 2))
        return self.key

    def rounding_key(self) -> tuple[int, int]:
        """A key for stochastic rounding, apart from the noise's: what is rounded is already private."""
        if self._rounding_key is None:
            first, second = self._draw(2)
            self._rounding_key = (first, second)
        return self._rounding_key

    def _draw(self, words: int) -> list[int]:
        if self.generator is None:
            drawn = [secrets.randbits(32) for _ in range(words)]
        else:
            numbers = torch.randint(0, 1 << 32, (8,), generator=self.generator, device=self.generator.device).tolist()
            # The CPU's generator starts from the low 32 bits of its seed alone.
            entropy = [self.generator.initial_seed() & (1 << 64) - 1, *numbers]
            digest = _digest(entropy, 4 * words, b"dpfast draw")
            drawn = [int.from_bytes(digest[k : k + 4], "little") for k in range(0, 4 * words, 4)]
        return self.ranks.from_rank(0, drawn)

    def fingerprint(self) -> int:
        """48 bits that tell keys apart and do not give them away; -1 before there is one."""
        if self.key is None:
            return -1
        return int.from_bytes(_digest(self.key, 6, b"dpfast key"), "little")

    def state_dict(self) -> dict[str, Any]:
        """Key and step of the fast mode, for a run that goes on bit for bit; of the secure mode only the step.

        Whoever holds the key can take the noise of the fast mode off: it is never to be published.
        """
        state: dict[str, Any] = {"secure": self.secure, "step": self.step, "rounding_key": self._rounding_key}
        return state if self.secure else state | {"key": self.key}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; a key of another mode is not taken over.

        The caller answers for the batches: they must be those that the run would have had, to the bit, from the samples
        and their random transforms to dropout. Whoever cannot answer for that calls :meth:`renew`.

        A stream that has ever used the key past that step takes a new key, and says so.

        Raises:
            ValueError: the state is not one of a noise stream; nothing is changed.
        """
        key, step, rounding = check_state(state)
        loaded = None if self.secure or state.get("secure") else key
        if loaded is not None and (used := self._used.get(loaded, 0)) > step:
            warnings.warn(
                f"noise state of step {step}, and this optimizer has used the same key up to step {used}: a new key is "
                f"drawn, as the same noise on other batches would not hide them",
                stacklevel=2,
            )
            loaded = None
        self.renew()
        self.step, self.key = step, loaded
        self._rounding_key = None if rounding is None else (rounding[0], rounding[1])

    def renew(self) -> None:
        """Have the next step draw a new key from the operating system: a generator would give the old one again."""
        self.generator = self.key = self._rounding_key = None
        self.step, self._process = 0, this_process()


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def this_process() -> tuple[int, int]:
    """Another one for every process; a number that the system has given out again is told apart by the forks."""
    return os.getpid(), _forks


def _recorder() -> str | None:
    """What would replay this step as it is, if something would."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return "make_fx"
    try:
        capturing = torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # a torch without CUDA
        capturing = False
    return "a CUDA graph" if capturing else None


def _digest(numbers: Iterable[int], size: int, person: bytes) -> bytes:
    return hashlib.blake2b(
        b"".join(number.to_bytes(8, "little") for number in numbers), digest_size=size, person=person
    ).digest()


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that another process can compare: those under which the same noise meets the same sums."""
    return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in settings.items()}


def check_state(state: Any) -> tuple[tuple[int, ...] | None, int, tuple[int, ...] | None]:
    """Key, step and rounding key of a noise state, or a ValueError that says what is wrong with it."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"noise state: a mapping was expected, not {type(state).__name__}")
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= 1 << 32:
        raise CheckpointError(f"noise state: step={step!r} is no step counter; is the checkpoint from another library?")
    words = []
    for name, length in (("key", KEY_WORDS), ("rounding_key", 2)):
        value = state.get(name)
        fits = isinstance(value, (tuple, list)) and len(value) == length
        if value is not None and not (fits and all(type(word) is int and 0 <= word < 1 << 32 for word in value)):
            raise CheckpointError(f"noise state: {name} must be {length} words of 32 bits")  # not shown: it is a secret
        words.append(None if value is None else tuple(value))
    return words[0], step, words[1]
