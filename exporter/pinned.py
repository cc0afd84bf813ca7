"""chosen.toml: what --budget chose, as a recipe that makes the same again without measuring."""

import json
from pathlib import Path

from exporter.options import describe_value
from exporter.recipe import Recipe

CHOSEN = "chosen.toml"


def write_chosen(folder: Path, recipe: Recipe) -> None:
    """Write the passes and the rule of every layer; nothing without a budget."""
    if recipe.budget is None:
        return
    lines = [f"# chosen by --budget {json.dumps(recipe.budget)}", f"passes = {json.dumps(recipe.passes)}"]
    for rule in recipe.layers:
        lines += ["", "[[layers]]", f"match = {json.dumps(rule.match)}", *(["skip = true"] if rule.skip else [])]
        lines += [f"{key} = {_value(value)}" for key, value in rule.options.items()]
    (folder / CHOSEN).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _value(value: object) -> str:
    """As TOML writes it."""
    return json.dumps(value) if isinstance(value, str) else describe_value(value)
