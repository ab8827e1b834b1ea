"""The programs of an H100 as XLA compiles them, without one: few kernels a layer, no loop, one command buffer a step.

`pytest -m gpu_program` runs these. They take JAX's plugin for CUDA (3 GB) and no GPU, and show no times: a decode step
of an 8B model has to end in a few milliseconds, so that every kernel's launch and every wait of the host counts.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.gpu_program,
    pytest.mark.skipif(
        all(importlib.util.find_spec(f"jax_cuda{version}_plugin") is None for version in (12, 13)),
        reason="needs JAX's plugin for CUDA: pip install 'jaxinfer[cuda12]' or 'jaxinfer[cuda13]'",
    ),
]
HERE = Path(__file__).parent
LIMIT_S = 1200
MIB = 2**20

FORWARD = {  # kernels of one layer, attention included, and bytes of temporaries
    "decode:1": (7, 8 * MIB),
    "decode:8": (9, 8 * MIB),
    "decode:32": (8, 64 * MIB),
    "decode:128": (9, 128 * MIB),
    "prefill:0x512": (9, 1024 * MIB),  # a prompt of 8,192 tokens
    "prefill:4x64": (11, 1024 * MIB),  # 4 decode rows beside 1,024 tokens of prompts
}
SAMPLE = {  # kernels on the way that is usually taken; "full" takes the longest, with top-k and top-p
    "greedy": 6,
    "unfiltered": 10,
    "candidates": 20,
    "full": 40,
}
NUM_LAYERS = 32, 2


@functools.cache
def compiled(programs: tuple[str, ...], *options: str) -> dict[str, dict[str, Any]]:
    """The figures of programs, by name; XLA runs in a process of its own, without the flags of these tests."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(HERE / "compile_programs.py"), "--programs", ",".join(programs)]
        run = subprocess.run(
            [*command, *options, "--json", file.name],
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return json.loads(Path(file.name).read_text())


@pytest.mark.parametrize("name", FORWARD)
def test_forward_is_one_command_buffer_with_few_kernels_a_layer(name):
    many, few = (compiled(tuple(FORWARD), "--layers", str(number))[name] for number in NUM_LAYERS)
    most_kernels, most_bytes = FORWARD[name]
    assert many["loops"] == many["conditionals"] == many["eager_kernels"] == 0
    assert many["command_buffers"] == 1
    assert (many["kernels"] - few["kernels"]) / (NUM_LAYERS[0] - NUM_LAYERS[1]) <= most_kernels
    assert many["temp_bytes"] <= most_bytes


@pytest.mark.parametrize("name", ["decode:1", "decode:8", "decode:32"])
def test_int8_weights_take_no_kernel_more_a_layer_and_no_copy(name):
    """A copy in bfloat16 of the largest matrix of a layer would be 224 MiB of temporaries."""
    names = tuple(FORWARD)[:3]
    many, few = (compiled(names, "--layers", str(number), "--quantization", "int8")[name] for number in NUM_LAYERS)
    most_kernels, most_bytes = FORWARD[name]
    assert (many["kernels"] - few["kernels"]) / (NUM_LAYERS[0] - NUM_LAYERS[1]) <= most_kernels
    assert many["temp_bytes"] <= most_bytes
    assert many["command_buffers"] == 1 and many["eager_kernels"] == 0


@pytest.mark.parametrize("name", FORWARD)
def test_window_with_sink_tokens_takes_no_kernel_more(name):
    window = "--sliding-window", "512", "--sink-tokens", "4"
    windowed = compiled(tuple(FORWARD), "--layers", str(NUM_LAYERS[1]), *window)[name]
    assert windowed["kernels"] == compiled(tuple(FORWARD), "--layers", str(NUM_LAYERS[1]))[name]["kernels"]
    assert windowed["command_buffers"] == 1 and windowed["loops"] == 0


@pytest.mark.parametrize("num_rows", [1, 32, 128])
def test_chain_is_a_loop_around_one_command_buffer(num_rows):
    """The host launches the loop's body as often as there are steps, and waits for nothing in between."""
    names = f"decode:{num_rows}", f"sample:{num_rows}:greedy", f"chain:{num_rows}"
    step, sampler, chain = (compiled(names, "--layers", "2")[name] for name in names)
    assert chain["loops"] == 1 and chain["command_buffers"] == 1 and chain["conditionals"] == 0
    assert chain["eager_kernels"] <= 4  # the loop's counter and condition
    assert chain["kernels"] <= step["kernels"] + sampler["kernels"] + 8
    assert chain["temp_bytes"] <= step["temp_bytes"] + sampler["temp_bytes"] + 8 * MIB


@pytest.mark.parametrize("num_rows", [1, 32])
def test_steering_and_capturing_a_site_takes_few_kernels_and_stays_in_the_command_buffer(num_rows):
    names = f"decode:{num_rows}", f"tapped:{num_rows}"
    plain, tapped = (compiled(names, "--layers", "2")[name] for name in names)
    assert tapped["loops"] == tapped["conditionals"] == tapped["eager_kernels"] == 0
    assert tapped["command_buffers"] == 1
    assert plain["kernels"] < tapped["kernels"] <= plain["kernels"] + 8


@pytest.mark.parametrize("num_rows", [1, 32, 128])
@pytest.mark.parametrize("variant", SAMPLE)
def test_samplers_take_few_kernels_and_their_fallbacks_are_conditional(variant, num_rows):
    names = tuple(f"sample:{num_rows}:{name}" for name in SAMPLE)
    found = compiled(names, "--layers", "2")[f"sample:{num_rows}:{variant}"]
    assert found["loops"] == 0
    assert found["kernels_with_fallbacks" if variant == "full" else "kernels"] <= SAMPLE[variant]
    assert found["conditionals"] == {"candidates": 3, "full": 2}.get(variant, 0)


def test_log_probabilities_of_the_best_tokens_take_no_loop_and_few_kernels_more():
    names = ("sample:128:unfiltered:20",)
    found = compiled(names, "--layers", "2")[names[0]]
    assert found["loops"] == 0 and found["kernels"] <= SAMPLE["unfiltered"] + 16


@pytest.mark.parametrize(("name", "num_tokens"), [("decode:32", 32), ("prefill:0x512", 8192)])
def test_experts_on_four_devices_neither_loop_nor_multiply_every_token(name, num_tokens):
    """A Qwen3-MoE whose 128 experts have 768 features; each device has 32 of them."""
    config = str(HERE.parents[1] / "configs" / "bench-30b-a3b.json")
    found = compiled(("decode:32", "prefill:0x512"), "--config", config, "--layers", "2", "--mesh", "1x4")[name]
    assert found["loops"] == 0
    dense = {
        (num_tokens, 32, 1536),
        (32, num_tokens, 1536),
        (2048, 32, 1536),
        (32, 2048, 1536),
    }  # 2048: a turn's tokens
    assert not dense & set(map(tuple, found["shapes"]))
    assert found["temp_bytes"] <= (8 if name == "decode:32" else 1024) * MIB


@pytest.mark.parametrize("mesh", ["1x4", "2x2"])
def test_collectives_are_those_that_info_counts_and_hold_no_logits(mesh):
    forward, samplers = "decode:64", tuple(f"sample:64:{name}" for name in SAMPLE)
    found = compiled((forward, *samplers), "--layers", "4", "--mesh", mesh)
    for name in (forward, "sample:64:greedy", "sample:64:unfiltered"):
        sent = [entry["count"] * entry["num_bytes"] for entry in found[name]["collectives"]]
        assert sum(sent) == sum(volume["payload_bytes"] for volume in found[name]["volumes"]), name
    counted = sum(volume["count"] for volume in found[forward]["volumes"])
    assert sum(entry["count"] for entry in found[forward]["collectives"]) == counted
    for name in samplers:  # a device has 64 rows of 32,064 logits
        assert max(entry["num_bytes"] for entry in found[name]["collectives"]) < 64 * 32064 * 4 / 32
