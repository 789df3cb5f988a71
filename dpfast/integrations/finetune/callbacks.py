"""What happens around the steps of a run: a progress bar, the end of an interrupted run, and the last step's log."""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

SHOWN = {
    "epsilon": ".3f",
    "samples_per_second": ",.0f",
    "users_per_second": ",.0f",
    "training loss (not private)": ".3f",
}


class Progress(TrainerCallback):
    """One progress bar, with the last figures at its end."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def show(self, figures: dict[str, float]) -> None:
        """Figures by name; those that the bar has no room for are left out."""
        for name, value in figures.items():
            if name in SHOWN or name.startswith(("eval_", "epsilon_per_")):
                self.shown[name.replace("_per_second", "/s").replace("_", " ")] = format(value, SHOWN.get(name, ".4g"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        first = state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", disable=not first, dynamic_ncols=True
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.show(logs or {})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.close()


class TensorBoard(TensorBoardCallback):
    """Logs in ``folder``. Those of a resumed run take the place of what was logged after its checkpoint."""

    def __init__(self, folder: str):
        super().__init__()
        self.logging_dir = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


class Ending(TrainerCallback):
    """The last step is logged, whatever its number."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps


class Interruption(TrainerCallback):
    """Ctrl-C ends a run after the step that is under way, with a checkpoint; a second one ends it at once.

    Of several processes each would end after a step of its own, and wait for the others for ever: there Ctrl-C ends a
    run at once, and the last checkpoint stands.
    """

    def __init__(self) -> None:
        self.asked, self.before = False, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._note)  # type: ignore[assignment]

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        self.restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Ctrl-C means again what it meant before."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None
