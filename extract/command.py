"""How every command starts: Hydra composes the settings over a dataclass, they are checked, and errors are one line.

`run(Settings, function)` is the whole main of a command. Before Hydra sees the command line, names are checked against
the dataclass (Hydra would name the mistake, not the nearest valid setting) and two shorthands are expanded.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import itertools
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.errors import CompactHydraException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from extract.config import ExtractSettings, ModelConfig, SourceConfig
from extract.errors import BadInput
from extract.interrupts import one_line_interrupts

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# What a disk or a path can refuse: these are the user's to mend, any other OSError is a defect and keeps its traceback.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
MULTIRUN = ("-m", "--multirun")
EXIT_BAD_INPUT = 2
# Where a section of a later stage belongs, for the error that a command further up gives.
OWNERS = {
    "crosscoder": "python -m train",
    "training": "python -m train",
    "data": "python -m train",
    "engine": "python -m train",
    "sweep": "python -m train",
    "analysis": "python -m analysis",
}
# What the settings that hold several of a kind hold, as a command line names one of them.
ENTRIES = {"models.NAME": ModelConfig, "corpus.sources.NUMBER": SourceConfig}

Settings = TypeVar("Settings", bound=ExtractSettings)


def run(
    settings_class: type[Settings],
    function: Callable[[Settings], object],
    speaks: Callable[[Exception], bool] = lambda error: True,
    launcher: str | None = None,
) -> None:
    """Compose the settings from the command line, check them, call `function` with them.

    A sweep's members are started by Hydra's launcher `launcher`, unless the command line names one. What `function`
    returns is what Hydra's sweepers compare members by.

    Exits with 2 and one line on standard error for input that a user can mend (BadInput, no space left), with 130 and
    one line when interrupted, with Hydra's status else. Of several processes with one command line, that which `speaks`
    says what is wrong with it.
    """
    with one_line_interrupts():
        _run(settings_class, function, speaks, launcher)


def _run(
    settings_class: type[Settings],
    function: Callable[[Settings], object],
    speaks: Callable[[Exception], bool],
    launcher: str | None,
) -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(settings_class))
        sys.exit()
    ConfigStore.instance().store(name="schema", node=settings_class)
    try:
        sys.argv[1:] = check_overrides(settings_class, _of_sweep(sys.argv[1:], launcher))
        if all(argument in MULTIRUN for argument in sys.argv[1:] if argument.startswith("-")):
            for overrides in _members(sys.argv[1:]):  # the same compositions as below, for errors of one line
                compose(settings_class, overrides)
    except BadInput as error:
        sys.exit(_report(error) if speaks(error) else EXIT_BAD_INPUT)

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def entry(config: DictConfig) -> object:
        try:
            return function(_to_settings(settings_class, config, list(HydraConfig.get().overrides.task)))
        except (BadInput, OSError) as error:
            if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
                raise
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise CompactHydraException(f"error: {error}") from error  # the launcher records which member failed
            sys.exit(_report(error))

    entry()


def _of_sweep(arguments: list[str], launcher: str | None) -> list[str]:
    """The command line of a sweep with a launcher, and its flag first: Hydra takes none between settings. Any other
    command line as it is.
    """
    settings = [argument for argument in arguments if argument not in MULTIRUN]
    if settings == arguments:
        return arguments
    chosen = launcher is None or any(argument.startswith("hydra/launcher=") for argument in settings)
    return [MULTIRUN[0], *settings, *([] if chosen else [f"hydra/launcher={launcher}"])]


def _members(arguments: list[str]) -> list[list[str]]:
    """The command lines of a sweep's members, of which there is one where nothing is swept. Of an interval, which a
    search draws from, the ends stand for all.
    """
    if not set(MULTIRUN) & set(arguments):
        return [arguments]
    try:
        parsed = OverridesParser.create().parse_overrides([each for each in arguments if each not in MULTIRUN])
    except HydraException as error:
        raise BadInput(_one_line(error)) from error
    if "hydra/sweeper=search" in arguments and find_spec("optuna") is None:
        raise BadInput("hydra/sweeper=search needs Optuna: pip install -e '.[sweep]'.")
    searched = [str(o.input_line) for o in parsed if isinstance(o.value(), IntervalSweep)]
    if searched and not any(argument.startswith("hydra/sweeper=") for argument in arguments):
        raise BadInput(f"{searched[0]} is drawn from by a search. Add hydra/sweeper=search, or list values: a,b,c.")
    return [list(member) for member in itertools.product(*map(_choices, parsed))]


def _choices(override: Override) -> list[str]:
    """The settings that an override stands for."""
    swept = override.value()
    if isinstance(swept, IntervalSweep):
        values: Iterable[object] = [swept.start, swept.end]
    elif override.is_sweep_override():
        values = override.sweep_string_iterator()
    else:
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in values]


def help_text(settings_class: type[ExtractSettings]) -> str:
    """What the running command does, the experiments, and its settings with their defaults."""
    about = (sys.modules["__main__"].__doc__ or "").strip()
    defaults = OmegaConf.to_container(OmegaConf.structured(settings_class))
    later = [name for name, kind in typing.get_type_hints(settings_class).items() if kind is Any]
    names = [name for name in setting_names(settings_class) if name not in (*later, "composed_from")]
    lines = [f"  {name}={_default(defaults, name)}" for name in names]
    for name, entry in ENTRIES.items():
        values = OmegaConf.to_container(OmegaConf.structured(entry))
        lines += ["", *(f"  {name}.{field}={_default(values, field)}" for field in setting_names(entry))]
    note = "Settings are key=value. What each means is the comment above it in its dataclass (config.py of a package)."
    return "\n".join([about, "", f"experiment=NAME, one of: {', '.join(_experiments())}", "", note, "", *lines])


def _default(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return "null" if values is None else values


def compose(settings_class: type[Settings], overrides: list[str], check: bool = True) -> Settings:
    """The settings that the command line `overrides` gives, with their cross-checks unless `check` is False."""
    ConfigStore.instance().store(name="schema", node=settings_class)
    overrides = check_overrides(settings_class, overrides)
    if not any(override.startswith("experiment=") for override in overrides):
        raise BadInput(f"No experiment is selected. Add experiment=NAME, one of: {', '.join(_experiments())}.")
    running = GlobalHydra.instance().is_initialized()  # inside a command Hydra knows the folder already
    with nullcontext() if running else hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        try:
            config = hydra.compose("config", overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise BadInput(_one_line(error)) from error
    return _to_settings(settings_class, config, overrides, check)


def experiment_of(settings: Settings) -> Settings:
    """What the experiment says without the rest of the command line: the reference for what a run differs in. Not
    checked.
    """
    chosen = [override for override in settings.composed_from if override.startswith("experiment=")]
    reference = compose(type(settings), chosen, check=False)
    reference.pair = settings.pair
    return reference


def pairs_of(settings: Settings) -> list[Settings]:
    """One composition per selected pair: the study's own command line with `experiment=STUDY/PAIR` where such a file
    exists.
    """
    if settings.pair is not None:
        return [settings]
    found = []
    for pair in settings.pairs:
        own = CONFIGS / "experiment" / settings.study / f"{pair}.yaml"
        overrides = [o for o in settings.composed_from if not own.exists() or not o.startswith("experiment=")]
        choice = [f"experiment={settings.study}/{pair}"] if own.exists() else [f"pair={pair}"]
        found.append(compose(type(settings), [*choice, *overrides]))
    return found


def _to_settings(
    settings_class: type[Settings], config: DictConfig, overrides: list[str], check: bool = True
) -> Settings:
    """Resolve interpolations, turn the configuration into the dataclass, and run its cross-checks."""
    config = OmegaConf.create(config)
    try:
        OmegaConf.resolve(config)
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise BadInput(_one_line(error)) from error
    assert isinstance(settings, settings_class)
    settings.composed_from = overrides
    if check:
        settings.check()
    return settings


def _one_line(error: BaseException) -> str:
    """Hydra's message with its cause: the message names the setting, the cause says what is wrong with the value. Where
    a group of settings has no such choice, those that there are follow.
    """
    parts = [error, error.__cause__] if error.__cause__ else [error]
    text = " ".join(str(part).strip().splitlines()[0].rstrip(".") + "." for part in parts)
    options = error.options if isinstance(error, MissingConfigException) else None
    return f"{text} There are: {', '.join(options)}." if options else text


def check_overrides(settings_class: type[ExtractSettings], arguments: list[str]) -> list[str]:
    """Expand the shorthands of a command line and refuse names that the command does not have.

    `models.NAME=ID` becomes `models.NAME.id=ID`; `corpus=PATH` becomes `corpus.sources=[{path: PATH}]` unless it names
    a file of `configs/corpus/`.
    """
    return [argument if _is_hydras(argument) else _check(settings_class, argument) for argument in arguments]


def _is_hydras(argument: str) -> bool:
    return argument.startswith("-") or "=" not in argument or argument.lstrip("+~").startswith(("hydra.", "hydra/"))


def _check(settings_class: type[ExtractSettings], argument: str) -> str:
    name, _, value = argument.partition("=")
    name = name.strip()
    plain = name.lstrip("+~").split("@")[0]
    if plain == "experiment":
        _check_experiment(value)
    if plain == "experiment" or (CONFIGS / plain / f"{value}.yaml").exists():
        return argument
    if plain == "corpus":
        return f"corpus.sources=[{{path: {QuotedString(value, Quote.single).with_quotes()}}}]"
    section = plain.split(".")[0]
    if section in OWNERS and typing.get_type_hints(settings_class)[section] is Any:
        raise BadInput(
            f"{plain} is a setting of `{OWNERS[section]}`; this command does not read it. Leave it out here."
        )
    return f"{name}.id={value}" if _field_type(settings_class, plain) is ModelConfig else argument


def _check_experiment(value: str) -> None:
    """Every member of a comma-separated choice must be a file of configs/experiment."""
    known = _experiments()
    for choice in value.split(","):
        if choice not in known:
            nearest = difflib.get_close_matches(choice, known, n=1)
            hint = f"Did you mean {nearest[0]}? " if nearest else ""
            raise BadInput(f"experiment={choice} does not exist. {hint}Known: {', '.join(known)}.")


def _experiments() -> list[str]:
    folder = CONFIGS / "experiment"
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _field_type(settings_class: type, name: str) -> Any:
    """Type of the setting `name`; BadInput with the nearest valid name if there is none."""
    kind: Any = settings_class
    path: list[str] = []
    for part in name.split("."):
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            if part not in hints:
                raise BadInput(_unknown(settings_class, name, [".".join([*path, field]) for field in hints]))
            kind = _without_none(hints[part])
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
        elif kind is not Any:
            raise BadInput(f"{name} is not a setting: {'.'.join(path)} is a single value.")
        path.append(part)
    return kind


def _without_none(kind: Any) -> Any:
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    return members[0] if type(None) in typing.get_args(kind) else kind


def _unknown(settings_class: type, name: str, siblings: list[str]) -> str:
    nearest = difflib.get_close_matches(name, [*siblings, *setting_names(settings_class)], n=1)
    hint = f"Did you mean {nearest[0]}?" if nearest else f"Valid here: {', '.join(siblings)}."
    return f"{name} is not a setting. {hint}"


def setting_names(settings_class: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a dataclass, entries of dictionaries and lists left out."""
    for name, hint in typing.get_type_hints(settings_class).items():
        kind = _without_none(hint)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from setting_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _report(error: Exception) -> int:
    if isinstance(error, OSError):
        print(
            f"error: {error.strerror}: {error.filename}. Mend that and run the command again: it continues.",
            file=sys.stderr,
        )
    else:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_BAD_INPUT
