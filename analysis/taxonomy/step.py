"""Taxonomies of what latents respond to, and the step that puts every description into a category."""

from collections import Counter
from pathlib import Path

import yaml

from analysis.annotate.annotations import read_annotations
from analysis.config import AnalysisConfig, AnalysisSettings
from analysis.taxonomy.categories import CATEGORIES, OTHER, Category, read_categories, write_categories
from analysis.taxonomy.embedding import place
from extract.errors import BadInput

# Names of latents that fit no category.
RESERVED = (OTHER, "unclassified")
DEFAULT = Path(__file__).with_name("taxonomy.yaml")


def load_taxonomy(path: Path = DEFAULT) -> list[Category]:
    """Categories of a YAML file {class: {category: description}}; BadInput for what is no such file, for duplicates and
    for empty parts.
    """
    if not path.is_file():
        raise BadInput(
            f"analysis.taxonomy.path ({path}) is not a file. Give a YAML file of classes, categories and descriptions."
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise BadInput(f"analysis.taxonomy.path ({path}) is no YAML file in UTF-8: {problem}. Correct it.") from error
    if not isinstance(content, dict) or not content:
        raise BadInput(f"{path} holds no classes. Write `class: {{category: description}}`.")
    categories = []
    for group, members in content.items():
        if not isinstance(members, dict) or not members:
            raise BadInput(
                f"{path}: class {group!r} holds no categories. Write `category: description` below it, or remove it."
            )
        categories += [Category(name, group, str(text or "").strip()) for name, text in members.items()]
    _check_names(categories, path)
    return categories


def _check_names(categories: list[Category], path: Path) -> None:
    for name, count in Counter(category.name.casefold() for category in categories).items():
        if count > 1:
            raise BadInput(
                f"{path}: category {name!r} is named {count} times. A latent has one category: rename or remove one."
            )
    for category in categories:
        if not category.description:
            raise BadInput(
                f"{path}: category {category.name!r} has no description, and latents are compared with descriptions."
            )
        if category.name.lower() in RESERVED:
            raise BadInput(
                f"{path}: {category.name!r} is reserved for latents that fit no category. Choose another name."
            )


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; here they are an error, and so is a key that is no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                name, line = str(key.value)[:80], key.start_mark.line + 1
                raise BadInput(f"taxonomy: the name {name!r} in line {line} is no text for YAML. Quote it.")
        keys = [key.value for key, _ in node.value]
        repeated = [key for key, count in Counter(keys).items() if count > 1]
        if repeated:
            raise BadInput(f"taxonomy: {repeated[0]!r} is named twice{node.start_mark}. Remove one.")
        return super().construct_mapping(node, deep)


def placer_of(config: AnalysisConfig) -> str:
    """What finds categories: "embedding" or "llm"; by default, what goes with the annotator."""
    return config.taxonomy.placer or ("llm" if config.annotate.annotator == "llm" else "embedding")


def categorise(settings: AnalysisSettings, folder: Path) -> None:
    """One category per described vote -> `categories.csv`; classes of each model -> `classes.csv`."""
    config = settings.analysis.taxonomy
    categories = load_taxonomy(Path(config.path or DEFAULT))
    annotations = read_annotations(folder, votes=True)
    if placer_of(settings.analysis) == "llm":
        from analysis.taxonomy.placing import place_by_llm  # loads a client that takes a second

        placed = place_by_llm(settings, folder.name, annotations, categories)
    else:
        placed = place(annotations, categories, config)
    write_categories(folder, placed, [*dict.fromkeys(category.group for category in categories), OTHER])


def has_failed_places(folder: Path) -> bool:
    """Whether there are questions that no response came to, which another run asks again."""
    return (folder / CATEGORIES).exists() and any(
        row.outcome == "failed" for row in read_categories(folder, votes=True)
    )
