"""Warpgroups that run one at a time, and change places where they wait."""

import random
import threading
from collections.abc import Callable, Sequence

from tests.emulator.faults import Fault


class _Stopped(Exception):
    """Another task has failed."""


class _Task:
    def __init__(self, name: str, code: Callable[[], None]) -> None:
        self.name, self.code = name, code
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.reason: Callable[[], str] = lambda: "its turn"
        self.finished = False


class Scheduler:
    """Runs tasks in threads of their own, of which one has its turn.

    The order follows from the seed alone. A task that waits for what no other brings about is a
    fault that says who waits for what.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._tasks: list[_Task] = []
        self._error: BaseException | None = None
        self._done = threading.Semaphore(0)
        self._local = threading.local()

    def run(self, tasks: Sequence[tuple[str, Callable[[], None]]]) -> None:
        """Returns when all have finished.

        Raises:
            Fault: none can go on. What a task raises is raised here, too.
        """
        self._tasks = [_Task(name, code) for name, code in tasks]
        threads = [threading.Thread(target=self._main, args=(task,)) for task in self._tasks]
        for thread in threads:
            thread.start()
        self._pass_on()
        self._done.acquire()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def wait_until(self, ready: Callable[[], bool], reason: Callable[[], str]) -> None:
        """Lets others run until `ready`; `reason` is what a fault says."""
        if ready():
            return
        task: _Task = self._local.task
        task.ready, task.reason = ready, reason
        self._pass_on()
        self._await_turn(task)

    def _main(self, task: _Task) -> None:
        self._local.task = task
        try:
            self._await_turn(task)
            task.code()
        except _Stopped:
            pass  # `run` raises the error of the task that has failed
        except BaseException as error:
            self._error = self._error or error
        task.finished = True
        self._pass_on()

    def _await_turn(self, task: _Task) -> None:
        task.turn.acquire()
        if self._error is not None:
            raise _Stopped

    def _pass_on(self) -> None:
        waiting = [task for task in self._tasks if not task.finished]
        if not waiting:
            self._done.release()
            return
        able = waiting if self._error is not None else [task for task in waiting if task.ready()]
        if not able:
            reasons = "; ".join(f"{task.name} waits for {task.reason()}" for task in waiting)
            self._error = Fault(f"deadlock: {reasons}")
            able = waiting
        self._random.choice(able).turn.release()
