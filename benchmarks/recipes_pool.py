"""The processes of `recipes.py`, one or more for each GPU, and the queue that they take their tasks from."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A GPU, or None for the CPU, and which of the processes on it."""

    gpu: str | None
    number: int


class Worker:
    """A process with one GPU, or the CPU."""

    def __init__(self, place: Place, given: Any, say: Callable[[str], None]) -> None:
        env = {**os.environ, **({} if place.gpu is None else {"CUDA_VISIBLE_DEVICES": place.gpu})}
        command = [sys.executable, str(Path(__file__).with_name("recipes_worker.py")), given.model, given.dtype, given.device]
        self.process = subprocess.Popen(
            command, env=env, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.name, self.say, self.label = f"gpu {place.gpu}" if place.gpu is not None else given.device, say, ""
        self.last: collections.deque[str] = collections.deque(maxlen=40)
        self.reader = threading.Thread(target=self._read_errors, daemon=True)
        self.reader.start()

    def _read_errors(self) -> None:
        for line in self.process.stderr or ():
            self.last.append(line.rstrip()[:300])
            if line.startswith(("distill ", "finetune ")):
                self.say(f"[{self.name}] {self.label}: {line.rstrip()}")

    def ask(self, task: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> bool:
        """Have a task done, every record of it kept; False if the worker is of no use afterwards."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.label = task["label"]
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            for line in self.process.stdout:
                message = json.loads(line)
                keep({**message["record"], **({"done": True} if message["done"] else {})})
                if message["done"]:
                    return "error" not in message["record"]
        except OSError:  # it has died: told below
            pass
        self.process.wait()
        self.reader.join(5)
        keep({"error": f"the worker ended with {self.process.returncode}", "stderr": list(self.last), "done": True})
        return False

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Pool:
    """A worker for each place; each takes the next task until there is none, or no more time."""

    def __init__(self, places: list[Place], given: Any, deadline: float) -> None:
        self.places, self.given, self.deadline = places, given, deadline
        self.lock, self.workers = threading.Lock(), dict[Any, Worker]()

    def start(self) -> None:
        for place in self.places:
            self.workers[place] = Worker(place, self.given, self._say)

    def run(self, tasks: list[dict[str, Any]], keep: Callable[[dict[str, Any], dict[str, Any]], None]) -> int:
        """Returns how many were not begun."""
        queue = collections.deque(sorted(tasks, key=lambda task: -task["cost"]))
        threads = [threading.Thread(target=self._serve, args=(place, queue, keep)) for place in self.places[: len(tasks)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(queue)

    def _serve(self, place: Place, queue: collections.deque[dict[str, Any]], keep: Callable[..., None]) -> None:
        while time.monotonic() < self.deadline:
            with self.lock:
                if not queue:
                    return
                task = queue.popleft()
            worker = self.workers.get(place) or Worker(place, self.given, self._say)
            self.workers[place] = worker
            seed = f", seed {task['seed']}" if task.get("seed") else ""
            self._say(f"[{worker.name}] {task['label']}{seed}: begun")

            def kept(record: dict[str, Any], task: dict[str, Any] = task) -> None:
                with self.lock:
                    keep(task, record)

            if not worker.ask(task, kept):
                worker.close()
                del self.workers[place]

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
