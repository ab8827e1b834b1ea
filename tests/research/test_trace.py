"""Traces hold every launched step, and show it; nothing is logged without one."""

import json

import matplotlib as mpl
import pytest
from mesh_tools import on_mesh

from jaxinfer import SamplingParams

mpl.use("Agg")


@pytest.mark.parametrize("layout", [(1, 1), (2, 1)])
def test_trace_has_the_tokens_of_every_step(layout, tmp_path):
    prompts = [list(range(20 + i, 41 + 3 * i)) for i in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with on_mesh("llama", layout, enable_prefix_caching=False) as llm:
        llm.generate(prompts, params, use_tqdm=False)
        with llm.trace() as trace:
            with pytest.raises(ValueError, match="being traced already"), llm.trace():
                pass
            llm.generate(prompts, params, use_tqdm=False)
        count = len(trace.logs[0].records)
        llm.generate(prompts, params, use_tqdm=False)
        assert len(trace.logs[0].records) == count
        with llm.trace() as empty:
            pass
        with pytest.raises(ValueError, match="no step was launched while the trace was active"):
            empty.plot()
        shown = llm.stats()._repr_html_()
    steps = trace.logs[0].records
    computed: dict[str, set[int]] = {}
    for step in steps:
        for name, start, length in step.prefills:
            computed.setdefault(name, set()).update(range(start, start + length))
    assert sorted(map(len, computed.values())) == sorted(map(len, prompts))
    assert sum(len(step.decodes) for step in steps) == 6 * 4
    assert max(step.num_running for step in steps) == 4  # as many as there are slots
    assert all(step.began <= step.launching <= step.launched for step in steps)
    assert all(step.launched <= step.read for step in steps if step.read == step.read)
    assert all(step.num_live_rows <= step.num_rows for step in steps)
    assert trace.to_pandas()["tokens"].sum() == sum(map(len, prompts)) + 6 * 4

    lanes, rows, pages = trace.plot().axes
    assert [text.get_text() for text in lanes.get_yticklabels()] == ["schedule", "launch", "read", "device"]
    assert len(rows.lines) == 3
    assert pages.get_legend_handles_labels()[1] == ["pages used", "pages cached", "waiting"]
    axes = trace.plot_pipeline(count=10)
    assert len(axes.patches) == 10 * layout[0] - (layout[0] - 1)
    mpl.pyplot.close("all")
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" and event["tid"] == 1 for event in events) == len(steps)
    assert {event["name"] for event in events if event["ph"] == "C"} == {"pages", "sequences", "rows"}
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert ("stage 1" in names) == (layout[0] == 2)
    assert "KV pages: used 0" in shown
    assert "drafts" not in shown  # there were none
