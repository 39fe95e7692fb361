"""System prompts: the files in `prompts/`, filled in. They are part of a question's id, so a changed one asks anew."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jinja2

PROMPTS = Path(__file__).with_name("prompts")


def system_prompt(name: str, values: dict[str, Any]) -> str:
    """`prompts/<name>.md` with its placeholders filled in; an unknown placeholder is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PROMPTS), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(f"{name}.md").render(values)


def hash_of(name: str) -> str:
    """sha256 of a prompt's file, by which a step's record tells that it changed."""
    return hashlib.sha256((PROMPTS / f"{name}.md").read_bytes()).hexdigest()


def object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with these properties, all of them required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
