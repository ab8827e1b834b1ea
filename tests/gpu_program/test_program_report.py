"""The report on a small program, written down as XLA prints it."""

from program_report import Collectives, array_shapes, find_collectives, num_bytes, num_launches, parse_thunks

THUNKS = """\
000: kCommandBuffer [source | sink]
    001: kCopy           [source        | next=002 (1)] kCopy
    002: kCustomKernel   [prev=001 (1)  | next=003 (1)] loop_add_fusion grid: [1, 1, 1] threads: [128, 1, 1]
    003: kCublasLtMatmul [prev=002 (1)  | next=009 (1)] kCublasLtMatmul
    009: kConditional  [prev=003 (1)  | next=010 (1) ]
      false_branch:
        No thunks.      true_branch:
        004: kCustomKernel [source       | next=008 (1)] best_first grid: [1, 1, 1] threads: [32, 1, 1]
        008: kConditional  [prev=004 (1) | sink]
          false_branch:
            005: kCustomKernel [source       | next=006 (1)] threshold_search grid: [6, 1, 1] threads: [256, 1, 1]
            006: kCustomKernel [prev=005 (1) | sink        ] threshold_search grid: [6, 1, 1] threads: [256, 1, 1]
          true_branch:
            007: kCustomKernel [source | sink] loop_broadcast_fusion grid: [1, 1, 1] threads: [32, 1, 1]
    010: kCustomKernel [prev=009 (1) | sink] input_scatter_fusion grid: [1, 1, 1] threads: [128, 1, 1]
011: kAllReduceStart [prev=000 (1) | next=012 (1)] kAllReduceStart
012: kWhile [prev=011 (1) | sink]
  condition:
    013: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    014: kCustomKernel [source | sink] wrapped_add grid: [1, 1, 1] threads: [1, 1, 1]
015: kWhile [prev=012 (1) | sink]
condition:
    016: kCustomKernel [source | sink] loop_compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        017: kCustomKernel [source | sink] loop_add grid: [1, 1, 1] threads: [1, 1, 1]
        018: kAsyncStart [source | sink] stream=computation_stream[0], async_id=18
            020: kDynamicSliceFusion [source | sink] params=1, results=1
                019: kCopy [source | sink] kCopy
        021: kAsyncDone [source | sink] async_id=18
"""
HLO = """
ENTRY %main (x: bf16[32,4096]) -> bf16[32,4096] {
  %all-reduce-start.1 = bf16[32,4096]{1,0} all-reduce-start(%x), replica_groups={{0,1}}
  %all-reduce-start.2 = (bf16[32,4096]{1,0}, bf16[32,4096]{1,0}) all-reduce-start(%y), replica_groups={{0,1}}
  %all-reduce-done.2 = bf16[32,4096]{1,0} all-reduce-done(%all-reduce-start.2)
  %all-gather.1 = (f32[2,8]{1,0}, s32[2,8]{1,0}) all-gather(%v, %i), dimensions={0}
}
"""


def test_parse_thunks_keeps_what_is_inside_what():
    buffer, reduce, loop, chain = parse_thunks(THUNKS)
    assert [thunk.kind for thunk in buffer.parts[""]] == [
        "Copy",
        "CustomKernel",
        "CublasLtMatmul",
        "Conditional",
        "CustomKernel",
    ]
    outer = buffer.parts[""][3]
    assert outer.parts["false_branch"] == [] and [thunk.name for thunk in outer.parts["true_branch"]] == [
        "best_first",
        "",
    ]
    inner = outer.parts["true_branch"][1]
    assert {name: len(part) for name, part in inner.parts.items()} == {"false_branch": 2, "true_branch": 1}
    assert reduce.is_collective and not reduce.is_launch
    assert {name: part[0].name for name, part in loop.parts.items()} == {
        "condition": "wrapped_compare",
        "body": "wrapped_add",
    }
    assert chain.parts["condition"][0].name == "loop_compare"
    assert [thunk.kind for thunk in chain.parts["body"]] == ["CommandBuffer"]
    assert num_launches(chain.parts["body"], max) == 2


def test_num_launches_counts_one_way_through_conditionals():
    buffer = parse_thunks(THUNKS)[:1]
    assert num_launches(buffer, min) == 4  # nothing in the outer conditional
    assert num_launches(buffer, max) == 4 + 1 + 2


def test_find_collectives_counts_starts_once_with_their_results():
    assert find_collectives(HLO) == [
        Collectives(kind="all-gather", arrays="f32[2,8] s32[2,8]", count=1, num_bytes=128),
        Collectives(kind="all-reduce", arrays="bf16[32,4096]", count=2, num_bytes=2 * 32 * 4096),
    ]


def test_arrays_of_any_dtype_have_shapes_and_bytes():
    assert num_bytes("pred[3], f8e4m3fn[4], s4[6], f64[2,2]") == 3 + 4 + 3 + 32
    assert array_shapes(HLO) == {(32, 4096), (2, 8)}
