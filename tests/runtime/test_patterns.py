"""Pictures of local attention's patterns."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from compiled_attn import ops
from compiled_attn.ir.errors import OpError
from compiled_attn.runtime.cli import main
from compiled_attn.runtime.patterns import pattern_picture


def test_a_dilated_neighborhood_is_drawn_around_its_query():
    drawn = pattern_picture((7, 9), (3, 4), window=[3, 3], dilation=[2, 3])
    assert drawn.splitlines() == [
        "· · · · · · · · ·",
        "· # · · # · · # ·",
        "· · · · · · · · ·",
        "· # · · Q · · # ·",
        "· · · · · · · · ·",
        "· # · · # · · # ·",
        "· · · · · · · · ·",
        "",
        "query 3 4 sees 9 keys",
    ]


def test_a_sequence_is_drawn_for_every_query():
    drawn = pattern_picture((5,), window=[2], causal=[True], sinks=1, border="mask")
    assert drawn.splitlines() == ["Q · · · ·", "# Q · · ·", "# # Q · ·", "# · # Q ·", "# · · # Q"]


def test_zeros_beyond_the_border_are_counted():
    assert pattern_picture((4, 4), (0, 0), window=[4, 4], stride=[2, 2], border="zero").endswith(
        "query 0 0 sees 9 keys, and 7 of zeros beyond the border"
    )


PATTERNS = {
    "neighborhood": {"window": [3, 3]},
    "shifted windows": {"window": [4, 4], "stride": [4, 4], "shift": [2, 2], "border": "mask"},
    "dilated": {"window": [5, 3], "dilation": [1, 2]},
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_the_picture_marks_the_keys_whose_values_reach_the_query(options):
    size, place = (6, 7), (4, 1)
    v = torch.eye(42).view(1, 6, 7, 1, 42)
    q = torch.zeros(1, 6, 7, 1, 4)
    out = ops.local_attention.reference(q, q, v, scale=1.0, **options)[0, 4, 1, 0].view(6, 7)
    rows = pattern_picture(size, place, **options).splitlines()[:6]
    assert [[mark != "·" for mark in row.split()] for row in rows] == (out > 0).tolist()


def test_the_command_line_draws_and_names_what_clashes():
    drawn = CliRunner().invoke(main, ["show", "local_attention", "--window", "7", "--dilation", "2"])
    assert drawn.exit_code == 0 and drawn.output.endswith("query 7 7 sees 49 keys\n")
    clash = CliRunner().invoke(main, ["show", "local_attention", "--window", "3", "--stride", "4"])
    assert clash.exit_code == 1 and "window 3 is shorter than stride 4" in clash.output
    assert CliRunner().invoke(main, ["show", "local_attention"]).exit_code == 2
    with pytest.raises(OpError, match="no place of the map"):
        pattern_picture((4, 4), (4, 0), window=[3, 3])
