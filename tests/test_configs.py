"""Every experiment composes, the set of settings is known, every setting is read, and mistakes are named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from analysis.config import AnalysisSettings
from extract.command import CONFIGS, check_overrides, compose, experiment_of, help_text, pairs_of, setting_names
from extract.config import ExtractSettings
from extract.errors import BadInput
from train.config import TrainSettings

ROOT = Path(__file__).parent.parent
PACKAGES = ("extract", "train", "analysis")
FOLDER = CONFIGS / "experiment"
EXPERIMENTS = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))
OWN_MODELS = ["models.base=a/b", "models.tuned=c/d", "corpus=some.jsonl"]


@pytest.mark.parametrize("settings_class", [ExtractSettings, TrainSettings, AnalysisSettings])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_for_every_stage(experiment: str, settings_class: type):
    own = OWN_MODELS if experiment == "pair" else []
    settings = compose(settings_class, [f"experiment={experiment}", *own])
    study, _, pair = experiment.partition("/")
    assert settings.study == study and Path(settings.store) == Path("outputs") / study / "store"
    assert settings.pair == (pair or ("base_tuned" if study == "pair" else None))


def test_the_papers_settings():
    """Section 1 of arXiv 2509.18792: Gemma-2-9b after block 20, 114,688 latents, k = 100, 200M tokens, lr 1e-4."""
    settings = compose(TrainSettings, ["experiment=gemma2_9b/pt_simpo"])
    assert (settings.crosscoder.num_latents, settings.crosscoder.k) == (114_688, 100) and 114_688 == 32 * 3584
    assert (settings.training.num_tokens, settings.training.lr) == (200_000_000, 1e-4)
    assert (settings.training.num_tokens_per_step, settings.training.warmup_steps) == (2048, 1000)
    assert settings.hookpoint == "block20" and settings.corpus.context_length == 1024
    assert [source.share for source in settings.corpus.sources] == [0.5, 0.5]
    assert settings.pairs == {
        "pt_it": ["pt", "it"],
        "pt_simpo": ["pt", "simpo"],
        "it_simpo": ["it", "simpo"],
        "pt_dpo": ["pt", "dpo"],
    }
    assert settings.crosscoder.auxk_alpha == 1 / 32 and settings.crosscoder.dead_after_tokens == 10_000_000


def test_every_file_of_every_group_is_part_of_an_experiment_or_an_alternative_to_the_default():
    """Of groups that config.yaml chooses from for everybody, such as engine, command lines choose another option."""
    chosen = [CONFIGS / "config.yaml", *FOLDER.rglob("*.yaml")]
    defaults = [OmegaConf.to_container(OmegaConf.load(path)).get("defaults", []) for path in chosen]
    used = {(key.split("/")[-1].split("@")[0], name) for entries in defaults for key, name in _choices(entries)}
    groups = [path for path in CONFIGS.glob("*/*.yaml") if path.parent != FOLDER]
    options = {(path.parent.name, path.stem) for path in groups}
    start = OmegaConf.to_container(OmegaConf.load(CONFIGS / "config.yaml"))["defaults"]
    chosen_for_all = {key for entry in start if isinstance(entry, dict) for key, name in entry.items() if name}
    alternatives = {(group, name) for group, name in options if group in chosen_for_all}
    for group, name in alternatives:
        compose(TrainSettings, ["experiment=demo", f"{group}={name}"])
    assert groups and {("engine", "single"), ("data", "online")} <= alternatives and options - alternatives <= used


def _choices(defaults: list) -> list[tuple[str, str]]:
    """(group, option) of the entries of a defaults list; `override /corpus: x` chooses from the group corpus."""
    return [(str(key), str(entry[key])) for entry in defaults if not isinstance(entry, str) for key in entry]


def test_every_setting_is_read_where_work_is_done():
    """A setting that no code reads is a promise that nobody keeps; a check in its own config.py is not reading it."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".j2")]
    code = "\n".join(path.read_text() for path in files if path.name != "config.py")
    derived = {"training.num_tokens"}  # read through TrainingConfig.num_steps
    for name in set(setting_names(AnalysisSettings)) - derived:
        assert re.search(rf"\.{name.split('.')[-1]}\b", code), f"{name} is declared but never read"


def test_every_field_is_documented():
    """The line above a field is its comment (a section's field is documented by the docstring of its class)."""
    for file in (path for package in PACKAGES for path in (ROOT / package).rglob("config.py")):
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines):
            field = re.match(r"    (\w+): ([\w.\[\], |]+) = ", line)
            if field and not field[2].endswith("Config") and lines[number - 1].strip() and "sources" not in line:
                commented = lines[number - 1].strip().startswith("#")
                assert commented or "Any = None" in line, f"{file.name}, line {number + 1}: {line.strip()}"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("crosscoder.num_latent=3", "Did you mean crosscoder.num_latents?"),
        ("hookpiont=block1", "Did you mean hookpoint?"),
        ("trainig.lr=1", "Did you mean training.lr?"),
        ("crosscoder.k=many", "'many' of type 'str' could not be converted to Integer"),
        ("crosscoder.k=5000", "k=5000"),
        ("models.simpo.adpter=x", "Did you mean models.simpo.adapter?"),
        ("pairs.base_simpo=[base,instruct]", "must name two or more different models"),
        ("hookpoint=20", "block"),
        ("experiment=demos", "Did you mean demo?"),
        ("engine=fsp", "There are: deepspeed, fsdp, latent, single."),
    ],
)
def test_mistakes_name_the_nearest_valid_setting(argument: str, message: str):
    experiment = [] if argument.startswith("experiment") else ["experiment=demo/base_simpo"]
    with pytest.raises(BadInput, match=re.escape(message)):
        compose(TrainSettings, [*experiment, argument])


def test_every_member_of_a_sweep_is_checked_before_the_first_runs(tmp_path: Path):
    command = [sys.executable, "-m", "train", "-m", "experiment=demo/base_simpo", f"outputs={tmp_path}"]
    done = subprocess.run([*command, "crosscoder.k=24,5000"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: crosscoder.k=5000 exceeds") and done.stderr.count("\n") == 1


def test_a_section_of_a_later_stage_names_its_command():
    with pytest.raises(BadInput, match="crosscoder.k is a setting of `python -m train`"):
        compose(ExtractSettings, ["experiment=demo", "crosscoder.k=5"])


def test_help_lists_the_fields_of_a_model_and_of_a_source():
    lines = help_text(TrainSettings).splitlines()
    for expected in ("corpus.context_length=1024", "models.NAME.dtype=bfloat16", "corpus.sources.NUMBER.split=train"):
        assert lines.count(f"  {expected}") == 1
    settings = compose(ExtractSettings, ["experiment=gemma2_9b", "corpus.sources.1.share=2"])
    assert [source.share for source in settings.corpus.sources] == [0.5, 2]


def test_no_experiment_lists_them():
    with pytest.raises(BadInput, match="experiment=NAME, one of: demo, demo/base_dpo"):
        compose(ExtractSettings, [])


def test_shorthands():
    assert check_overrides(ExtractSettings, ["models.base=x/y", "corpus=dir/a.jsonl", "corpus=fineweb_lmsys"]) == [
        "models.base.id=x/y",
        "corpus.sources=[{path: 'dir/a.jsonl'}]",
        "corpus=fineweb_lmsys",
    ]


def test_one_setting_moves_everything_and_one_the_store():
    settings = compose(ExtractSettings, ["experiment=demo", "outputs=/a", "store=/b"])
    assert settings.tokens_folder == Path("/b/tokens") and settings.models["base"].id == "/a/base_model"


def test_pairs_keep_the_command_line_and_the_experiment_is_its_reference():
    settings = compose(TrainSettings, ["experiment=demo", "crosscoder.k=7"])
    assert [(s.pair, s.crosscoder.k) for s in pairs_of(settings)] == [
        ("base_simpo", 7),
        ("base_dpo", 7),
        ("simpo_dpo", 7),
    ]
    plain = compose(TrainSettings, ["experiment=demo"])
    assert plain.crosscoder.k != 7 and experiment_of(pairs_of(settings)[0]).crosscoder.k == plain.crosscoder.k
