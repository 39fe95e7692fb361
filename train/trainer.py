"""A training run from opened stores to a published crosscoder: resumable, interruptible, and never done twice."""

from __future__ import annotations

import hashlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from extract.errors import BadInput
from extract.metrics_file import Metrics
from extract.publish import publish
from train import divergence
from train.checkpoint import Checkpoints
from train.config import TrainSettings
from train.crosscoder import Crosscoder
from train.data import ActivationPairs, TrainingData, heldout_batches
from train.division import check_ranks
from train.engine import Engine, Recovered
from train.loader import Loader
from train.metrics import Throughput, memory_metrics
from train.mixing import mixing
from train.restarts import note_run_start
from train.ring import reader_watched, source_of
from train.roofline import Roofline
from train.runs import result_settings
from train.stops import EXIT_STOPPED, StopRequest, Turns
from train.stream import BatchStream
from train.tracking import Nowhere, Tracker, manifests_of
from train.world import World

log = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts that `fit` works with; `loader(start, stop, is_stopping)` reads the batches of steps [start, stop), of
    which no more are waited for once `is_stopping()`. The last checkpoint is of `saved_step`, None where there is none.
    """

    settings: TrainSettings
    world: World
    folder: Path
    engine: Engine
    stream: BatchStream
    loader: Callable[[int, int, Callable[[], bool]], Loader]
    validation: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    checkpoints: Checkpoints
    tracker: Tracker | Nowhere
    saved_step: int | None = None
    recovered: Recovered | None = None
    roofline: Callable[[float, int], float] | None = None


def train(settings: TrainSettings, folder: Path) -> Path:
    """Train the crosscoder of `settings` in the run folder `folder`, or continue there; returns where it lies.

    Called on every rank that was launched; what it leaves does not depend on their number. A finished run of these
    settings and data is left as it is. A crosscoder that was deleted or damaged since is published again from the last
    checkpoint, or trained again where none is left. SIGINT, SIGTERM and SIGUSR1, to any rank, finish the step, save a
    checkpoint and exit with EXIT_STOPPED.

    Raises BadInput for a number of ranks that does not divide what it must, stores that do not fit, a folder of other
    settings or data, checkpoints of which none is intact, and when training diverges.
    """
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")  # new names since torch 2.13
    with reader_watched(), World.open(settings.engine, settings.training.device) as world:
        check_ranks(settings, world.everyone.size)
        if world.is_main:
            note_run_start(settings, folder)
        return _train(settings, folder, world)


def _train(settings: TrainSettings, folder: Path, world: World) -> Path:
    crosscoder_folder = folder / "crosscoder"
    with closing(open_data(settings, world)) as data:
        checkpoints = checkpoints_of(settings, folder, data, world)
        if world.from_main(_is_finished(crosscoder_folder, checkpoints) if world.is_main else None):
            log.info("%s is finished", folder)
            return crosscoder_folder
        run = _open_run(settings, folder, data, checkpoints, world)
        with closing(run.tracker):
            finished = fit(run)
            if finished:
                with world.doing("writing the crosscoder"):
                    run.engine.save_crosscoder(crosscoder_folder, {**checkpoints.identity, "weights": data.weights})
            run.tracker.ended(crosscoder_folder if finished else None)
        world.from_main(None)  # however long rank 0 writes and uploads
        if not finished:
            log.info("Stopped after step %d; the same command continues", run.engine.steps_done)
            sys.exit(EXIT_STOPPED)
    return crosscoder_folder


def open_data(settings: TrainSettings, world: World) -> TrainingData:
    """The data, on rank 0 first: what it leaves in files to be found is made once."""
    with world.main_first():
        if settings.data.mode == "stored":
            data: TrainingData = ActivationPairs.open(settings)
        else:
            from train.online import OnlineActivations  # imports what runs language models: seconds

            data = OnlineActivations.open(settings, world.place)
    log.info("%d tokens to train on, %.2f %% of all dropped", data.train_tokens.sum(), 100 * data.share_dropped)
    digest = hashlib.sha256(repr(data.content_sha256).encode())
    for values in (data.activation_mean.numpy(), data.activation_scale.numpy(), data.train_tokens):
        digest.update(values.tobytes())
    if world.from_main(digest.hexdigest()) != digest.hexdigest():
        raise BadInput(
            f"Rank {world.everyone.rank} finds other data than rank 0 in {settings.store}: other files, or other "
            f"tokens kept of them. All ranks must read one store, or the same copy of it."
        )
    return data


def _is_finished(crosscoder_folder: Path, checkpoints: Checkpoints) -> bool:
    """Whether the published crosscoder is there and intact. BadInput for one of other settings or data."""
    if not crosscoder_folder.exists():
        return False
    try:
        trained_with = Crosscoder.load(crosscoder_folder).trained_with
    except BadInput as error:
        log.warning("%s Making it again.", error)
        return False
    if trained_with:
        checkpoints.check(crosscoder_folder, trained_with)
    else:
        checkpoints.check_newest()  # published before crosscoders recorded what they were trained with
    return True


def fit(run: Run) -> bool:
    """Train until the last step, or until a signal asks to stop: whether the run is finished."""
    training, engine, throughput = run.settings.training, run.engine, Throughput(run.roofline)
    num_tokens, num_steps, start = training.num_tokens_per_step, training.num_steps, run.engine.steps_done
    with (
        StopRequest() as request,
        _progress(run) as progress,
        _explained(run),
        run.loader(start, num_steps, lambda: request.requested) as batches,
    ):
        turns = Turns(batches, start, num_steps, request, run.world)
        for x_BMD, token_B, waited in turns:
            done, last = engine.steps_done + 1, engine.steps_done + 1 == num_steps
            logged = due(done, training.log_every) or due(done, training.validate_every) or last
            measured = engine.step(x_BMD, logged, token_B)
            throughput.count(num_tokens, waited)
            progress.update(num_tokens)
            if logged:
                metrics: Metrics = {**measured, **throughput.read(int(measured["train/dead"]))}
                if due(done, training.validate_every) or last:
                    metrics |= _validate(run, metrics, last)
                    throughput.restart()
                    if progress.disable:  # a log file has no bar
                        log.info("step %d of %d: %s", done, num_steps, told(metrics))
                run.tracker.log(done, metrics | memory_metrics(run.world.device))
                progress.set_postfix(loss=f"{measured['train/loss']:.4g}")
            if last or due(done, training.checkpoint_every):
                _save(run)
        finished = engine.steps_done >= num_steps
        if not finished and (engine.steps_done or not turns.failure):
            _save(run)
    run.checkpoints.wait()
    if turns.failure:
        raise turns.failure
    return finished


def _progress(run: Run) -> tqdm[None]:
    num_tokens = run.settings.training.num_tokens_per_step
    return tqdm(
        total=run.settings.training.num_steps * num_tokens,
        initial=run.engine.steps_done * num_tokens,
        unit="tok",
        unit_scale=True,
        disable=None if run.world.is_main else True,
    )


def told(metrics: Metrics) -> str:
    """What a line of a log says of a step: loss, variance explained of held-out tokens by model, speed."""
    start = "val/variance_explained/"
    explained = [f"{name.removeprefix(start)} {v:.4f}" for name, v in metrics.items() if name.startswith(start)]
    shown = f"variance explained {', '.join(explained)}, " if explained else ""
    return f"loss {metrics['train/loss']:.4g}, {shown}{metrics['speed/tokens_per_second']:,.0f} tokens/s"


def _save(run: Run) -> None:
    """Save a checkpoint, unless the last one is of the same step."""
    if run.saved_step == run.engine.steps_done:
        return
    run.tracker.sync()
    run.checkpoints.save(run.engine.state())
    run.saved_step = run.engine.steps_done


def _validate(run: Run, metrics: Metrics, last: bool) -> Metrics:
    """Measures on held-out tokens. An error of one process costs none of the steps done, unless this is the last: with
    that one saved, the run would pass for finished. Among several ranks, no others can save with the one that failed.
    """
    try:
        return run.engine.evaluate(run.validation(), run.recovered)
    except Exception:
        if not last and run.world.everyone.size == 1:
            run.tracker.log(run.engine.steps_done, metrics)
            _save(run)
        raise


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0 = never) happens after `step` of them."""
    return every > 0 and step % every == 0


def checkpoints_of(settings: TrainSettings, folder: Path, data: TrainingData, world: World) -> Checkpoints:
    """The checkpoints of the run in `folder`, with all that decides its result for their identity."""
    identity = {**result_settings(settings), "models": data.models, "data": data.content_sha256}
    keep, keep_every = settings.training.keep_checkpoints, settings.training.keep_every
    return Checkpoints(folder / "checkpoints", keep, identity, world, keep_every)


def _open_run(settings: TrainSettings, folder: Path, data: TrainingData, checkpoints: Checkpoints, world: World) -> Run:
    training, config, everyone = settings.training, settings.data, world.everyone
    recovered = _recovered(settings, data, world)
    engine = Engine(settings, data.models, data.d_model, data.activation_mean, data.activation_scale, world)
    stream = BatchStream(data, settings.seed, training.num_tokens_per_step, config, everyone.rank, everyone.size)
    state = checkpoints.load()
    if state is not None:
        engine.load_state(state)
    else:
        if (folder / "metrics.jsonl").exists() and world.is_main:
            log.warning("Of the earlier run in %s no checkpoint is left: training starts anew", folder)
        log.info("%s", mixing(stream))
        engine.initialise(stream.batch(0), torch.from_numpy(stream.numbers(0)))
    readers, roofline = engine.share.tokens, Roofline.of(settings, data, world)
    return Run(
        settings,
        world,
        folder,
        engine,
        stream,
        lambda start, stop, is_stopping: Loader(
            stream,
            start,
            stop,
            world.device,
            config.num_threads,
            is_stopping,
            source_of(stream, start, stop, config.num_threads, is_stopping),
        ),
        lambda: heldout_batches(
            data, training.num_tokens_per_step, config.max_validation_tokens, readers.rank, readers.size
        ),
        checkpoints,
        _tracker(settings, folder, engine.steps_done, data) if world.is_main else Nowhere(),
        None if state is None else engine.steps_done,
        recovered,
        None if roofline is None else roofline.share,
    )


def _recovered(settings: TrainSettings, data: TrainingData, world: World) -> Recovered | None:
    """What measures loss recovered, with its language models in memory from now on; None unless that is asked for."""
    if not settings.training.recovered_tokens:
        return None
    from train.recovered import LossRecovered  # imports what runs language models: seconds

    with world.main_first():
        loss_recovered = LossRecovered(settings, data, settings.training.recovered_tokens)
    with world.doing("loading the language models of training.recovered_tokens"):
        loss_recovered.load()
    return loss_recovered.measure


def _tracker(settings: TrainSettings, folder: Path, steps_done: int, data: TrainingData) -> Tracker:
    """Where rank 0 writes, beginning with what was composed."""
    publish(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(settings)).encode())
    return Tracker(settings, folder, steps_done, manifests_of(data.models, data.content_sha256))


@contextmanager
def _explained(run: Run) -> Iterator[None]:
    """What to do about a step that was not finite, which all ranks meet together. Whatever else ends the only process,
    the save under way is finished.
    """
    try:
        yield
    except FloatingPointError as error:
        step, training = run.engine.steps_done, run.settings.training
        if run.world.is_main:
            divergence.record(run.folder, run.stream, step, str(error))
        run.checkpoints.wait()
        run.world.from_main(None)  # nobody ends before rank 0 has written
        raise BadInput(
            f"Training diverged at step {step} ({run.stream.describe(step)}): {error} Nothing of this step was kept. "
            f"Lower training.lr={training.lr:g} or lengthen training.warmup_steps={training.warmup_steps}. "
            f"Good checkpoints lie in {run.checkpoints.folder}; {run.folder / divergence.FILE} says where the batch "
            f"comes from."
        ) from error
    except Exception:
        if run.world.everyone.size == 1:
            run.checkpoints.wait()
        raise
