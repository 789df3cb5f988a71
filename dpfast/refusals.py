"""What dpfast refuses for the guarantee's sake: one exception for each kind of remedy, which names a part of the docs.

``docs/troubleshooting.md`` has a section for each ``topic`` below. An argument that is out of its range is no refusal
of this kind: its message says all, and it is an ordinary :class:`ValueError`.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from opacus.validators.errors import UnsupportedModuleError

PAGE = "troubleshooting"
MENTION = re.compile(rf" \(see docs: {PAGE}#[\w-]+\)")


class Refusal(Exception):
    """Something that cannot be trained, counted or resumed with the guarantee that was asked for.

    Each message ends with the section of the documentation that explains it. A refusal that quotes another one names
    its own section alone.

    Attributes:
        topic: the section of ``docs/troubleshooting.md``.
    """

    topic: ClassVar[str] = ""

    def __init__(self, *args: Any):
        super().__init__(*(MENTION.sub("", arg) if isinstance(arg, str) else arg for arg in args))

    def __str__(self) -> str:
        return f"{super().__str__()} (see docs: {PAGE}#{self.topic})"


def topics() -> dict[str, list[type[Refusal]]]:
    """Every section that a message can name, with the exceptions that name it."""
    found: dict[str, list[type[Refusal]]] = {}
    classes = list(Refusal.__subclasses__())
    for cls in classes:  # grows while it is walked
        classes += [sub for sub in cls.__subclasses__() if sub not in classes]
        found.setdefault(cls.topic, []).append(cls)
    return found


# ---------------------------------------------------------------- the model


class UnservedModuleError(Refusal, UnsupportedModuleError):
    """Modules have no per-sample gradients, or none that are exact."""

    topic = "layers"


class BatchStatisticsError(Refusal, ValueError):
    """A module normalises every sample by the others."""

    topic = "layers"


class LayoutError(Refusal, RuntimeError):
    """It cannot be told what belongs to which sample."""

    topic = "batch-dimension"


class RowsError(LayoutError):
    """A layer got rows that are not as many of each sample."""


class SamplesMeetError(LayoutError):
    """The model lets the samples of a batch meet, or nothing shows that it does not."""

    topic = "samples-meet"


class LeftBehindError(LayoutError):
    """A forward leaves something of the samples behind in the model."""

    topic = "left-behind"


class GradSamplerError(LayoutError):
    """A grad sampler of the user's own does not fit what its layer does."""

    topic = "grad-samplers"


class RuleError(Refusal, ValueError):
    """What a user's own rule for a layer returned is not the layer's per-sample gradients."""

    topic = "grad-samplers"


class UnitsError(Refusal, ValueError):
    """It cannot be told which rows are of one unit, or what would keep them together is not given."""

    topic = "units"


class NotOneSampleError(Refusal, ValueError):
    """A model that is trained one sample at a time was given several."""

    topic = "one-sample-at-a-time"


class AlreadyPrivateError(Refusal, ValueError):
    """A model that is private already, or was made private otherwise."""

    topic = "already-private"


class ParametersChangedError(Refusal, ValueError):
    """The optimizer and the private model do not have the same parameters."""

    topic = "parameters-changed"


class ParameterReplacedError(Refusal, RuntimeError):
    """A parameter of the private model became another object."""

    topic = "parameters-changed"


# ---------------------------------------------------------------- gradients


class BypassedLayersError(Refusal, RuntimeError):
    """Parameters got gradients that nobody has clipped."""

    topic = "outside-the-forward"


class OutsideForwardError(LayoutError):
    """A layer ran outside of the private model's forward."""

    topic = "outside-the-forward"


class GradientHookError(Refusal, ValueError):
    """A parameter has a hook on a gradient that is never made."""

    topic = "gradient-hooks"


class OwnGradientError(Refusal, RuntimeError):
    """``torch.autograd.grad`` was asked for gradients of private parameters."""

    topic = "own-gradients"


class TransformedError(LayoutError):
    """Gradients of gradients, or ``torch.func``, where samples cannot be followed."""

    topic = "own-gradients"


class ChangedInPlaceError(LayoutError):
    """A tensor was written to while a per-sample gradient still needed it."""

    topic = "changed-in-place"


class InputChangedError(Refusal, RuntimeError):
    """The same, of the input of a layer that has a grad sampler."""

    topic = "changed-in-place"


class MeanIn16BitsError(Refusal, ValueError):
    """A mean over the batch was rounded to 16 bits."""

    topic = "mean-in-16-bits"


class LossCouplesError(Refusal, ValueError):
    """A loss is not one number for each sample."""

    topic = "loss-per-sample"


class ClippingFunctionError(Refusal, ValueError):
    """A clipping function exceeds the sensitivity that it declares."""

    topic = "clipping-functions"


# ---------------------------------------------------------------- the loop


class SecondBackwardError(Refusal, ValueError):
    """A sample could count twice in a step."""

    topic = "second-backward"


class RepeatedSampleError(Refusal, ValueError):
    """A batch has a sample more than once."""

    topic = "sample-twice"


class BatchOrderError(Refusal, ValueError):
    """It cannot be told which physical batch is trained on."""

    topic = "batches-in-order"


class PaddingError(Refusal, ValueError):
    """It cannot be told which rows are padding."""

    topic = "padded-batches"


class NothingToReleaseError(Refusal, ValueError):
    """A step without a backward pass, or with old gradients."""

    topic = "nothing-to-release"


class ScalerError(Refusal, ValueError):
    """A loss that is scaled, or a step that is skipped, by what a GradScaler sees of the samples."""

    topic = "grad-scaler"


class ReplacedMethodError(Refusal, ValueError):
    """A method of the optimizer was replaced where that cannot be served."""

    topic = "replaced-methods"


class PassChangedError(Refusal, ValueError):
    """A backward pass went through more than could be known before it, and nothing of it was summed."""

    topic = "run-the-batch-again"


class RecordingError(Refusal, ValueError):
    """``graphed`` was given what it cannot record."""

    topic = "graphed"


class NotRecordedError(Refusal, RuntimeError):
    """A step could not be recorded."""

    topic = "graphed"


class ReplayedNoiseError(Refusal, RuntimeError):
    """A step is being recorded, which would replay its noise."""

    topic = "replayed-noise"


# ---------------------------------------------------------------- data, ranks, runs


class LoaderError(Refusal, ValueError):
    """Poisson batches cannot be drawn of a loader's samples."""

    topic = "data-loader"


class CollateError(Refusal, ValueError):
    """A collate function has no empty batch, or lets samples reach each other."""

    topic = "collate-fn"


class RanksError(Refusal, ValueError):
    """The processes of a run do not share one step."""

    topic = "several-ranks"


class RankLostError(Refusal, RuntimeError):
    """Another rank is not there any more: it has died, or does not answer."""

    topic = "several-ranks"


class BudgetError(Refusal, ValueError):
    """A privacy budget cannot be met, or cannot be accounted for."""

    topic = "privacy-budget"


class CheckpointError(Refusal, ValueError):
    """A checkpoint is none, is of another run, or forgets steps."""

    topic = "checkpoints"


class TrainerSettingError(Refusal, ValueError):
    """A setting of a trainer that private training cannot have."""

    topic = "trainer-settings"
