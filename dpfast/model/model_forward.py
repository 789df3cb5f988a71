"""What stands in for the whole model's ``forward``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType

from dpfast.capture import running_pass
from dpfast.capture.picked_rows import PickedRows
from dpfast.capture.recorder import OUTSIDE, Recorder, running_backward
from dpfast.capture.refusals import ONE_BY_ONE, BypassError, refuse_gradient_hooks
from dpfast.capture.shift import Shift, inside_checkpoint
from dpfast.capture.traced_tap import batch_token
from dpfast.capture.trees import packed_sequences, tensors
from dpfast.layers.broadcast import UnservedError
from dpfast.layers.generic import Generic
from dpfast.model import graph_inputs
from dpfast.model.bare_parameters import BareForward, BareParameters
from dpfast.model.forwards import Forward, lend, on_nobody, trains
from dpfast.model.packed_forward import PackedForward, batch_of
from dpfast.refusals import (
    BatchStatisticsError,
    LayoutError,
    LeftBehindError,
    NotOneSampleError,
    RowsError,
    SamplesMeetError,
    TransformedError,
)
from dpfast.separation import Check, Verdict, aside, kept, kind, noisy, same, unvarying, without_autocast
from dpfast.separation.schedule import Schedule
from dpfast.separation.texts import Left

logger = logging.getLogger(__name__)
MOST_KINDS = 32  # of calls that are checked: an argument that counts steps makes no more


class ModelForward(Forward):
    """The model's entry: learns the batch size, and makes sure that every gradient belongs to one sample.

    No layer is trusted in a layout (its input's number of dimensions, and what its rows are taken for) before a check
    has shown that it keeps the samples apart there: see :mod:`dpfast.separation`. A model that fails, or in which a
    layer's rows cannot be the samples', is run sample by sample under vmap, if that computes the same; else it is
    refused. It is checked again at steps 2, 4, 8 and so on, and when it is called in another way.

    ``public_state`` names parameters, buffers and modules with such that forwards may change by the samples.
    """

    def __init__(
        self,
        module: nn.Module,
        inner: Forward | None,
        by_sample: Generic,
        bare: BareParameters,
        batch_dim: int,
        one_by_one: bool = False,
    ):
        super().__init__(module)
        self.inner = inner
        self.by_sample = by_sample
        self.bare = bare
        self.recorder = by_sample.recorder
        self.batch_dim = batch_dim
        self.one_by_one = one_by_one
        self.runs_by_sample = False
        self._guards: dict[Any, Any] = {}
        self._guarded: list[bool] = []  # which parameters were trained when guards were looked at
        self._normalising: list[tuple[str, nn.Module]] | None = None  # layers that may use statistics of the batch
        self._compiler: Any = None  # what torch.compile compiles with, if it does
        self._kinds: set[Any] = set()  # of inputs that were checked
        self._untested: set[int] = set()  # inputs that were the same for all samples whenever there was a check
        self._agreed = False  # the ranks of a sharded model have made the first check
        self._state_seen = False  # what a forward of one sample leaves in the model was looked at
        self._schedule = Schedule()
        self.packed = PackedForward(module, self.recorder, self)
        self.public_state: tuple[str, ...] = ()
        self.verdict: Verdict | None = None  # of the last check

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_guards": {},
            "_guarded": [],
            "_compiler": None,
        }  # hooks stay with the parameters that they are on

    def remove(self) -> None:
        super().remove()
        for guard in self._guards.values():
            guard.remove()
        self._guards, self._guarded = {}, []
        self.packed.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            from dpfast.model import compiling

            return compiling.outside_graph(self._call, args, kwargs)
        return self._call(None, args, kwargs)

    def _call(self, compiler: Any, args: Any, kwargs: Any) -> Any:
        self._compiler = compiler
        if "torch._dynamo" in sys.modules:  # blocks of the model may be compiled, if it is not
            from dpfast.model import compiling  # noqa: F401
        recorder = self.recorder
        if recorder.paused or recorder.inside or recorder.token is not None:
            return self._run(args, kwargs)
        if running_backward() == OUTSIDE:
            self.bare.leave()
        if not trains(self.module):
            return self._run_without_gradients(args, kwargs)
        self._guard_parameters()
        recorder.evaluating = not self.module.training and recorder.needs_model
        if recorder.evaluating:
            with recorder.setting(paused=True):
                return self._run(args, kwargs)
        self._refuse_transforms()
        recorder.shift.start_forward()
        if recorder.verifies:
            self._refuse_batch_statistics()
        sizes = input_sizes(args, kwargs, self.batch_dim)
        recorder.batch_sizes = [size for size in sizes if size != 1] or sizes[:1]
        one = self.one_by_one and 1 in sizes
        if one:
            recorder.batch_sizes = [1]
        if recorder.packed:
            self.packed.starts(compiler is not None, args, kwargs)
            sizes = recorder.batch_sizes
        recorder.start_forward()
        if len(sizes) > 1 and not one:
            graph_inputs.refuse_one(self.module, args, kwargs, self.one_by_one)
        with (
            graph_inputs.told_of(self.module, args, kwargs),
            batch_token(recorder.batch_size),
            recorder.setting(inside=True),
        ):
            out = self._run_checked(args, kwargs)
        if one and len(sizes) > 1 and any(x.shape[self.batch_dim : self.batch_dim + 1] != (1,) for x in tensors(out)):
            raise NotOneSampleError(
                f"inputs of sizes {sizes} are no batch of one: use BatchMemoryManager(max_physical_batch_size=1)"
            )
        batch = recorder.batch_size
        for x in tensors(out):
            if x.requires_grad:  # the outermost backward comes by here before any checkpoint's inner one
                x.register_hook(partial(_opens, recorder, self.bare, batch, running_backward() == OUTSIDE))
        return out

    def install(self) -> None:
        super().install()
        self._guard_parameters()
        if self.recorder.ranks.sharded:  # before its parameters are gathered
            self._guards[self.module] = self.module.register_forward_pre_hook(
                self._check_together, prepend=True, with_kwargs=True
            )

    def _check_together(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The first check of a sharded model: every rank runs it, on the batch of the rank that has most samples.

        Its forwards and backwards gather parameters, which takes all ranks. A layout that comes up later stays
        untrusted: gradients through it are refused.
        """
        recorder = self.recorder
        if recorder.paused or recorder.observer or not (module.training and trains(module)):
            return
        if running_backward() != OUTSIDE:  # a checkpoint around the model computes it again
            return
        rows = None
        if recorder.packed:
            rows = self.packed.check_together(lambda args, kwargs: module(*args, **kwargs), args, kwargs)
        if self._agreed:
            return
        if rows is None:
            sizes = input_sizes(args, kwargs, self.batch_dim)
            rows = [int(row[0]) for row in recorder.ranks.gathered([max(sizes, default=0)])]
        if max(rows) < 2:
            return
        args, kwargs = batch_of(recorder.ranks, rows.index(max(rows)), (args, kwargs))
        sizes = input_sizes(args, kwargs, self.batch_dim)
        recorder.batch_sizes = [size for size in sizes if size != 1] or sizes[:1]
        recorder.new_layouts = set()
        if why := self._why_mixed(args, kwargs, lambda args, kwargs: module(*args, **kwargs)):
            raise SamplesMeetError(
                f"{why}, and a sharded model cannot be run sample by sample: use DistributedDataParallel"
            )
        self._agreed = True

    def _run_checked(self, args: Any, kwargs: Any) -> Any:
        if self.recorder.batch_size == 0 and self.recorder.packed:
            return self.packed.on_none(self._run, args, kwargs)
        if self.recorder.ranks.sharded:
            return self._run(args, kwargs)
        if self.recorder.batch_size == 0:
            return on_nobody(self._run, args, kwargs, self.batch_dim, self.module)
        while True:
            try:
                return self._try_to_run(args, kwargs)
            except UnservedError:
                if not self._give_up():
                    raise
            except BypassError as error:
                if self._give_up(every=True):
                    continue
                if not lend(self.module, self.inner, self.by_sample, error.parameters):
                    if self.runs_by_sample:
                        raise
                    self._switch_to_samples(str(error), args, kwargs)
            except Exception:  # of code that wants a tensor and no stand-in, perhaps
                if self.bare.worked or not self._give_up(every=True):
                    raise

    def _give_up(self, every: bool = False) -> bool:
        """Have vmap serve those bare parameters that are not served else, or ``every`` one; False if it does."""
        if not self.bare.give_up(every):
            return False
        self.recorder.verified = set()
        return True

    def _try_to_run(self, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        recorder.new_layouts = set()
        self._forget_what_no_longer_holds(args, kwargs)
        if recorder.batch_size == 1 and recorder.verifies and not self._state_seen and not running_pass.transforms():
            self._state_seen = True
            with self._uncompiled():
                if left := self._check(args, kwargs).state():
                    raise LeftBehindError(left)
        if recorder.verifies and self.bare.served and not self.runs_by_sample:
            with self._uncompiled():
                same_so = self.bare.computes_the_same(self._run, self.module, args, kwargs)
            if not same_so:
                self._give_up(every=True)
        picks, due = False, self._is_checked and running_backward() == OUTSIDE and self._schedule.due()
        if recorder.verifies and (due or not recorder.verified):
            refuse_gradient_hooks(recorder.names)
        try:
            why = ""
            if not recorder.verified:  # the first check comes before the forward: two graphs at once cost memory
                why = self._why_mixed(args, kwargs)
            elif due:
                why = self._why_mixed_now(args, kwargs)
            if not why:
                if recorder.packed:
                    self.packed.check(self._run, args, kwargs)
                if recorder.under_way is not None:
                    recorder.under_way.calls.clear()  # of looks at the samples
                out = self._run(args, kwargs)
                ran = recorder.segments, self.packed.attention
                why = self._why_mixed(args, kwargs) if recorder.new_layouts - recorder.verified else ""
                self.packed.is_of(*ran)  # and not of looks at the samples
            picks = why != "" and self.verdict is not None and self.verdict.picks
        except (UnservedError, BypassError):
            raise
        except LayoutError as error:
            why, picks = str(error), isinstance(error, RowsError)
        except RuntimeError as error:
            if self._compiler is not None or not any(rows == "shared" for _, _, rows in recorder.new_layouts):
                raise
            # Copies of what all samples share have a batch dimension, which the model's code may not expect.
            why = f"inputs shared by all samples do not fit ({error})"
        if picks and self._follow_rows():
            return self._try_to_run(args, kwargs)
        if why and self._give_up(every=True):
            return self._try_to_run(args, kwargs)
        if why:
            self._switch_to_samples(why, args, kwargs)
            return self._run(args, kwargs)
        return out

    def is_to_look(self, args: Any, kwargs: Any) -> bool:
        """Whether the next forward is to look at the samples, so that it has to run as it is written."""
        return not self.recorder.verified or self._schedule.near() or not self._has_tested(args, kwargs)

    def _has_tested(self, args: Any, kwargs: Any) -> bool:
        """Whether inputs that were the same for all samples in every check still are."""
        return not self._untested or self._untested <= self._unvarying(args, kwargs, self._untested)

    def count_step(self) -> None:
        """A recorded graph runs in the place of a forward."""
        self._schedule.due()

    def _follow_rows(self) -> bool:
        """Note from now on whose the rows are that the model picks; False if that is done, or cannot be."""
        recorder = self.recorder
        if recorder.follows_rows or not self._is_checked:
            return False
        recorder.follows_rows, recorder.verified = True, set()
        return True

    def _forget_what_no_longer_holds(self, args: Any, kwargs: Any) -> None:
        """A check has shown nothing of inputs that were the same for all samples (masks without padding), or absent."""
        recorder = self.recorder
        if not recorder.verified or not self._is_checked:
            return
        if not self._has_tested(args, kwargs) or (
            len(self._kinds) < MOST_KINDS and self._kind(args, kwargs) not in self._kinds
        ):
            recorder.verified, self._untested = set(), set()

    @property
    def _is_checked(self) -> bool:
        """Whether this batch can show anything, and needs to."""
        return self.recorder.verifies and not self.runs_by_sample and self.recorder.batch_size not in (None, 0, 1)

    def _kind(self, args: Any, kwargs: Any) -> Any:
        return kind(args, kwargs, self.recorder.batch_size, self.batch_dim)

    def _is_public(self, name: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in self.public_state)

    def _unvarying(self, args: Any, kwargs: Any, among: set[int] | None = None) -> set[int]:
        return unvarying((args, kwargs), self.recorder.batch_size or 0, self.batch_dim, among)

    def _why_mixed(self, args: Any, kwargs: Any, run: Any = None) -> str:
        """Why samples are not kept apart, or an empty string."""
        recorder = self.recorder
        if not recorder.verifies or self.runs_by_sample or recorder.batch_size in (0, 1):
            return ""
        if recorder.batch_size is None and len(recorder.batch_sizes) == 0:
            raise LayoutError(
                f"the batch size cannot be told from the inputs of {type(self.module).__name__}: pass tensors with the "
                f"batch first"
            )
        with self._schedule.checking(again=False), self._uncompiled():
            self.verdict = self._check(args, kwargs, run).whole()
        if self.verdict.untried and self._give_up(every=True):  # their rows may be the samples' by chance
            return self._why_mixed(args, kwargs, run)
        if not self.verdict.mixed:
            self._kinds.add(self._kind(args, kwargs))
            self._untested |= self._unvarying(args, kwargs)
        return self.verdict.mixed

    def _why_mixed_now(self, args: Any, kwargs: Any) -> str:
        """The same of a model that was found clean, on this batch."""
        with self._schedule.checking(), self._uncompiled():
            verdict = self._check(args, kwargs).again()
        if verdict.mixed:
            self.verdict = verdict
        return verdict.mixed

    def _check(self, args: Any, kwargs: Any, run: Any = None) -> Check:
        seed = self._schedule.steps
        return Check(run or self._run, args, kwargs, self.recorder, self.batch_dim, self.module, seed, self._is_public)

    def _run(self, args: Any, kwargs: Any) -> Any:
        if self.runs_by_sample and not self.recorder.paused and torch.is_grad_enabled() and self.recorder.token is None:
            with self._uncompiled():
                return self.by_sample(self.plain, *args, **kwargs)
        if self.bare.stands:
            return self._run_whole(args, kwargs)
        with self.bare.standing():
            out = self._run_whole(args, kwargs)
            if self.bare.stands:
                self.bare.check(out)
            return out

    def _run_whole(self, args: Any, kwargs: Any) -> Any:
        if self._compiler is None or self.runs_by_sample or self.recorder.follows_rows:
            batch = self.recorder.batch_size
            follows = PickedRows(batch, self.module) if self.recorder.follows_rows and batch else nullcontext()
            with follows, self.packed.running(args, kwargs):
                return (self.inner or self.plain)(*args, **kwargs)
        from dpfast.model import compiling

        served = isinstance(self.inner, BareForward) and self.inner.served and self.bare.stands
        inner = None if served else self.inner
        own = inner or compiling.of_one_model(self.module, self.previous, self.plain)
        return compiling.within(self._compiler, own, *args, **kwargs)

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """Within, nothing is compiled: what runs a few times is not worth it."""
        if "torch._dynamo" not in sys.modules:
            yield
            return
        from dpfast.model import compiling

        compiler, self._compiler = self._compiler, None
        try:
            with compiling.uncompiled():
                yield
        finally:
            self._compiler = compiler

    def _run_without_gradients(self, args: Any, kwargs: Any) -> Any:
        """An evaluation, unless a reentrant checkpoint around the model is to run this again in the backward."""
        recorder = self.recorder
        if not recorder.shift:
            return self._run(args, kwargs)
        training = self.module.training and inside_checkpoint()
        if training:
            recorder.shift.start_forward()
        with recorder.setting(inside=training, paused=not training):
            return self._run(args, kwargs)

    def _guard_parameters(self) -> None:
        """Autograd must never reach a parameter past its tap: see :meth:`Recorder.record_whole`."""
        trained = [p.requires_grad for p in self.recorder.names]
        if trained == self._guarded:
            return
        self._guarded = trained
        self.recorder.last_source = ""  # what another graph, or no graph, trains may be in the next pass
        for p in self.recorder.names:
            if p.requires_grad and p not in self._guards:
                self._guards[p] = p.register_hook(partial(_past_the_tap, self.recorder, p))

    def _same_by_sample(self, inputs: Any) -> bool:
        """Whether the model computes the same for each sample by itself."""
        self.runs_by_sample = False
        with self.recorder.setting(paused=True), kept(self.module):
            expected = tensors(self._run(*inputs))
        self.runs_by_sample = True
        return same(expected, tensors(self._run(*inputs)))

    def _refuse_transforms(self) -> None:
        """Inside of ``torch.func`` taps cannot record; and vmap hides how many samples a batch of one stands for."""
        around = running_pass.transforms()
        if around and (not self.recorder.alone or TransformType.Vmap in around):
            raise TransformedError(
                f"{type(self.module).__name__} was called inside of torch.func.{around[-1].name.lower()}, where its "
                f"samples cannot be followed: for gradients of its inputs use torch.autograd.grad(..., "
                f"create_graph=True) on the batch, which is exact"
            )

    def _refuse_batch_statistics(self) -> None:
        if self._normalising is None:
            kinds = torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.instancenorm._InstanceNorm
            self._normalising = [(n, m) for n, m in self.module.named_modules() if isinstance(m, kinds)]
        for name, module in self._normalising:
            if normalises_over_batch(module):
                raise BatchStatisticsError(
                    f"{name} ({type(module).__name__}) normalises every sample by the others in its batch: call eval() "
                    f"on it, or replace it with opacus.validators.ModuleValidator.fix(model)"
                )

    def _switch_to_samples(self, why: str, args: Any, kwargs: Any) -> None:
        """Run by sample from now on, provided that this computes the same function."""
        recorder = self.recorder
        if (
            not recorder.verifies or recorder.packed or isinstance(why, Left)
        ):  # what is left behind is left by one sample, too
            raise (LeftBehindError if isinstance(why, Left) else SamplesMeetError)(why)
        hint = (
            f"{why}, so it cannot be told which gradient is whose. Inputs that all samples share (position ids, "
            f"masks) may have shape [1, ...]; layers must see the batch along one dimension"
        )
        if recorder.batch_size is None:
            raise SamplesMeetError(f"{hint}. {ONE_BY_ONE}")
        try:
            full_precision = without_autocast(self.module, args, kwargs)
            with aside(self.module), recorder.setting(shift=Shift()), full_precision as full:
                self.runs_by_sample = self._same_by_sample(full) and self._same_by_sample(noisy(full))
        except Exception as error:
            self.runs_by_sample = False
            raise SamplesMeetError(
                f"{hint}. Running the model sample by sample failed too ({error}). {ONE_BY_ONE}"
            ) from error
        if not self.runs_by_sample:
            raise SamplesMeetError(
                f"{hint}. Run sample by sample, the model computes something else: its forward mixes samples (a mean "
                f"over the batch), depends on the batch size, or draws random numbers. {ONE_BY_ONE}"
            )
        try:
            with self._uncompiled():
                self.verdict = self._check(args, kwargs).by_sample()
        except BypassError as error:
            self.runs_by_sample = False
            if not lend(self.module, self.inner, self.by_sample, error.parameters):
                raise
            return self._switch_to_samples(why, args, kwargs)
        logger.warning("%s is run sample by sample from now on: %s", type(self.module).__name__, why)


def normalises_over_batch(module: nn.Module) -> bool:
    """Whether ``module``, as it stands, uses statistics of the batch."""
    batch_norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    instance_norm = isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
    return batch_norm and not instance_norm and (module.training or module.running_mean is None)


def input_sizes(args: Any, kwargs: Any, batch_dim: int) -> list[int]:
    """The sizes along the batch dimension of the inputs with most dimensions: which of them is the batch's?"""
    if packed := packed_sequences((args, kwargs)):
        return [int(packed[0].batch_sizes[0])]
    given = [x for x in tensors((args, kwargs)) if x.dim()]
    most = max((x.dim() for x in given), default=0)
    sizes = [x.shape[batch_dim if x.dim() > max(batch_dim, 1) else 0] for x in given if x.dim() == most]
    return list(dict.fromkeys(sizes))


def _opens(recorder: Recorder, bare: BareParameters, batch: int | None, before: bool, gradient: Tensor) -> None:
    """``before``: the forward ran before all passes, so that the pass is one of its own, not within another."""
    if before:
        recorder.drop_failed()
    if recorder.opens():  # checkpoints may run compiled layers again
        during = ExitStack()
        during.enter_context(batch_token(batch))
        if recorder.compiled:
            during.enter_context(bare.standing(backward=True))
        torch.autograd.Variable._execution_engine.queue_callback(during.close)
    if running_pass.trains(recorder.names):  # torch.autograd.grad(output, x) is no backward
        recorder.open(batch)


def _past_the_tap(recorder: Recorder, p: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is not None:
        recorder.record_whole(p, gradient)
