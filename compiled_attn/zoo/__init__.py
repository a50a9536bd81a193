"""The papers, one file each: `names()`, `create("deit", "deit_s")`, `create("deit", "digits_tiny", pretrained=True)`.

A model here is an `nn.Module` that knows no compiler.
"""

from pathlib import Path

from torch import nn

from compiled_attn.ir.errors import CheckpointError, CompiledAttnError
from compiled_attn.zoo import (
    atoken,
    attentive_cnn,
    attnet,
    convit,
    davit,
    deit,
    dhvt,
    dinat,
    dtop,
    efficient_probing,
    evit,
    fan_tap,
    focalnet,
    halonet,
    moat,
    ninformer,
    overlock,
    paraformer_legal,
    pyramid_tnt,
    rmt,
    sasrec,
    sinklora,
    spartan,
    tnt,
    van,
    volo,
    vsa,
)
from compiled_attn.zoo.checkpoint import Report, load_checkpoint
from compiled_attn.zoo.paper import Paper, Published

__all__ = ["PAPERS", "Paper", "Published", "Report", "create", "load_checkpoint", "names"]

PAPERS: dict[str, Paper] = {
    "atoken": atoken.PAPER,
    "attentive_cnn": attentive_cnn.PAPER,
    "attnet": attnet.PAPER,
    "convit": convit.PAPER,
    "davit": davit.PAPER,
    "deit": deit.PAPER,
    "dhvt": dhvt.PAPER,
    "dinat": dinat.PAPER,
    "dtop": dtop.PAPER,
    "efficient_probing": efficient_probing.PAPER,
    "evit": evit.PAPER,
    "fan_tap": fan_tap.PAPER,
    "focalnet": focalnet.PAPER,
    "halonet": halonet.PAPER,
    "moat": moat.PAPER,
    "ninformer": ninformer.PAPER,
    "overlock": overlock.PAPER,
    "paraformer_legal": paraformer_legal.PAPER,
    "pyramid_tnt": pyramid_tnt.PAPER,
    "rmt": rmt.PAPER,
    "sasrec": sasrec.PAPER,
    "sinklora": sinklora.PAPER,
    "spartan": spartan.PAPER,
    "tnt": tnt.PAPER,
    "van": van.PAPER,
    "volo": volo.PAPER,
    "vsa": vsa.PAPER,
}

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> dict[str, tuple[str, ...]]:
    """Every paper with its variants."""
    return {name: tuple(paper.variants) for name, paper in PAPERS.items()}


def create(paper: str, variant: str, *, pretrained: bool = False) -> nn.Module:
    """The network of one variant, in eval mode, with random weights or, `pretrained`, those that this package carries.

    Raises CompiledAttnError for an unknown paper or variant, CheckpointError where the package carries no weights.
    """
    _known("paper", paper, PAPERS, "zoo.create")
    record = PAPERS[paper]
    _known("variant", variant, record.variants, f"zoo.create({paper!r}, ...)")
    if pretrained and variant not in record.weights:
        raise CheckpointError(
            f"this package carries no weights for {variant!r}",
            where=f"zoo.create({paper!r}, {variant!r}, pretrained=True)",
            facts=f"of {paper!r} it carries weights for {', '.join(record.weights) or 'no variant'} only",
            do="create it without pretrained, then zoo.load_checkpoint(model, path) with the authors' file",
        )
    model = record.model(record.variants[variant]).eval()
    if pretrained:
        load_checkpoint(model, _WEIGHTS / record.weights[variant])
    return model


def _known(kind: str, name: str, have: object, where: str) -> None:
    if name not in have:  # type: ignore[operator]
        raise CompiledAttnError(
            f"no {kind} of that name",
            where=where,
            facts=f"asked for {name!r}, there are {', '.join(have)}",  # type: ignore[call-overload]
            do="zoo.names() lists every paper with its variants",
        )
