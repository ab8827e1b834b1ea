"""Sweeps and the logit lens: each row is what a call of its own gives, and the pictures show it."""

import matplotlib as mpl
import numpy as np
import pytest
from conftest import GOLDEN, load_golden
from mesh_tools import on_mesh
from safetensors.numpy import load_file

from jaxinfer import LLM, SamplingParams, Table
from jaxinfer.research import add, scale

mpl.use("Agg")
BASE = {"max_model_len": 96, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 32}
SITE = "layers.1.residual"


@pytest.fixture(scope="module")
def llm():
    with LLM(load_golden("gqa").path, **BASE) as llm:
        yield llm


def test_sweep_has_a_row_for_each_combination_and_sample(llm):
    prompts = ["The house", "A river"]
    edits = [
        None,
        add.at(SITE, vector=np.ones(48), scale=3.0),
        [scale.at(SITE, factor=0.5), scale.at(SITE, factor=0.1)],
    ]
    table = llm.sweep(
        prompts,
        temperature=[0.5, 1.5],
        seed=range(2),
        intervention=edits,
        n=2,
        max_tokens=3,
        stop=["zz", "qq"],
        reductions={"norm": (SITE, lambda x: np.linalg.norm(x, axis=1).mean())},
        use_tqdm=False,
    )
    assert len(table) == 2 * 2 * 2 * 3 * 2
    assert len({(r["prompt"], r["temperature"], r["seed"], r["intervention"], r["sample"]) for r in table}) == 48
    assert set(table.column("intervention")) == {
        "none",
        "add at layers.1.residual scale=3",
        "scale at layers.1.residual factor=0.5, scale at layers.1.residual factor=0.1",
    }
    rows = [row for row in table if row["temperature"] == 0.5 and row["intervention"].startswith("add")]
    params = SamplingParams(
        temperature=0.5,
        seed=1,
        n=2,
        max_tokens=3,
        stop=["zz", "qq"],
        logprobs=0,
        capture=[SITE],
        interventions=edits[1],
    )
    out = llm.generate("A river", params)
    mine = [row for row in rows if row["prompt"] == "A river"][2:]
    for row, sample in zip(mine, out.outputs, strict=True):
        assert row["text"] == sample.text
        assert row["logprob"] == pytest.approx(sample.cumulative_logprob, abs=1e-4)
        assert row["mean_logprob"] == pytest.approx(sample.cumulative_logprob / len(sample.token_ids), abs=1e-4)
        norms = np.linalg.norm(sample.captures[SITE], axis=1)
        assert row["norm"] == pytest.approx(norms.mean(), rel=1e-4)


def test_sweep_takes_names_for_its_values(llm):
    stops = {"none": None, "vowels": ["a", "e"]}
    table = llm.sweep("The house", stop=stops, temperature=np.array([0.0, 1.0]), max_tokens=4, use_tqdm=False)
    assert table.column("stop") == ["none", "none", "vowels", "vowels"]
    assert table.column("temperature") == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"temprature": [1.0]}, TypeError, "did you mean 'temperature'"),
        ({"seed": []}, ValueError, "seed has no values to sweep over"),
        ({"temperature": [1.0, -1.0]}, ValueError, "temperature must be"),
        ({"intervention": [None], "interventions": []}, TypeError, "not both"),
        ({"reductions": {"x": ("layers.9.residual", len)}}, ValueError, "the model has layers 0..1"),
        ({"reductions": {"x": ("layers.*.residual", len)}}, ValueError, r"must name one site, got .* for 2"),
        ({"reductions": {"x": "embedding"}}, TypeError, r"must be a tuple \(site, function\)"),
        ({"reductions": {"text": ("embedding", len)}}, ValueError, "there is one already"),
        ({"intervention": ["abc"]}, TypeError, "intervention must be None, what Intervention.at returns"),
        ({"intervention": [add]}, TypeError, "intervention must be None, what Intervention.at returns"),
    ],
)
def test_wrong_sweep_is_an_error_at_the_call(llm, fields, error, message):
    with pytest.raises(error, match=message):
        llm.sweep("The house", **fields)


def test_sweep_keeps_equal_values_apart_and_survives_a_reduction_that_raises(llm):
    fields = {"temperature": [0.0, 0.0], "max_tokens": 0, "capture": {"none": None, "one": ["embedding"]}}
    table = llm.sweep([[3, 4, 5]], reductions={"x": ("embedding", lambda x: 1 / 0), "n": ("embedding", len)}, **fields)
    assert table.column("temperature") == [0.0, 0.0, "0.0 (1)", "0.0 (1)"]
    assert (table.column("x"), table.column("n")) == ([None] * 4, [3] * 4)
    with pytest.raises(TypeError, match="column 'prompt' must have numbers"):
        table.plot("prompt")
    with pytest.raises(ValueError, match="the table has no rows"):
        Table([]).plot()


ROWS = [
    {"kind": kind, "dose": dose, "y": dose * i + kind_y}
    for kind, kind_y in (("a", 0), ("b", 1))
    for dose in (1, 2)
    for i in (1, 3)
]


def test_table_plots_means_and_spreads():
    table = Table(ROWS, axes=["dose", "kind"], value="y")
    axes = table.plot()
    lines = {text.get_text(): line for text, line in zip(axes.get_legend().get_texts(), axes.containers, strict=True)}
    np.testing.assert_allclose(lines["kind a"][0].get_xydata(), [[1, 2], [2, 4]])
    np.testing.assert_allclose(lines["kind b"][0].get_xydata(), [[1, 3], [2, 5]])
    bars = table.plot(x="kind", by="dose")
    assert [patch.get_height() for patch in bars.patches] == [2, 3, 4, 5]
    assert [text.get_text() for text in bars.get_xticklabels()] == ["a", "b"]
    mpl.pyplot.close("all")


def test_table_is_shown_and_handed_on():
    table = Table([{"text": "<b> & " + "long " * 40, "x": 1 / 3}] * 70, value="x")
    assert repr(table).splitlines()[1].startswith("<b> & long long")
    assert repr(table).endswith("and 10 more rows")
    assert "&lt;b&gt; &amp;" in table._repr_html_()
    assert table.to_pandas().shape == (70, 2)
    assert (len(table), table[3]["x"]) == (70, 1 / 3)
    with pytest.raises(KeyError, match="no column 'y'; there are text, x"):
        table.column("y")


@pytest.mark.parametrize("layout", [(1, 1), pytest.param((2, 2), marks=pytest.mark.matrix)])
def test_lens_equals_norm_and_head_on_the_residual_of_transformers(layout):
    golden = dict(np.load(GOLDEN / "sites" / "llama.npz"))
    tensors = load_file(GOLDEN / "mesh" / "llama" / "model.safetensors")
    prompt = [*golden["prompt"].tolist(), *golden["output"][:-1].tolist()]
    with on_mesh("llama", layout) as llm:
        lens = llm.logit_lens(prompt, layers=[4, 1], num_top=3)
    assert lens.layers == (1, 4)
    for i, layer in enumerate(lens.layers):
        x = golden[f"at.layers.{layer}.residual"].astype(np.float64)
        normed = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * tensors["model.norm.weight"]
        logits = normed @ tensors["lm_head.weight"].T
        probs = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        np.testing.assert_allclose(lens.top_probs[i], -np.sort(-probs, axis=1)[:, :3], atol=1e-4)
        np.testing.assert_array_equal(lens.top_ids[i, :, 0], probs.argmax(1))
        chosen = probs[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(lens.next_probs[i], chosen, atol=1e-4)
        np.testing.assert_array_equal(lens.next_ranks[i], 1 + (probs[:-1] > chosen[:, None]).sum(1))
        np.testing.assert_allclose(lens.entropies[i], -(probs * np.log(probs)).sum(1), atol=1e-3)


def test_lens_is_a_table_and_a_picture(llm):
    lens = llm.logit_lens("The small house")
    assert len(lens.table) == 2 * len(lens.tokens)
    assert lens.table[-1]["next_token_rank"] is None
    axes = lens.plot()
    drawn = [text.get_text() for text in axes.texts]
    assert drawn == [tokens[0] for layer in lens.top_tokens for tokens in layer]
    assert lens._repr_html_().count("<td") == 2 * len(lens.tokens)
    mpl.pyplot.close("all")
    with pytest.raises(ValueError, match=r"layers entry must be in 0..1|layers entry must be"):
        llm.logit_lens("The house", layers=[2])
    with pytest.raises(TypeError, match="got a list of prompts"):
        llm.logit_lens(["hi", "there"])
    with pytest.raises(TypeError, match="layers must be a sequence"):
        llm.logit_lens("hi", layers=3)
    with pytest.raises(ValueError, match="at least one layer"):
        llm.logit_lens("The house", layers=[])
