"""`make sass`: the parser of machine code on small texts, and limits on the machine code of the kernels.

nvcc compiles the kernels for one architecture; no GPU is needed. tests/csrc/sass.json has the numbers of each kernel,
which may not increase; after an intended change ``python -m scripts.sass --write`` rewrites it. Limits that the kernels
must keep are constants in this file.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from scripts.sass import compile as compiler
from scripts.sass import model, sources
from scripts.sass.__main__ import TABLE
from scripts.sass.compile import Compiled, Resources
from scripts.sass.disassembly import Function, parse
from scripts.sass.machines import MACHINES
from scripts.sass.measure import KernelMeasure, is_aligned, measure, pipe_of
from scripts.sass.paths import fewest_path, longest_iteration
from scripts.sass.report import as_text, committed
from tests.support import ROOT

MISSING = compiler.missing_tool()
needs_nvcc = [
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.slow,  # nvcc takes minutes
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("cuda-build"),
]

# ---- the parser, on texts with known answers ----

SOURCE = """// A test.
#include <cstdint>
namespace test {
template <class T>
__device__ __forceinline__ T load_vector(const T* row) {
  if (row == nullptr) { return T{}; }
  return *row;
}
struct Shared {
  int words[4];
  __device__ int first() const { return words[0]; }
};
template <class T>
__global__ void __launch_bounds__(128, 4) sum_kernel(const T* row) {
  auto load = [&](int i) { return load_vector(row + i); };
  load(1);
}
}  // namespace test
"""

# Rows of 16 bytes are added in an inner loop (0x40 to 0x80); an iteration of the outer loop (0x30 to 0xd0) stores one.
# A division that overflows calls a subroutine, and diverged warps take the path at 0xf0.
CODE = """
	.section	.text.{name},"ax",@progbits
.text.{name}:
	//## File "{file}", line 14
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/               @P1 EXIT ;
.L_x_0:
        /*0030*/                   IMAD.MOV.U32 R8, RZ, RZ, RZ ;
.L_x_1:
	//## File "{file}", line 7 inlined at "{file}", line 15
	//## File "{file}", line 15 inlined at "{file}", line 16
	//## File "{file}", line 16
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
	//## File "{file}", line 16
        /*0050*/                   FADD R8, R8, R4 ;
        /*0060*/                   FADD R9, R9, R5 ;
        /*0070*/                   S2UR UR6, SR_CgaCtaId ;
        /*0080*/              @P0 BRA P2, `(.L_x_1) ;
        /*0090*/                   BRA.DIV UR4, `(.L_x_4) ;
.L_x_5:
        /*00a0*/                   MUFU.RCP R7, R8 ;
        /*00b0*/              @!P3 BRA `(.L_x_2) ;
        /*00c0*/                   CALL.REL.NOINC `($slow) ;
.L_x_2:
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00d8*/              @!P4 BRA `(.L_x_0) ;
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   SHFL.BFLY P0, R9, R8, R7, R6 ;
        /*0100*/                   BRA `(.L_x_5) ;
$slow:
        /*0110*/                   FMUL R8, R8, R8 ;
        /*0120*/                   RET.REL.NODEC R10 `({name}) ;
.L_x_6:
        /*0130*/                   BRA `(.L_x_6);
        /*0140*/                   NOP ;
"""


@pytest.fixture
def function(tmp_path: Path) -> Function:
    file = tmp_path / "test.cuh"
    file.write_text(SOURCE)
    (found,) = parse(CODE.format(name="_Z3sum", file=file))
    return found


def test_parser(function: Function):
    assert function.name == "_Z3sum"
    assert len(function.instructions) == 22 and function.code_bytes == 22 * 16
    load = next(i for i in function.instructions if i.base == "LDG")
    assert (load.address, load.width, load.modifiers, [line for _, line in load.lines]) == (
        0x40,
        16,
        ("E", "128"),
        [7, 15, 16],
    )
    branch = next(i for i in function.instructions if i.address == 0x80)
    assert (branch.predicate, branch.target, branch.is_conditional) == ("P0", ".L_x_1", True)
    assert [i.address for i in function.instructions if i.base == "BRA" and not i.is_conditional] == [0x100, 0x130]


def test_widths():
    text = '\t.section\t.text.k,"ax"\n' + "".join(
        f"        /*{16 * i:04x}*/  {opcode} R0, [R1] ;\n"
        for i, opcode in enumerate(
            ("LDG.E.U16", "LDG.E", "LDG.E.64.STRONG.GPU", "LDG.E.U8.CONSTANT", "LDS.128", "LDG.E.S16")
        )
    )
    assert [i.width for i in parse(text)[0].instructions] == [2, 4, 8, 1, 16, 2]


def test_loops(function: Function):
    """Two natural loops; padding after the end and the subroutine are in no loop."""
    outer, inner = function.loops
    assert outer.contains(inner) and not inner.contains(outer)
    assert function.follows(outer, inner) and function.follows(inner, outer)
    headers = [function.blocks[loop.header].instructions[0].address for loop in (outer, inner)]
    assert headers == [0x30, 0x40]
    assert {i.address for b in inner.blocks for i in function.blocks[b].instructions} == set(range(0x40, 0x90, 0x10))
    assert 0xF0 in {function.blocks[b].instructions[0].address for b in outer.blocks}
    assert [i.base for i in longest_iteration(function, inner)] == ["LDG", "FADD", "FADD", "S2UR", "BRA"]
    # Neither the call, nor the path of diverged warps, nor the inner loop.
    assert [i.address for i in longest_iteration(function, outer)] == [0x30, 0x90, 0xA0, 0xB0, 0xD0, 0xD8]


def test_fewest_path(function: Function):
    """The shortest iteration of the outer loop that loads n rows and stores one runs the inner loop n times."""

    def work(block) -> Counter[str]:
        return Counter(i.base for i in block.instructions)

    outer, inner = function.loops
    for rows in (1, 3):
        path = fewest_path(function, work, {"LDG": rows, "STG": 1}, {"LDG": rows, "STG": 1}, outer)
        assert path is not None and len(path) == 6 + 5 * rows
        assert sum(i.base == "LDG" for i in path) == rows and not any(i.base == "CALL" for i in path)
    assert fewest_path(function, work, {"SHFL": 1}, {}, outer) is None  # diverged warps only
    assert fewest_path(function, work, {"STG": 1}, {}, inner) is None
    whole = fewest_path(function, work, {"STG": 2, "CALL": 1}, {"LDG": 1})
    assert whole is None  # two iterations load two rows
    whole = fewest_path(function, work, {"STG": 2, "CALL": 1}, {"LDG": 2})
    assert whole is not None and Counter(i.base for i in whole)["CALL"] == 1 and whole[-1].base == "EXIT"
    free = fewest_path(function, work, {"LDG": 1, "STG": 1}, {"LDG": 1}, outer, free=inner.blocks)
    assert free is not None and len(free) == 6


def test_functions_of_lines(tmp_path: Path):
    file = tmp_path / "test.cuh"
    file.write_text(SOURCE)
    spans = {name: (first, last) for first, last, name in sources.function_spans(SOURCE)}
    assert spans == {"load_vector": (4, 8), "first": (11, 11), "sum_kernel": (13, 17)}
    assert [sources.function_at(str(file), line) for line in (6, 10, 15)] == ["load_vector", "test.cuh", "sum_kernel"]
    assert sources.text_at(str(file), 7) == "return *row;"


def test_measures(function: Function):
    kernel = measure(Compiled("sum_kernel<double, true>", "test.cu", Resources(20, 0, 0), function))
    assert sorted(kernel.hot) == ["add global sum_kernel", "store sum_kernel"]
    loop = kernel.hot["add global sum_kernel"]
    assert (loop.instructions, loop.elements, loop.depth, loop.costly) == (5, 2, 1, {"S2UR": 1})
    assert loop.pipes == {"fp32": 2, "lsu": 1, "uniform": 1, "control": 1}
    assert kernel.widths("stores") == {16: 1} and kernel.local == 0
    item = model.average_item(kernel, frames=3)
    assert item is not None and len(item) == 6 + 3 * 5


def test_a_narrow_store_of_a_row_is_counted(tmp_path: Path):
    file = tmp_path / "csrc" / "test.cuh"
    file.parent.mkdir()
    file.write_text(SOURCE.replace("load_vector", "store_vector"))
    text = CODE.format(name="_Z3sum", file=file).replace("STG.E.128 desc[UR4][R2.64], R8", "NOP")
    text = text.replace("LDG.E.128 R4, desc[UR4][R2.64]", "STG.E desc[UR4][R2.64], R8")
    (function,) = parse(text)
    for name, count in (("sum_kernel<float, true>", 1), ("sum_kernel<float, false>", 0)):
        row = committed(measure(Compiled(name, "test.cu", Resources(20, 0, 0), function)))
        assert row["narrow_row_stores"] == count


def test_pipes():
    def pipe(opcode: str) -> str:
        return pipe_of(parse(f'\t.section\t.text.k,"ax"\n /*0000*/ {opcode} R0 ;')[0].instructions[0])

    opcodes = "FFMA IMAD.WIDE DADD LOP3.LUT ISETP.GE.AND LDS.128 SHFL.BFLY UIADD3 S2UR MUFU.RCP BRA BAR.SYNC"
    expected = "fp32 fp32 fp64 alu alu lsu lsu uniform uniform special control control"
    assert [pipe(opcode) for opcode in opcodes.split()] == expected.split()


def test_throughput_of_a_closed_network():
    """One block alternates between the stations; many keep the slowest one busy."""
    assert model._throughput([3.0, 2.0], 5.0, 1) == pytest.approx(1 / 10)
    rates = [model._throughput([3.0, 2.0], 5.0, n) for n in range(1, 40)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(1 / 3, rel=0.01)
    assert all(rate <= min(1 / 3, n / 10) for n, rate in enumerate(rates, 1))


def test_resident_blocks():
    def blocks(registers: int, shared: int, dynamic: int) -> int:
        kernel = KernelMeasure(
            Compiled("k", "k.cu", Resources(registers, 0, shared), Function("k", [], {})), [], [], 0, 0, []
        )
        return model.resident_blocks(kernel, MACHINES[0], 128, dynamic)

    assert blocks(32, 0, 0) == 16  # 2,048 threads
    assert blocks(108, 0, 0) == 4  # 65,536 registers
    assert blocks(108, 4688, 70848) == 3  # 228 KiB of shared memory
    assert blocks(32, 0, 227 << 10) == 1


def test_flags_are_those_of_the_build():
    flags = re.search(r"def nvcc_flags.*?return \((.*?)\n        \)", (ROOT / "setup.py").read_text(), re.S)
    assert flags is not None
    for flag in compiler.FLAGS:
        assert flag in flags[1].replace(",", " ").split() or flag in flags[1], flag


# ---- the kernels ----

# Speed of the fused forward in bf16: 2.67 bytes per element at 92 % of 4.3 TB/s leave 22.6 lane instructions of the
# 33.5e12 per second of an H200. A kernel with few warps issues in about three of four cycles.
POOL_PER_ELEMENT = 16.9
# Per 8 elements of a pair of rows in bf16: 16 widenings, 32 products and sums, and 2 loads; 6 for address and loop.
SCORE_STEP = 56
# Per 3 rows x 8 columns in bf16: 24 widenings, 16 sums, 8 divisions of 3 instructions and a check, 4 to narrow, 3 loads
# and a store come to 80. The rest is for addresses and the three loops around them.
AVERAGE_ITEM = 170
# The word of the look-back carries all that a tile publishes. A fence in each tile would wait for its stores.
FENCES = 0

POOL = "segment_pool_fwd_kernel<BFloat16, true, true>"
ROW_STORES = [
    f"{op}_kernel<{dtype}, true{staged}>"
    for op in "adjacent_distance_bwd integrate_rows_fwd integrate_rows_bwd segment_reduce_fwd segment_expand_fwd "
    "segment_max_bwd segment_weighted_mean_fwd segment_weighted_mean_bwd segment_pool_fwd".split()
    for dtype in ("BFloat16", "Half", "float", "double")
    for staged in ((", true", ", false") if op == "segment_pool_fwd" else ("",))
]
NARROW_TODAY = ("integrate_rows_fwd", "segment_reduce", "segment_expand", "segment_max", "segment_weighted_mean_fwd")
NARROW_TODAY += ("segment_pool",)
NOT_YET = pytest.mark.xfail(strict=True, reason="the kernels do not keep this limit yet")


def not_yet(name: str, condition: bool):
    """Return a parameter that is expected to fail if ``condition`` holds."""
    return pytest.param(name, marks=[NOT_YET] if condition else [])


@pytest.fixture(scope="module")
def kernels() -> dict[str, KernelMeasure]:
    return {kernel.name: measure(kernel) for kernel in compiler.compile_kernels("90")}


@pytest.fixture(scope="module")
def rows(kernels: dict[str, KernelMeasure]) -> dict[str, dict]:
    return {name: committed(kernel) for name, kernel in kernels.items()}


def increases(now: dict[str, dict], table: dict[str, dict]) -> list[str]:
    """Return a message for each number that is larger than in the table, and for each kernel or loop in only one."""
    problems = [f"{name}: only in the table" for name in sorted(set(table) - set(now))]
    problems += [f"{name}: not in the table" for name in sorted(set(now) - set(table))]
    for name in sorted(set(table) & set(now)):
        flat = [{**row, **{f"loop {key}": n for key, n in row["loops"].items()}} for row in (table[name], now[name])]
        before, after = ({key: n for key, n in row.items() if key != "loops"} for row in flat)
        if lost := sorted(set(before) - set(after)):
            problems.append(f"{name}: lost {', '.join(lost)}")
        problems += [f"{name}: {key} {before[key]} -> {n}" for key, n in after.items() if n > before.get(key, 0)]
    return problems


def with_marks(marks: list[pytest.MarkDecorator]):
    def apply(test):
        for mark in marks:
            test = mark(test)
        return test

    return apply


@with_marks(needs_nvcc)
def test_no_number_is_larger_than_in_the_table(rows: dict[str, dict]):
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != compiler.nvcc_release():
        pytest.skip(f"the table is for nvcc {table['nvcc']}, the installed one is {compiler.nvcc_release()}")
    problems = increases(rows, table["kernels"])
    assert not problems, "\n".join(["if this is intended, run python -m scripts.sass --write", *problems])


def test_increases_are_detected():
    table = json.loads(TABLE.read_text())["kernels"]
    assert increases(table, table) == []
    name = next(name for name, row in table.items() if row["loops"])
    for key, message in (("registers", "registers"), ("local", "local"), ("loops", "loop")):
        worse = copy.deepcopy(table)
        if key == "loops":
            worse[name]["loops"][next(iter(worse[name]["loops"]))] += 1
        else:
            worse[name][key] += 1
        assert [problem.startswith(f"{name}: {message}") for problem in increases(worse, table)] == [True]
    fewer = {other: row for other, row in table.items() if other != name}
    assert increases(fewer, table) == [f"{name}: only in the table"]
    assert increases(table, fewer) == [f"{name}: not in the table"]


@with_marks(needs_nvcc)
@pytest.mark.parametrize("name", [not_yet(name, name.startswith(NARROW_TODAY)) for name in ROW_STORES])
def test_rows_are_stored_16_bytes_at_a_time(kernels: dict[str, KernelMeasure], name: str):
    narrow = [a for a in kernels[name].stores if a.width < 16 and a.is_row]
    assert any(a.width == 16 for a in kernels[name].stores)
    assert not narrow, "\n".join(f"{a.count} stores of {a.width} bytes in {a.function}: {a.text}" for a in narrow)


@with_marks(needs_nvcc)
def test_every_aligned_kernel_that_stores_rows_is_in_the_list(kernels: dict[str, KernelMeasure]):
    found = {k.name for k in kernels.values() if is_aligned(k.name) and any(a.is_row for a in k.stores)}
    assert found <= set(ROW_STORES)


@with_marks(needs_nvcc)
@pytest.mark.parametrize("name", [not_yet(POOL, True)])
def test_instructions_to_score(rows: dict[str, dict], name: str):
    assert rows[name]["score_step"] <= SCORE_STEP


@with_marks(needs_nvcc)
@pytest.mark.parametrize("name", [not_yet(POOL, True)])
def test_instructions_to_average(rows: dict[str, dict], name: str):
    assert rows[name]["average_item"] <= AVERAGE_ITEM


@with_marks(needs_nvcc)
@pytest.mark.parametrize("name", [not_yet(POOL, True)])
def test_instructions_per_element(rows: dict[str, dict], name: str):
    assert rows[name]["per_element"] <= POOL_PER_ELEMENT


@with_marks(needs_nvcc)
@pytest.mark.parametrize("name", [not_yet("segment_pool_fwd", True), not_yet("(?!segment_pool_fwd)", False)])
def test_no_local_memory(rows: dict[str, dict], name: str):
    assert {kernel: row["local"] for kernel, row in rows.items() if re.match(name, kernel) and row["local"]} == {}


@with_marks(needs_nvcc)
@pytest.mark.parametrize("name", [not_yet(op, True) for op in ("segment_pool_fwd", "pack_map", "select_compact")])
def test_no_fence_in_a_tile(rows: dict[str, dict], name: str):
    assert {k: row["fences"] for k, row in rows.items() if k.startswith(name) and row["fences"] > FENCES} == {}


@with_marks(needs_nvcc)
def test_predictions_are_printed_for_each_machine(kernels: dict[str, KernelMeasure]):
    text = as_text(kernels[POOL])
    for machine in MACHINES:
        assert re.search(rf"{machine.name}: predicted \d+ % of copy, limited by", text)


@with_marks(needs_nvcc)
def test_line_numbers_do_not_change_the_code():
    source = min(compiler.CUDA.glob("*.cu"), key=lambda path: path.stat().st_size)
    texts = [compiler.disassemble(source, "90", lines)[0] for lines in (True, False)]
    with_lines, without = (
        [(f.name, [(i.opcode, i.operands) for i in f.instructions]) for f in parse(t)] for t in texts
    )
    assert with_lines == without
