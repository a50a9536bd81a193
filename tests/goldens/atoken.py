"""Runs a golden case of AToken: images and videos of different sizes in one batch, or voxels."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.atoken import AToken, Config, Tower, pack, voxels


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Places, latents, features of images and tokens, codes where there are any, and the decoded pixels."""
    given = case["config"]
    codes = given.get("use_quantizer", False)
    model = AToken(
        Config(
            encoder=tower(given, "encoder"),
            decoder=tower(given, "decoder"),
            patch=tuple(given["patch_size"]),
            channels=given["in_channels"],
            latent=given["latent_channels"],
            codebook=given.get("quantizer_codebook_size", 65536) if codes else 0,
            codebooks=given.get("quantizer_num_codebooks", 1),
        )
    ).eval()
    zoo.load_checkpoint(model, weights)
    place = next((value for name, value in inputs.items() if "coord" in name), None)
    if place is None:
        tokens = pack(list(inputs.values()), model.config.patch)
    else:
        features = next(value for name, value in inputs.items() if "coord" not in name)
        tokens = voxels(features, place[:, -3:], model.config.channels)
    z, image, features = model.encode(tokens)
    latent = model.latent(z)
    outputs = {"coords": tokens.place, "z": z, "image_feat": image, "tokens": features, "latent": latent}
    if model.quantizer is not None:
        quantized, ids = model.quantizer(z.chunk(2, dim=1)[0])
        outputs |= {"codes": quantized, "quantized": quantized, "indices": ids}
    return outputs | {"rec": model.decode(latent, tokens)}


def tower(given: Mapping[str, Any], name: str) -> Tower:
    return Tower(
        width=given[f"{name}_model_channels"],
        depth=given[f"{name}_num_blocks"],
        heads=given.get(f"{name}_num_heads") or given[f"{name}_model_channels"] // 64,
        hidden=int(given[f"{name}_mlp_channels"]),
        qk_norm=given.get(f"{name}_qk_rms_norm", True),
        bias=given.get(f"{name}_use_bias", False),
        rms=given.get(f"{name}_use_rms_norm", True),
    )
