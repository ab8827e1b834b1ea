"""Makes bfloat16.json: by how much transformers' own log-probabilities in bfloat16 miss those in float32.

For each checkpoint of make.py, the largest difference in nats over what `jaxinfer bench golden` compares: the greedy
tokens of all texts, and the 20 most likely first tokens. An implementation in bfloat16 cannot be asked for less.

Needs torch and transformers, like make.py. Run `python tests/golden/make_bfloat16.py` on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from make import HERE
from transformers import AutoModelForCausalLM

NUM_FIRST = 20


def largest_error(path: Path) -> float:
    """The largest error of one checkpoint."""
    with np.load(path / "expected.npz") as file:
        expected = dict(file)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    errors = []
    for number in range(sum(name.startswith("prompt_") for name in expected)):
        prompt, greedy, chosen, logits = (
            expected[f"{name}_{number}"] for name in ("prompt", "greedy", "logprobs", "logits")
        )
        with torch.no_grad():
            found = model(torch.tensor(np.concatenate([prompt, greedy])[None, :-1].astype(np.int64))).logits[0].float()
        rows = torch.log_softmax(found[len(prompt) - 1 :], dim=-1).numpy()
        errors += np.abs(rows[np.arange(len(greedy)), greedy] - chosen).tolist()
        first = logits[-1] - np.logaddexp.reduce(logits[-1].astype(np.float64))
        most_likely = np.argsort(-first)[:NUM_FIRST]
        errors += np.abs(rows[0, most_likely] - first[most_likely]).tolist()
    return max(errors)


if __name__ == "__main__":
    names = sorted(path.parent.name for path in HERE.glob("*/expected.npz"))
    largest = {name: round(largest_error(HERE / name), 3) for name in names}
    (HERE / "bfloat16.json").write_text(json.dumps(largest, indent=1) + "\n")
    print(largest)
