"""The report: effective rank, JSON round trip, table, plot."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loraga.report.report import INITIALISED, ORDINARY, InitReport, LayerReport, effective_rank, versions

LLAMA = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def layer(name, shape=(64, 32), energy=0.5, **changes):
    spectrum = [2e-3 * 0.8**i for i in range(16)]
    values = {
        "name": name,
        "shape": shape,
        "rank": 8,
        "status": INITIALISED,
        "spectrum": spectrum,
        "directions": 8,
        "captured_energy": energy,
        "effective_rank": effective_rank(spectrum),
        "updates": 8,
    }
    return LayerReport(**values | changes)


def ordinary(name, shape, reason, rank=8):
    return LayerReport(name, shape, rank, ORDINARY, reason)


def llama(blocks):
    return [
        layer(f"model.layers.{b}.{kind}", shape, energy=0.3 + 0.6 * (b * 7 + i) / (blocks * 7))
        for b in range(blocks)
        for i, (kind, shape) in enumerate(LLAMA.items())
    ]


def report(layers):
    return InitReport(
        layers=layers,
        config={"method": "lora-ga", "direction": "ArB2r", "start": "mirror", "stable_gamma": 16.0},
        seconds={"gradients": 3.25, "factors": 0.5},
        state_bytes=3 * 2**20,
        micro_batches=8,
        skipped_batches=1,
        seed=7,
    )


def test_effective_rank():
    assert effective_rank([1.0, 0.0, 0.0]) == pytest.approx(1.0)
    assert effective_rank([3.0] * 5) == pytest.approx(5.0)
    # shares 0.8 and 0.2
    assert effective_rank([2.0, 1.0]) == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))
    assert effective_rank([2e-170, 1e-170]) == pytest.approx(effective_rank([2.0, 1.0]))
    assert effective_rank([2e200, 1e200]) == pytest.approx(effective_rank([2.0, 1.0]))
    for nothing in ([], [0.0, 0.0], [float("inf"), 1.0], [float("nan")]):
        assert effective_rank(nothing) is None


def test_round_trip(tmp_path):
    before = report([layer("a"), ordinary("b", (4, 6), "never called")])
    path = tmp_path / "deep" / "report.json"
    before.save(path)
    assert InitReport.load(path) == before
    plain = json.loads(path.read_text())
    assert plain["layers"][0]["shape"] == [64, 32] and plain["seed"] == 7 and plain["versions"]["torch"]
    assert plain == json.loads(json.dumps(before.to_dict()))
    path.write_text(json.dumps(plain | {"format": 1}))  # of loraga 0.1
    with pytest.raises(ValueError, match="another format"):
        InitReport.load(path)


def test_save_takes_a_bare_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report([layer("a")]).save("report.json")
    assert InitReport.load("report.json").layers[0].name == "a"


@pytest.mark.parametrize("what", ["save", "plot"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, what):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    path.write_text("old")

    def fail(source, target):
        # Everything is written at this point, beside the target.
        assert Path(source).parent == tmp_path and Path(source).stat().st_size > 100
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        getattr(report([layer("a")]), what)(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.png"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "layers": []}', '{"format": 2, "layers": [{"shape": [1, 2]}]}'],
)
def test_load_refuses_other_files(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is not a report of this version of loraga"):
        InitReport.load(path)


def test_table_of_a_small_model():
    layers = llama(1)
    layers[2] = ordinary(layers[2].name, layers[2].shape, "called, but no gradient reached it")
    layers[3] = layer(layers[3].name, layers[3].shape, updates=7, skipped=1)
    layers[4] = replace(layers[4], directions=5)
    layers.append(ordinary("vision.conv", (0, 0), "not a linear layer", rank=0))
    text = str(report(layers))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    row = {line.split()[0]: line.split() for line in lines if line.startswith(("model.", "vision"))}
    assert row["model.layers.0.mlp.down_proj"][1:] == ["4096", "x", "14336", *"88", "81.4", "%", "6.1", "2.0e-03", "8"]
    assert row["model.layers.0.mlp.gate_proj"][1:6] == ["14336", "x", "4096", "8", "5"]
    assert row["model.layers.0.self_attn.v_proj"][1:] == ["1024", "x", "4096", "8", *"----", "0", "ordinary"]
    assert row["model.layers.0.self_attn.o_proj"][-1] == "7/8"
    assert row["vision.conv"][1:] == [*"------", "0", "ordinary"]
    # Columns are aligned: "out x in" and the numbers under it end at the same place.
    assert len({line.index(" x ") for line in lines if " x " in line and line.startswith("model.")}) <= 2
    assert lines[0].index("out x in") + len("out x in") == lines[2].index("4096 x 4096") + len("4096 x 4096")
    assert "Ordinary LoRA (called, but no gradient reached it): 1 layer\n  model.layers.0.self_attn.v_proj" in text
    assert "8 layers: 6 initialised, 2 ordinary LoRA; captured energy mean 56.2 %, lowest 30.0 %" in text
    assert "8 micro-batches (1 with NaN or Inf left out), state 3.0 MiB, seed 7, lora-ga, mirror, ArB2r" in text
    assert "gradients 3.25 s, factors 0.50 s, total 3.75 s" in text


def test_long_names_lose_their_middle():
    layers = [layer(f"base_model.model.vision_tower.encoder.layers.{i}.self_attn.out_projection") for i in (0, 11)]
    layers += [layer(f"{side}.block.11.layer.1.EncDecAttention.o") for side in ("encoder", "decoder")]
    layers += [layer("a_single_name_" + "that_never_ends_" * 5 + "really")]
    lines = str(report(layers)).splitlines()
    assert max(map(len, lines)) <= 110
    assert [line.split()[0] for line in lines[2:7]] == [
        "b.m.v.e.l.0.self_attn.out_projection",
        "b.m.v.e.l.11.self_attn.out_projection",
        "encoder.b.11.layer.1.EncDecAttention.o",
        "decoder.b.11.layer.1.EncDecAttention.o",
        "a_single_nam..s_that_never_ends_really",
    ]


def test_table_of_a_large_model_is_grouped_by_shape():
    layers = llama(32)
    for i in range(7):
        layers[7 * i] = ordinary(layers[7 * i].name, layers[7 * i].shape, "never called")
    text = str(report(layers))
    lines = text.splitlines()
    assert len(lines) < 30 and max(map(len, lines)) <= 125
    assert "64: self_attn.q_proj, self_attn.o_proj" in text and "7 ordinary" in text
    assert re.search(r"64: self_attn.k_proj, self_attn.v_proj +1024 x 4096 +8 +8 +30\.3 %", text)
    assert "32: mlp.down_proj" in text
    lowest = lines.index("Lowest captured energy (5 of 217 layers):")
    assert lines[lowest + 1].split() == ["30.3", "%", "model.layers.0.self_attn.k_proj"]
    shares = [float(line.split()[0]) for line in lines[lowest + 1 : lowest + 6]]
    assert shares == sorted(shares) and lines[lowest + 6] == ""
    assert "Ordinary LoRA (never called): 7 layers" in text and "and 2 more" in text
    assert "224 layers: 217 initialised, 7 ordinary LoRA" in text


def test_repr_is_short():
    assert repr(report(llama(2))) == "InitReport(14 layers initialised, 0 ordinary, 8 micro-batches, 3.8 s)"


def test_versions_name_every_library():
    found = versions()
    assert set(found) == {"loraga", "torch", "triton", "peft", "transformers"}
    assert found["loraga"] and found["torch"]


@pytest.mark.parametrize("blocks", [1, 32])
def test_plot_draws_every_layer(tmp_path, blocks):
    pytest.importorskip("matplotlib")
    before = set(sys.modules)
    layers = llama(blocks)
    layers[3] = ordinary(layers[3].name, layers[3].shape, "gradient is zero")
    path = tmp_path / "report.png"
    figure = report(layers).plot(path)
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    spectra, energy = figure.axes[:2]
    medians = 1 if blocks > 1 else 0
    assert len(spectra.lines) == len(layers) - 1 + medians
    first = spectra.lines[0].get_ydata()
    assert first[0] == 1.0 and first[3] == pytest.approx(0.8**3)
    if blocks == 1:
        assert [round(bar.get_width(), 1) for bar in energy.patches][:3] == [30.0, 38.6, 47.1]
        assert any("gradient is zero" in text.get_text() for text in energy.texts)
    else:
        labels = [label.get_text() for label in energy.get_yticklabels()]
        assert labels == [f"{kind} (1 ordinary)" if kind.endswith("o_proj") else kind for kind in LLAMA]
        assert len(energy.lines) == len(layers) - 1 + len(LLAMA)


def test_plot_of_many_kinds_stays_readable(tmp_path):
    pytest.importorskip("matplotlib")
    figure = report([layer(f"part{i}.fc") for i in range(100)]).plot(tmp_path / "report.svg")
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(labels) == 30 and labels[-1] == "others"
    assert (tmp_path / "report.svg").read_text().startswith("<?xml")


def test_plot_without_a_spectrum_is_a_clear_error():
    with pytest.raises(ValueError, match="No layer of this report has a spectrum"):
        report([layer("a", spectrum=[])]).plot()


def test_plot_without_matplotlib_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from loraga.report.report import InitReport, LayerReport\n"
        "layers = [LayerReport('a', (4, 4), 1, 'initialised', spectrum=[1.0])]\n"
        "try:\n    InitReport(layers, {}, {}, 0, 1).plot()\n"
        "except ImportError as error:\n    print(error)\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert result.stdout == "Drawing a report needs matplotlib: pip install 'loraga[plot]'.\n", result.stderr
