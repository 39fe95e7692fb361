"""What runs beside a command for Weights & Biases: `python -m extract.mirroring JOB MODE`, started by `extract.mirror`.

Every new line of the job's metrics.jsonl is logged under its own step. Standard input has a JSON object a line:
results, then how the command ended; when it ends without that word, the command is gone.
"""

from __future__ import annotations

import csv
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from extract.mirror import FAILED, GRACE_S, HURRY_S, OFFLINE, ONLINE, SERVICE, STOPPED, Job

POLL_S = 0.5  # between looks at metrics.jsonl
MAX_NAME = 128  # characters of an artifact's name
INSPECT_S = 300.0  # for W&B to read a file of its own
NO_STEP = -1
FULL_BYTES = 2**20  # a disk with less room is full: W&B does not say what it could not write
# Whatever ends or stops the command is for the command to hear; this process ends after it.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}

Message = dict[str, Any]
GONE: Message = {"end": {"status": FAILED, "limit_s": HURRY_S}}


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what W&B starts inherits it
    path, mode = Path(sys.argv[1]), sys.argv[2]
    job = Job.read(path)
    try:
        run, last_step = start(job, path) if mode == ONLINE else start_offline(job)
        _mirror(job, run, last_step)
    except Exception as error:  # whatever W&B raises ends this process alone
        say(f"{_first_line(error)}. The command goes on, with metrics.jsonl alone.")
        os._exit(1)  # W&B would wait for its own process


def _listen(messages: queue.SimpleQueue[Message]) -> None:
    for line in sys.stdin:
        messages.put(json.loads(line))
    messages.put(GONE)


def _mirror(job: Job, run: Any, last_step: int) -> None:
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    lines, step = new_lines(job, last_step), last_step
    for message in _with_pauses(job, messages):
        for line in next(lines):
            step = line["step"]
            run.log(values_of(line), step=step, commit=True)
        step += "show" in message
        _tell(job, run, message, step)
        if "end" in message:
            _end(job, run, **message["end"])
            return


def _tell(job: Job, run: Any, message: Message, step: int) -> None:
    """Log results, as `step`. One that W&B does not take costs no other, and the run still ends as it should."""
    try:
        if "show" in message:
            run.log(_shown(**message["show"]), step=step, commit=True)
        if "artifact" in message:
            run.log_artifact(_artifact(job, **message["artifact"]))
    except Exception as error:
        say(f"{_first_line(error)}. This result is not on W&B.")


def _with_pauses(job: Job, messages: queue.SimpleQueue[Message]) -> Iterator[Message]:
    """Messages as they come, and an empty one where none comes for a while; the end where the command is gone, even if
    a process that it left behind keeps our standard input open.
    """
    while True:
        try:
            yield messages.get(timeout=POLL_S)
        except queue.Empty:
            yield {} if os.getppid() == job.pid else GONE


def start(job: Job, path: Path) -> tuple[Any, int]:
    """The online run, and the last step that the server has. Where there can be none, why is said, and this process
    begins anew, offline: what W&B has begun cannot be ended within a certain time.
    """

    def instead(reason: str) -> NoReturn:
        place = f"{job.folder}/wandb/offline-run-*-{job.id}"
        say(f"{reason}. This run is tracked offline. To upload it later: wandb sync {place}")
        environment = {name: value for name, value in os.environ.items() if name != SERVICE}
        os.execve(sys.executable, [sys.executable, "-m", "extract.mirroring", str(path), OFFLINE], environment)

    limit_s = job.config.start_timeout_s + GRACE_S  # W&B keeps the limit itself, as far as it thinks of it
    overdue = threading.Timer(limit_s, instead, [f"It did not start within {limit_s:g} s"])
    overdue.daemon = True
    overdue.start()
    try:
        run = _online(job)
    except Exception as error:  # no login, no network, no such project
        instead(_first_line(error))
    overdue.cancel()
    _supersede(job)
    return run, run.starting_step - 1


def start_offline(job: Job) -> tuple[Any, int]:
    """An offline run, and the last step that those before it have."""
    steps = (_last_step(folder) for folder in reversed(_earlier(job)))
    last_step = next((step for step in steps if step is not None), NO_STEP)
    return _init(job, OFFLINE), last_step


def _online(job: Job) -> Any:
    import wandb

    if not wandb.login(prompt=False, verify=False):  # nobody may be there to answer a prompt
        raise PermissionError("There is no API key: run `wandb login` or set WANDB_API_KEY")
    return _init(job, ONLINE)


def _init(job: Job, mode: str) -> Any:
    import wandb

    Path(job.folder).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=job.config.project,
        entity=job.config.entity,
        group=job.group,
        name=job.name,
        job_type=job.kind,
        id=job.id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]  # one of wandb's
        dir=job.folder,
        config=job.settings,
        settings=wandb.Settings(
            init_timeout=job.config.start_timeout_s,
            console="off",
            disable_git=True,
            disable_code=True,
            x_stats_pid=job.pid,
            stop_fn=lambda: None,
        ),
    )
    run.define_metric("*", step_metric="step")
    for name, best in job.best.items():
        run.define_metric(name, step_metric="step", summary=best)
    return run


def _earlier(job: Job) -> list[Path]:
    """What earlier processes of this run left to be synced, oldest first."""
    folders = sorted(Path(job.folder, "wandb").glob(f"offline-run-*-{job.id}"))
    return [folder for folder in folders if (folder / f"run-{job.id}.wandb").exists()]


def _supersede(job: Job) -> None:
    """Have `wandb sync` pass over what was tracked offline before: an online run is told all of it again."""
    for folder in _earlier(job):
        (folder / f"run-{job.id}.wandb.synced").touch()


def _last_step(folder: Path) -> int | None:
    """The last step in an offline run's file, which a killed process may have left incomplete; None where it has none,
    or W&B itself cannot read it, and so will not upload it.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=INSPECT_S, check=True)
        return json.loads(found.stdout)["summary"].get("_step")
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        say(f"{folder} cannot be read ({_first_line(error)}) and is passed over.")
        return None


def new_lines(job: Job, last_step: int) -> Iterator[list[Message]]:
    """Whenever asked, the lines of the job's file after `last_step` that have become whole since."""
    rest = b""
    if job.metrics is None:
        while True:
            yield []
    with open(job.metrics, "rb") as file:
        while True:
            *whole, rest = (rest + file.read()).split(b"\n")
            lines = [json.loads(line) for line in whole]
            yield [line for line in lines if line["step"] > last_step]


def values_of(line: Message) -> Message:
    """A line as W&B takes it: histograms as its own, numbers that were not finite left out."""
    import wandb

    return {
        name: wandb.Histogram(np_histogram=(value["counts"], value["edges"])) if isinstance(value, dict) else value
        for name, value in line.items()
        if value is not None
    }


def _shown(numbers: Message, tables: dict[str, str], pages: dict[str, str]) -> Message:
    import wandb

    html = {name: wandb.Html(Path(path).read_text(encoding="utf-8"), inject=False) for name, path in pages.items()}
    return {**values_of(numbers), **{name: _table(Path(path)) for name, path in tables.items()}, **html}


def _table(path: Path) -> Any:
    """A CSV file as a table; a column that holds numbers alone is one of numbers."""
    import wandb

    with path.open(encoding="utf-8", newline="") as file:
        heading, *rows = csv.reader(file)
    names: list[str | int] = [*heading]
    columns = [_numbers(column) for column in zip(*rows, strict=True)]
    return wandb.Table(columns=names, data=[list(row) for row in zip(*columns, strict=True)])


def _numbers(column: tuple[str, ...]) -> list[float] | list[str]:
    try:
        return [float(cell) for cell in column]
    except ValueError:
        return list(column)


def _artifact(job: Job, name: str, kind: str, files: dict[str, str]) -> Any:
    """Files as they lie, without copies; large ones by their place alone."""
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:MAX_NAME], kind)
    for inside, path in files.items():
        if Path(path).stat().st_size > job.config.max_artifact_gb * 1e9:
            artifact.add_reference(Path(path).as_uri(), inside, checksum=False)
        else:
            artifact.add_file(path, inside, policy="immutable", skip_cache=True)
    return artifact


def _end(job: Job, run: Any, status: int, limit_s: float) -> None:
    """Finish the run within `limit_s`; where that fails, leave what lies on disk."""
    place = Path(run.dir).parent

    def give_up() -> None:
        time.sleep(limit_s)
        say(f"Not all was uploaded within {limit_s:g} s. To do so later: wandb sync --include-online {place}")
        os._exit(1)

    threading.Thread(target=give_up, daemon=True).start()
    if status == STOPPED:
        run.mark_preempting()
    run.finish(exit_code=status)
    if shutil.disk_usage(place).free < FULL_BYTES:
        say(f"The disk of {place} is full: what lies there may lack the last steps. metrics.jsonl has everything.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def say(text: str) -> None:
    """One line to whoever reads the command's standard error."""
    print(f"W&B: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
