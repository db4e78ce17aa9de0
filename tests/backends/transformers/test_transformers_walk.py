"""The families of transformers' own list: a sample of them every time, all of them where there are minutes to spare."""

from __future__ import annotations

from pathlib import Path

import pytest
import walk
from tiny import families

PAGE = walk.PAGE.read_text()

# Both caches, every way to cut a prompt, and what is odd: sinks, windows, shared keys, latents, an index of keys,
# experts stored one by one, states in a cache, beside one, and in modules, sinusoids that are not stored.
SAMPLE = (
    "bloom",
    "cohere2",
    "deepseek_v3",
    "gemma3n_text",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "marian",
    "olmoe",
    "recurrent_gemma",
    "rwkv",
)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_family_says_what_transformers_says(model_type: str, tmp_path: Path) -> None:
    row = walk.examine(model_type, tmp_path)
    assert row.runs, row
    assert walk.line(row) in PAGE.splitlines()


def test_page_has_every_family_that_transformers_lists() -> None:
    listed = [cells[1].strip(" `") for cells in (line.split("|") for line in PAGE.splitlines()) if len(cells) == 7]
    assert listed[2:] == families()


@pytest.mark.slow
def test_page_is_what_the_walk_finds() -> None:
    rows = list(walk.walk(families()))
    assert [row for row in rows if row.outcome == "wrong"] == []
    running = [row for row in rows if row.runs]
    assert len(running) >= 140
    assert sum(row.has_state for row in running) >= 15
    assert walk.page(rows) == PAGE
