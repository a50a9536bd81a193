"""Trains the small byte-level language model that eviction is measured on: python -m bench.train_text

Text: the source files of the Python standard library of the running interpreter, which every machine has; every tenth
file, in the order of names, is held out. Tokens are bytes. The model is transformers' LlamaForCausalLM, 0.8 million
parameters; weights are written in float16 (1.5 MB). Those in bench/weights (Python 3.11, 500 steps, 2 million bytes
read) took 276 s of processor time on one core of an AMD EPYC, 42 minutes by the clock of a busy machine; the last
batch was at 1.82 nats a byte. A model that learned for longer would tell policies further apart.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

WEIGHTS = Path(__file__).parent / "weights" / "text_bytes.safetensors"
SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LENGTH, BATCH = 512, 8


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to learn from and bytes held out, int64."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in folder.rglob("*.py") if not {"test", "tests", "site-packages", "idlelib"} & set(p.parts))
    learned, held = [], []
    for number, path in enumerate(files):
        (held if number % 10 == 9 else learned).append(path.read_bytes())
    return as_tokens(b"\n".join(learned)), as_tokens(b"\n".join(held))


def as_tokens(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def model() -> Any:
    """The untrained model."""
    import tests.torchvision_shim  # noqa: F401

    from transformers import LlamaConfig, LlamaForCausalLM  # isort: skip

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def trained(path: Path = WEIGHTS) -> Any:
    """The trained model, in float32 and inference mode."""
    from safetensors.torch import load_file

    found = model()
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    missing = found.load_state_dict(weights, strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{path} lacks {missing}")
    found.tie_weights()
    return found.eval().requires_grad_(False)


def rate(step: int, steps: int, highest: float) -> float:
    """Rises over the first twentieth, then falls along a cosine to a tenth."""
    warm = max(steps // 20, 1)
    share = (step - warm) / max(steps - warm, 1)
    return highest * (step + 1) / warm if step < warm else highest * (0.55 + 0.45 * math.cos(math.pi * share))


def train(steps: int, path: Path, highest: float = 4e-3, seed: int = 0) -> None:
    """Writes the weights of the trained model."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    learned, held = corpus()
    net = model().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=highest, betas=(0.9, 0.95), weight_decay=0.1)
    random = torch.Generator().manual_seed(seed)
    print(f"{learned.numel() / 1e6:.1f} MB to learn from, {held.numel() / 1e6:.1f} MB held out", flush=True)
    began = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, highest)
        at = torch.randint(0, learned.numel() - LENGTH, (BATCH,), generator=random)
        tokens = torch.stack([learned[i : i + LENGTH] for i in at.tolist()])
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24 or step == steps - 1:
            seconds = time.process_time() - began
            print(
                f"step {step + 1:5d}  loss {loss.item():.3f} nats a byte  {seconds:6.0f} s of the processor", flush=True
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {n: t.detach().half().contiguous() for n, t in net.state_dict().items() if n != "lm_head.weight"}
            save_file(kept, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--path", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    train(options.steps, options.path)


if __name__ == "__main__":
    main()
