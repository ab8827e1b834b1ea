"""A trace of two streams, written by hand: what is busy, what waits, which kernel takes how long."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from jaxinfer.bench import device_profile
from jaxinfer.bench.device_profile import analyse, kinds, record

# Microseconds: stream 1 runs 0..10, 10..14 and 20..24, stream 2 runs 12..18 and 30..31; idle are 18..20 and 24..30.
TRACE = """
planes {
  name: "/host:CPU"
  lines { name: "tf_XLAPjRtCpuClient/1" events { metadata_id: 1 duration_ps: 5000000 } }
  event_metadata { key: 1 value { id: 1 name: "launch" } }
}
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #1(Compute)"
    timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 10000000 }
    events { metadata_id: 2 offset_ps: 10000000 duration_ps: 4000000 }
    events { metadata_id: 2 offset_ps: 20000000 duration_ps: 4000000 }
  }
  lines {
    name: "Stream #2(MemcpyD2H)"
    timestamp_ns: 1000
    events { metadata_id: 3 offset_ps: 12000000 duration_ps: 6000000 }
    events { metadata_id: 4 offset_ps: 30000000 duration_ps: 1000000 }
  }
  lines { name: "XLA Modules" timestamp_ns: 1000 events { metadata_id: 5 offset_ps: 0 duration_ps: 90000000 } }
  event_metadata { key: 1 value { id: 1 name: "gemm_fusion_dot_12_0" } }
  event_metadata { key: 2 value { id: 2 name: "loop_fusion_3" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2H" } }
  event_metadata { key: 4 value { id: 4 name: "loop_fusion_17" } }
  event_metadata { key: 5 value { id: 5 name: "jit_forward" } }
}
"""


@pytest.fixture
def traced():
    return analyse(ProfileData.from_text_proto(TRACE), num_steps=2)


def test_analyse_busy_is_the_union_of_all_streams(traced):
    assert traced.is_device and traced.num_steps == 2
    assert (traced.span_ms, traced.busy_ms) == pytest.approx((31e-3 / 2, 23e-3 / 2))
    assert traced.gaps_per_step == 1 and traced.gap_us.mean == pytest.approx(4)
    assert traced.idle_share(2 * traced.busy_ms) == pytest.approx(0.5)
    assert traced.idle_share(traced.busy_ms / 2) == 0  # kernels are a little slower under the profiler


def test_analyse_kernels_are_per_step_and_longest_first(traced):
    assert [(kernel.name, kernel.per_step, pytest.approx(kernel.us)) for kernel in traced.kernels] == [
        ("gemm_fusion_dot_12_0", 0.5, 5),
        ("loop_fusion_3", 1, 4),
        ("MemcpyD2H", 0.5, 3),
        ("loop_fusion_17", 0.5, 0.5),
    ]


def test_kinds_put_the_layers_together(traced):
    found = [(kernel.name, kernel.per_step, pytest.approx(kernel.us)) for kernel in kinds(traced)]
    assert found == [("gemm_fusion_dot", 0.5, 5), ("loop_fusion", 1.5, 4.5), ("MemcpyD2H", 0.5, 3)]


def test_analyse_trace_without_kernels_is_none():
    assert analyse(ProfileData.from_text_proto('planes { name: "/host:CPU" }'), num_steps=1) is None


def test_render_shows_busy_time_and_kernels(traced):
    shown = device_profile.render("decode", traced)
    assert "the device is busy 0.01" in shown and "1 pauses a step, mean 4.0 us" in shown
    assert "43.5%" in shown and "gemm_fusion_dot_12_0" in shown


def test_record_on_cpu_finds_operations_and_keeps_the_file(tmp_path):
    function = jax.jit(lambda x: jnp.tanh(x @ x))
    x = jax.block_until_ready(function(jnp.ones((64, 64))))
    found = record(lambda: function(x), num_steps=1, keep=tmp_path / "new" / "a.xplane.pb.gz")
    assert not found.is_device and any("dot" in kernel.name or "fusion" in kernel.name for kernel in found.kernels)
    assert (tmp_path / "new" / "a.xplane.pb.gz").stat().st_size > 0
