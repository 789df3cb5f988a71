"""The static suite: what a listing says, what is predicted from it, and a run that compiles two small kernels."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")
pytest.importorskip("triton", reason="there is nothing to compile")

from bench import command, machine_code, predicted
from bench.measure import ROOT
from bench.suites import static
from bench.suites.static_cases import SHAPES, SMALL

LISTING = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!PT LDS RZ, [RZ] ;
        /*0020*/              @P5  LDGSTS.E.BYPASS.128 [R22], desc[UR14][R16.64], P5 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   LDG.E R3, desc[UR4][R2.64] ;
        /*0060*/                   FFMA R1, R2, R3, R1 ;
.L_x_2:
        /*0070*/              @!P1 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_a_listing():
    """What a branch may skip is not of every pass; what is never done counts nowhere, the end's filling is no loop."""
    instructions, loops = machine_code.parsed(LISTING)
    assert len(instructions) == 11 and len(loops) == 1
    loop = machine_code.loop_of(loops[0], warps=8)
    assert loop["instructions"] == 5 and loop["fma"] == 0
    assert loop["flops"] == 2 * (2 * 64 * 128 * 16)  # of two warpgroups
    assert loop["loaded"] == 8 * 32 * (16 + 2)
    assert loop["shared_bytes"] == 2 * 2 * 16 * (64 + 128) + 8 * 32 * 16


@pytest.mark.parametrize(
    "instruction, size",
    [
        ("LDG.E.128 R1", 16),
        ("@P1 LDG.E.64 R1", 8),
        ("LDG.E R1", 4),
        ("LDG.E.U16 R1", 2),
        ("STS.U8 [R1]", 1),
        ("LDSM.16.M88.4 R1, [R2]", 16),
        ("LDSM.16.MT88.2 R1, [R2]", 8),
    ],
)
def test_widths(instruction, size):
    assert machine_code.width(instruction) == size


def test_a_warp_multiplies_too():
    loop = machine_code.loop_of(["HMMA.16816.F32.BF16 R1, R2, R3, R1", "LDSM.16.M88.4 R1, [R2]"], warps=4)
    assert loop["flops"] == 4 * 2 * 16 * 8 * 16 and loop["shared_bytes"] == 4 * 512


def test_occupancy():
    assert machine_code.occupancy(174, 131072, 8, 90) == 1  # registers, and memory
    assert machine_code.occupancy(80, 4096, 8, 90) == 3
    assert machine_code.occupancy(16, 0, 4, 80) == 16  # threads
    assert machine_code.occupancy(32, 100_000, 4, 80) == 1 and machine_code.occupancy(32, 100_000, 4, 90) == 2


def ghost_row(programs=288, **more):
    """What was read of the ghost kernel's 128 × 128 tiles, by Triton 3.6."""
    loop = {"instructions": 132, "warps": 8, "flops": 2 * 128 * 128 * 64, "shared_bytes": 80 << 10, "loaded": 32 << 10}
    loop |= {"stored": 0, "fma": 0, "kinds": {}}
    return {"programs": programs, "occupancy": 1, "warps": 8, "outside": 1500, "loops": [loop, loop], **more}


H100 = predicted.MACHINES[90]


def test_the_clocks_of_a_pass():
    share, limit, clocks = predicted.at_most(ghost_row(), H100)
    assert {name: round(value) for name, value in clocks.items()} == dict(tensor=512, shared=640, L2=1057, issue=264)
    assert limit == "L2" and share == pytest.approx(512 / 1057, rel=1e-3)


def test_waves_and_whole_tiles_cost():
    B, d, p = 8, 1024, 4096
    shares = []
    for T in (512, 1024, 4096):
        tiles = T // 128
        row = ghost_row(programs=B * tiles * (tiles + 1) // 2)
        multiplied = SHAPES["ghost, B 8, T 1024, d 1024, p 4096"].multiplied
        assert multiplied({"BLOCK_T": 128, "BLOCK_S": 128, "BLOCK_K": 64}) == B * 8 * 9 * 128**2 * (d + p)
        found = predicted.of_products(row, B * T**2 * (d + p), B * tiles * (tiles + 1) * 128**2 * (d + p), H100)
        assert found["share"] < found["at_most"] and found["of"] == "tensor cores"
        assert found["flops_per_second"] == pytest.approx(B * T**2 * (d + p) / found["seconds"])
        shares.append(found["share"])
    assert shares == sorted(shares) and 0.15 < shares[0] < 0.25 and 0.40 < shares[-1] < 0.48


def test_tiles_that_are_kept_in_memory():
    """A program's tiles are counted in turn, each with what is stored and loaded of it beside the main loop."""
    shape = SHAPES["ghost, q, k and v of 2 inputs, B 8, T 1024, d 1024, p 1024"]
    wide = {"BLOCK_T": 128, "BLOCK_S": 256, "BLOCK_K": 64}
    pairs, tile, diagonal = 2 * 8 * 20, 4 * 128 * 256, 4 * 128 * 128
    assert shape.kept(wide) == (3, pairs * 4 * tile + 2 * 8 * 8 * 3 * diagonal)  # 320 pairs on 132 processors
    assert shape.multiplied(wide) == 3 * 132 * 2 * 128 * 256 * (1024 + 3 * 1024)
    assert shape.kept(wide | {"BLOCK_S": 128}) == (1, 0.0)
    row = ghost_row(programs=132)
    once, thrice = (predicted.of_products(row, 1e12, 1e12, H100, turns) for turns in (1, 3))
    assert thrice["seconds"] - once["seconds"] == pytest.approx(2 * (1500 * 8 / 4 + H100.latency) / H100.hertz)
    moved = predicted.of_products(row, 1e12, 1e12, H100, 1, 132 * H100.l2_bytes * 1e6)
    assert moved["seconds"] - once["seconds"] == pytest.approx(1e6 / H100.hertz)


def test_memory_is_shared_by_the_processors():
    loop = {"instructions": 40, "warps": 4, "flops": 0, "shared_bytes": 0, "loaded": 8192, "stored": 0, "fma": 0}
    few, many = (
        predicted.of_memory({"programs": n, "occupancy": 4, "warps": 4, "outside": 100, "loops": [loop]}, 1e9, H100)
        for n in (64, 64 * 132)
    )
    assert few["share"] < 0.5 < many["share"] <= many["at_most"] == 1
    alone = predicted.of_memory({"programs": 9, "occupancy": 1, "warps": 4, "outside": 100, "loops": []}, 1e9, H100)
    assert 0 < alone["share"] < 0.1


def test_the_verdict_names_what_limits():
    found = predicted.of_products(ghost_row(), 1e12, 1e12, H100)
    assert predicted.verdict(found, 0.48, "") == "48%: within reach"
    assert predicted.verdict(found, 0.65, "tiles are small") == "65%: no, L2 takes 2.1 times as long; tiles are small"


def test_a_broken_compiler_costs_its_own_row(tmp_path, monkeypatch):
    """A worker that dies of its second job is followed by another, which goes on with the third."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "for job in json.loads(sys.argv[3]):\n"
        "    if job['key'] == 'bad':\n        print('LLVM ERROR: no', file=sys.stderr, flush=True); os.abort()\n"
        "    print(json.dumps({'key': job['key'], 'rows': [job['key']]}), flush=True)\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(machine_code, "WORKERS", 1)
    found = list(machine_code.looked_at([{"key": key} for key in ("a", "bad", "c")]))
    assert found[0] == {"key": "a", "rows": ["a"]} and found[2] == {"key": "c", "rows": ["c"]}
    assert found[1]["error"] == "the compiler died (-6): LLVM ERROR: no"


@pytest.mark.parametrize(
    "answer, said",
    [
        ({"error": "the compiler died"}, "the compiler died"),
        ({"rows": [ghost_row(kernel="other", options={})]}, "no launch of gradient_kernel"),
        ({"rows": [ghost_row(kernel="gradient_kernel", options={})]}, "no prediction: KeyError"),
    ],
)
def test_a_shape_without_a_figure(answer, said):
    """A kernel that takes another form than its case knows is a row that says so, and fails the suite."""
    assert said in static.of_shape("norm-GEMM, B 8, T 1024, d 1024, p 4096", answer)["error"]


def test_every_family_and_shape_is_asked_for():
    import dpfast_kernels

    keys = {job["key"] for job in static.jobs_of(small=False)}
    assert set(SHAPES) <= keys and len(keys) == len(static.jobs_of(small=False))
    families = {path.stem for path in (ROOT / "kernels/dpfast_kernels").glob("*.py")} - {
        "__init__",
        "common",
        "ghost_tiles",
        "segments",
    }
    for target in (80, 90):
        assert {key.partition(":")[0] for key in keys if key.endswith(f"sm_{target}")} == families
    assert all(title in SHAPES for named in static.RATES.values() for titles in named.values() for title in titles)
    assert dpfast_kernels.__name__


def test_plans_with_predicted_rates():
    found = static.planned(8, 1024)
    assert set(found["ways"]) == set(static.LAYERS) and 1 < found["ratio"] < 2
    assert "no CUDA device" in found["rates"] or torch.cuda.is_available()


def test_nothing_to_time(capsys):
    assert command.main(["--suite", "static", "--model", "mlp"]) == 2
    assert "--model says nothing to static" in capsys.readouterr().err
    assert "static" not in command._arguments([]).suite


@pytest.mark.compiles
def test_a_small_run(tmp_path, capsys, monkeypatch):
    """Read from the binary, kept, predicted, and called so wherever it is shown."""
    monkeypatch.setattr(static, "PLANS", static.PLANS[:1])
    monkeypatch.setattr(machine_code, "WORKERS", 1)
    assert command.main(["--suite", "static", "--device", "cpu", "--small", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("static-cpu-*.json")
    data = json.loads(path.read_text())
    assert data["finished"] and data["right"] and "seconds 0" not in data["configuration"]["command"]
    kernels = data["suite"]["kernels"]
    assert {row["target"] for rows in kernels.values() for row in rows} == {80, 90}
    for rows in kernels.values():
        for row in rows:
            assert row["kernel"] == "standard_normal_kernel" and row["spills"] == 0 and row["fused"]
            assert 16 < row["registers"] < 256 and row["programs"] == 512 and row["occupancy"] >= 1
    shape = data["suite"]["shapes"][SMALL[0]]
    assert shape["loops"][0]["flops"] > 0 and shape["loops"][0]["kinds"]["HGMMA"] > 0 and not shape["serialized"]
    assert 0 < shape["share"] <= shape["at_most"] <= 1 and shape["verdict"]
    text = path.with_suffix(".md").read_text()
    assert static.NOTE in text and all(
        "predicted" in line.lower() for line in text.splitlines() if line.startswith("**")
    )
    capsys.readouterr()


FUSION = """
import json, sys
from collections import Counter
from dataclasses import replace
from bench import machine_code
from dpfast_kernels.noise import COMPILES
for fused in (True, False):
    for launch in COMPILES[0].launches(90):
        launch = replace(launch, options=launch.options | {"enable_fp_fusion": fused})
        binary, row = machine_code.compiled(launch, 90, {})
        assert row["fused"] == fused
        count = Counter(map(machine_code.operation, machine_code.parsed(machine_code.listing(binary.asm["cubin"]))[0]))
        print(json.dumps({name: count[name] for name in ("FFMA", "FMUL", "FADD")}))
"""


@pytest.mark.compiles
def test_noise_does_not_depend_on_fusion(tmp_path):
    """The same multiplications, additions and fused ones, whether the compiler may fuse what is not: the same bits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    done = subprocess.run([sys.executable, "-c", FUSION], env=environment, capture_output=True, text=True, check=True)
    with_fusion, without = map(json.loads, done.stdout.splitlines())
    assert with_fusion == without and with_fusion["FFMA"] > 100
