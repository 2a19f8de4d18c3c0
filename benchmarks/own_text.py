"""Text that a model writes itself, sampled from its opening token: where its own kind of text is hard to come by.

python -m benchmarks.own_text MODEL OUT --sequences 512 --seed 7
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from quantize.calibration import sample
from quantize.evaluate import load_any


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer = load_any(arguments.model, torch.device("cpu"))
    torch.manual_seed(arguments.seed)
    texts: list[str] = []
    while len(texts) < arguments.sequences:
        opening = torch.full((min(arguments.batch, arguments.sequences - len(texts)), 1), tokenizer.bos_token_id)
        with torch.inference_mode():
            ids = sample(model, opening, arguments.context, lambda done, total: None)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    arguments.out.write_text("\n\n".join(texts), encoding="utf8")


if __name__ == "__main__":
    main()
