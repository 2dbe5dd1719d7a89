"""Comparisons: every measure against plain float64 formulas on the trained family, and what holds them together."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial

import jsonschema
import numpy as np
import pytest
import referencing
import scipy.integrate
import scipy.optimize
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

import spectra
from spectra.analysis.detect import random_floor
from spectra.analysis.study import WEIGHTS
from spectra.errors import CorruptFileError, MissingFileError, UsageError
from spectra.records import comparison, sweeps
from spectra.records.comparison import Comparison
from spectra.records.report import json_schema
from spectra.sources.saved import load_comparison
from spectra.svd import base as base_module
from spectra.tasks.compare import SIZE
from tests.support import problems, reference
from tests.support.paths import FIXTURES, MEMBERS

DRAWS = 4
STEPS = [f"checkpoint-{step}" for step in range(50, 301, 50)]


@pytest.fixture(scope="module")
def family() -> Comparison:
    return spectra.compare([FIXTURES / member for member in MEMBERS], FIXTURES / "base", draws=DRAWS)


@pytest.fixture(scope="module")
def base():
    return {name: tensor.double().numpy() for name, tensor in load_tensors(FIXTURES / "base/model.safetensors").items()}


def plain_update(member, module, base):
    """W1 − W0 by the formulas of the papers, in float64, or None where this member has none."""
    W0 = base[f"{module}.weight"]
    if member == "full":
        W1 = load_file(FIXTURES / "full/model.safetensors")[f"{module}.weight"].astype(float)
        return W1 - W0
    home = FIXTURES / member
    config = json.loads((home / "adapter_config.json").read_text())
    tensors = {k: v.astype(float) for k, v in load_file(home / "adapter_model.safetensors").items()}
    prefix = f"base_model.model.{module}"
    if f"{prefix}.lora_A.weight" not in tensors:
        return None
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    BA = scaling * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
    if not config["use_dora"]:
        return BA
    norms = np.linalg.norm(W0 + BA, axis=1, keepdims=True)
    return tensors[f"{prefix}.lora_magnitude_vector"][:, None] / norms * (W0 + BA) - W0


def median_of_marchenko_pastur(beta):
    """By quadrature and a root, of the density written out."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def mass(x):
        return scipy.integrate.quad(
            lambda t: math.sqrt(max((high - t) * (t - low), 0)) / (2 * math.pi * beta * t), low, x, limit=400
        )[0]

    return scipy.optimize.brentq(lambda x: mass(x) - 0.5, low + 1e-9, high - 1e-9)


def plain_measures(W0, dW, k, noisy):
    W1 = W0 + dW
    U0, s0, _ = np.linalg.svd(W0, full_matrices=False)
    U1, s1, _ = np.linalg.svd(W1, full_matrices=False)
    s = np.linalg.svd(dW, compute_uv=False)
    p = s[s > 1e-9 * s[0]] / s.sum()
    energy = np.cumsum(s**2) / (s**2).sum()
    angles = np.linalg.svd(U0[:, :k].T @ U1[:, :k], compute_uv=False)
    cosines = np.abs(U0.T @ U1[:, :k]).max(0)
    intruders = cosines < 0.5
    values = {
        "update_norm_fro": np.linalg.norm(dW),
        "update_norm_spectral": s[0],
        "update_norm_relative": np.linalg.norm(dW) / np.linalg.norm(W0),
        "update_norm_spectral_relative": s[0] / s0[0],
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "stable_rank": np.linalg.norm(dW) ** 2 / s[0] ** 2,
        "rank_90": int((energy < 0.9 - 1e-12).sum()) + 1,
        "rank_99": int((energy < 0.99 - 1e-12).sum()) + 1,
        "intruder_energy_share": (s1[:k][intruders] ** 2).sum() / (s1[:k] ** 2).sum(),
        "rho_k": np.linalg.norm(U0[:, :k] @ U0[:, :k].T @ dW) ** 2 / np.linalg.norm(dW) ** 2,
        "principal_overlap": (angles**2).mean(),
        "spectrum_shift": np.linalg.norm(s1 - s0) / np.linalg.norm(s0),
        "noise_edge": None,
        "noise_rank": None,
    }
    if noisy:
        m, n = W0.shape
        sigma = np.median(s) / math.sqrt(max(m, n) * median_of_marchenko_pastur(min(m, n) / max(m, n)))
        values["noise_edge"] = sigma * (math.sqrt(m) + math.sqrt(n))
        values["noise_rank"] = int((s > values["noise_edge"]).sum())
    return values, angles, cosines


@pytest.mark.parametrize("member", MEMBERS)
def test_every_measure_equals_a_plain_formula(member, family, base):
    report = family.reports[MEMBERS.index(member)]
    assert not report.failed
    for layer in report.layers:
        W0 = base[f"{layer.name}.weight"].T if layer.role == "embedding" else base[f"{layer.name}.weight"]
        dW = plain_update(member, layer.name, base)
        dW = dW.T if layer.role == "embedding" else dW
        expected, angles, cosines = plain_measures(W0, dW, 10, noisy=layer.update["kind"] == "dense")
        for name, value in expected.items():
            assert layer.measures[name] == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-6)), (
                f"{layer.name}: {name}"
            )
        assert layer.principal_cosines == pytest.approx(angles, abs=1e-6)
        assert [vector.max_cosine for vector in layer.vectors] == pytest.approx(cosines, abs=1e-6)
        for epsilon in (0.2, 0.35, 0.5, 0.8):
            for k in (1, 4, 10):
                assert sweeps.layer_intruders_at(layer, report, epsilon, k) == (cosines[:k] < epsilon).sum()


def test_overlaps_equal_a_plain_formula(family, base):
    assert len(family.overlaps) == len(MEMBERS) * (len(MEMBERS) - 1) // 2
    for item in family.overlaps[::4]:
        a, b = MEMBERS[item["a"]], MEMBERS[item["b"]]
        for layer in item["layers"][::5]:
            directions = []
            for member in (a, b):
                U, s, _ = np.linalg.svd(plain_update(member, layer["name"], base), full_matrices=False)
                directions.append(U[:, : min(10, int((s > 1e-9 * s[0]).sum()))])
            X, Y = directions
            assert layer["directions"] == [X.shape[1], Y.shape[1]]
            smaller = min(layer["directions"])
            assert layer["overlap"] == pytest.approx(np.linalg.norm(X.T @ Y) ** 2 / smaller, abs=1e-6)
            assert layer["random"] == max(layer["directions"]) / X.shape[0]
        assert item["overlap"] == pytest.approx(np.mean([layer["overlap"] for layer in item["layers"]]))


def test_counts_and_thresholds_by_adapter_weight(family, base):
    """The counts at every weight, and that the first crossing lies where it is said to lie."""
    for member in ("lora-r4", "full", "dora-r16"):
        report = family.reports[MEMBERS.index(member)]
        for layer in report.layers[1:20:9]:
            W0, dW = base[f"{layer.name}.weight"], plain_update(member, layer.name, base)
            curve = layer.weights
            assert [weight for weight, _ in curve["counts"]] == list(WEIGHTS)
            for weight, count in curve["counts"]:
                assert count == reference.count(W0, W0 + weight * dW, 10, 0.5), f"{layer.name} at {weight}"
            threshold = curve["threshold"]
            if threshold is None:
                assert not any(count for _, count in curve["counts"])
            else:
                assert reference.count(W0, W0 + threshold * dW, 10, 0.5) > 0
                assert reference.count(W0, W0 + threshold / 1.011 * dW, 10, 0.5) == 0
        summed = [
            (weight, sum(dict(map(tuple, layer.weights["counts"]))[weight] for layer in report.layers))
            for weight in WEIGHTS
        ]
        assert sweeps.by_weight(report) == summed
        assert dict(summed)[1.0] == report.total("all")
        weight, name = sweeps.free_weight(report)
        assert weight == min(layer.weights["threshold"] or np.inf for layer in report.layers)
        assert name in {layer.name for layer in report.layers}


def test_random_updates_are_the_null(family):
    for report in family.reports:
        totals = sweeps.null_totals(report)
        assert totals is not None
        assert totals == [sum(layer.null["counts"][draw] for layer in report.layers) for draw in range(DRAWS)]
        above = sum(total >= report.total("all") for total in totals)
        assert sweeps.null_p_value(report) == (1 + above) / (1 + DRAWS)
        for layer in report.layers:
            exceeding = sum(count >= layer.intruders for count in layer.null["counts"])
            assert layer.null["p_value"] == (1 + exceeding) / (1 + DRAWS)
            assert layer.null["mean"] == pytest.approx(np.mean(layer.null["counts"]))


def test_a_base_weight_is_decomposed_once_however_many_fine_tunes(monkeypatch):
    """Also with other adapter weights, random updates, merges, and cosines that need settling."""
    decomposed = []
    original = vars(base_module)["decompose_gram"]

    def counted(weight, *rest, **options):
        decomposed.append(weight)
        return original(weight, *rest, **options)

    def never(*_, **__):
        raise AssertionError("a second decomposition of the base")

    monkeypatch.setattr(base_module, "decompose_gram", counted)
    monkeypatch.setattr(base_module, "decompose", never)
    paths = [FIXTURES / member for member in MEMBERS]
    found = spectra.compare(
        paths, FIXTURES / "base", merge=[[(0.5, paths[0]), (0.5, paths[6])]], draws=2, include=["layers.1.*"]
    )
    assert not any(report.failed for report in found.reports)
    assert len(decomposed) == 7


def test_the_table_has_what_a_comparison_needs(family):
    rows = {row["label"]: row for row in family.rows()}
    assert list(rows) == list(MEMBERS)
    r4, full = rows["lora-r4"], rows["full"]
    assert (r4["method"], r4["rank"], r4["alpha"], r4["scaling"]) == ("peft-lora", 4, 8, 2.0)
    assert rows["rslora-r16"]["scaling"] == 8.0
    assert full["trainable_ratio"] == 1.0
    assert r4["trainable_parameters"] == 28 // 7 * 4 * (4 * (160 + 160) + 3 * (160 + 448))
    assert r4["intruders"] == sum(value for name, value in r4.items() if name.startswith("intruders: ") and value)
    assert r4["update_norm_relative"] == pytest.approx(
        np.mean([layer.measures["update_norm_relative"] for layer in family.reports[1].layers])
    )
    assert r4["margin"] == r4["threshold"] - 1
    assert full["intruders"] * 3 < min(row["intruders"] for label, row in rows.items() if label != "full")
    frame = family.to_dataframe()
    assert list(frame["label"]) == list(MEMBERS)


def test_merged_fine_tunes_are_one_column(base):
    parts = [(0.7, FIXTURES / "lora-r4"), (0.3, FIXTURES / "full"), (1.0, FIXTURES / "dora-r16")]
    compared = partial(spectra.compare, base=FIXTURES / "base", include=["layers.2.*", "embed"], quick=True)
    both = compared([], merge=[parts, parts[::2]])
    assert both.labels == ("0.7*lora-r4 + 0.3*full + 1*dora-r16", "0.7*lora-r4 + 1*dora-r16")
    for report, used in zip(both.reports, (parts, parts[::2]), strict=True):
        assert report.tuned["format"] == "merged"
        assert [part["weight"] for part in report.tuned["parts"]] == [weight for weight, _ in used]
        for layer in report.layers:
            W0 = base[f"{layer.name}.weight"]
            updates = [(weight, plain_update(path.name, layer.name, base)) for weight, path in used]
            dW = sum(weight * update for weight, update in updates if update is not None)
            W0, dW = (W0.T, dW.T) if layer.role == "embedding" else (W0, dW)
            assert layer.update["kind"] == "merged"
            assert layer.measures["update_norm_fro"] == pytest.approx(np.linalg.norm(dW), rel=1e-6)
            cosines = reference.max_cosines(W0, W0 + dW, 10)
            assert [vector.max_cosine for vector in layer.vectors] == pytest.approx(cosines, abs=1e-5)
    assert "embed_tokens" in both.reports[0].layers[-1].name or any(
        "embed_tokens" in layer.name for layer in both.reports[0].layers
    )
    alone = compared([FIXTURES / "lora-r4"], merge=[[(1.0, FIXTURES / "lora-r4")]])
    assert alone.reports[0].total("all") == alone.reports[1].total("all")


def test_a_training_run_is_a_trajectory():
    run = spectra.compare([FIXTURES / "run-r4"], FIXTURES / "base", quick=True)
    assert run.labels == tuple(STEPS)
    assert run.steps == (50, 100, 150, 200, 250, 300)
    assert run.is_trajectory
    sizes = [row["update_norm_relative"] for row in run.rows()]
    assert sizes == sorted(sizes)
    assert not spectra.compare([FIXTURES / "lora-r4"], quick=True).is_trajectory


def test_json_follows_the_schemas_and_comes_back(family, tmp_path):
    value = json.loads(family.to_json())
    registry = referencing.Registry().with_resources(
        [("spectra.report/1", referencing.Resource.from_contents(json_schema()))]
    )
    validator = jsonschema.Draft202012Validator(comparison.json_schema(), registry=registry)
    validator.validate(value)
    broken = {**value, "reports": [{**value["reports"][0], "layers": [{}]}]}
    assert not validator.is_valid(broken)
    file = tmp_path / "comparison.json"
    file.write_text(family.to_json())
    again = load_comparison(file)
    assert again.to_json() == family.to_json()
    assert str(FIXTURES) not in family.to_json(canonical=True)
    with pytest.raises(MissingFileError):
        load_comparison(tmp_path / "none.json")

    def without(*keys):
        broken = json.loads(family.to_json())
        part = broken
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        return json.dumps(broken)

    for text in (
        "[", "{}", '{"schema": "spectra.comparison/1"}', "[1]", without("reports", 0, "settings", "top_k"),
        without("reports", -1), without("overlaps", 0, "random"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(CorruptFileError, match="comparison"):
            load_comparison(file)


def test_the_same_whatever_the_number_of_workers():
    paths = [FIXTURES / "lora-r1", FIXTURES / "full"]
    found = [
        spectra.compare(paths, FIXTURES / "base", draws=2, include=["layers.0.*"], workers=workers, threads=1)
        for workers in (1, 2)
    ]
    assert found[0].to_json(canonical=True) == found[1].to_json(canonical=True)


def test_other_engines_give_the_same_counts(make_base, make_adapter):
    """Krylov leaves out what it does not know, and says so."""
    rng = np.random.default_rng(3)
    home = make_base({"a.weight": problems.trained_like(rng, 1024, 1024).astype("f4")})
    B, A = rng.normal(size=(1024, 8)) / 8, rng.normal(size=(8, 1024)) / 32
    adapter = make_adapter({"a": (B.astype("f4"), A.astype("f4"))}, lora_alpha=8)
    found = {engine: spectra.compare([adapter], home, engine=engine, quick=True) for engine in ("cached", "krylov")}
    assert found["krylov"].reports[0].layers[0].engine == "krylov"
    totals = {engine: made.reports[0].total("all") for engine, made in found.items()}
    assert totals["cached"] == totals["krylov"] > 0
    row = found["krylov"].rows()[0]
    assert row["principal_overlap"] is None
    assert row["null_p_value"] is None
    assert row["effective_rank"] == pytest.approx(found["cached"].rows()[0]["effective_rank"])
    report = found["krylov"].reports[0]
    lower, upper = max((vector.max_cosine_bounds for vector in report.layers[0].vectors), key=lambda b: b[1] - b[0])
    with pytest.raises(UsageError, match="exact or the cached engine"):
        sweeps.intruders_at(report, (lower + upper) / 2)


def test_what_cannot_be_compared(make_base, make_adapter, rng):
    other = make_base({"layers.0.weight": rng.normal(size=(40, 40)).astype("f4")}, folder="other")
    adapter = make_adapter(
        {"layers.0": (rng.normal(size=(40, 1)).astype("f4"), rng.normal(size=(1, 40)).astype("f4"))},
        base_model_name_or_path="../other",
    )
    with pytest.raises(UsageError, match=f"different bases.*{other.name}"):
        spectra.compare([FIXTURES / "lora-r1", adapter])
    with pytest.raises(UsageError, match="draws = -1"):
        spectra.compare([FIXTURES / "lora-r1"], draws=-1)
    with pytest.raises(UsageError, match="nothing to compare"):
        spectra.compare([])
    with pytest.raises(UsageError, match="only 3 vectors"):
        sweeps.intruders_at(spectra.audit(FIXTURES / "lora-r1", top_k=3, include=["layers.0.*"]), top_k=4)
    unreadable: list[Exception] = []
    found = spectra.compare(
        [FIXTURES / "nothing", FIXTURES / "lora-r1"], FIXTURES / "base", quick=True, on_unreadable=unreadable.append
    )
    assert len(found.reports) == 1
    assert isinstance(unreadable[0], MissingFileError)


def test_layers_that_cannot_be_analysed_do_not_end_the_comparison(make_base, make_adapter, rng):
    home = make_base({name: rng.normal(size=(40, 30)).astype("f4") for name in ("a.weight", "b.weight")})
    bad = np.full((40, 1), np.nan, dtype="f4")
    good = (rng.normal(size=(40, 1)).astype("f4"), rng.normal(size=(1, 30)).astype("f4"))
    first = make_adapter({"a": good, "b": (bad, good[1].copy())}, folder="first")
    found = spectra.compare(
        [first, make_adapter({"a": good, "b": (good[0].copy(), good[1].copy())}, folder="second")], home, draws=2
    )
    assert [len(report.failed) for report in found.reports] == [1, 0]
    merged = spectra.compare([], home, merge=[[(1, first), (1, first)]], quick=True)
    assert [layer.status for layer in merged.reports[0].layers] == ["analysed", "non_finite"]
    assert "b" in (merged.reports[0].failed[0].error or "")
    zero = make_adapter({"a": (0 * good[0], good[1].copy()), "b": good}, folder="zero")
    assert [layer.status for layer in spectra.compare([zero], home, draws=2).reports[0].layers] == [
        "unchanged",
        "analysed",
    ]


def test_tiny_and_degenerate_weights(make_base, make_adapter, rng):
    weights = {
        "zero": np.zeros((20, 30)), "identity": np.eye(24), "one": np.ones((1, 1)), "row": rng.normal(size=(1, 9)),
        "tiny": 1e-30 * rng.normal(size=(20, 20)), "deficient": np.outer(rng.normal(size=20), rng.normal(size=30)),
        "tall": rng.normal(size=(60, 5)),
    }  # fmt: skip
    home = make_base({f"{name}.weight": W.astype("f4") for name, W in weights.items()})
    factors = {
        name: (rng.normal(size=(W.shape[0], 1)).astype("f4"), rng.normal(size=(1, W.shape[1])).astype("f4"))
        for name, W in weights.items()
    }
    found = spectra.compare([make_adapter(factors)], home, draws=2)
    assert not found.reports[0].failed, [layer.error for layer in found.reports[0].failed]
    assert json.loads(found.to_json())
    for layer in found.reports[0].layers:
        W0 = weights[layer.name].astype("f4").astype(float)
        B, A = factors[layer.name]
        assert layer.intruders == reference.count(W0, W0 + 2 * B.astype(float) @ A, 10, 0.5), layer.name


def test_arrays_of_a_layer(base):
    paths = [FIXTURES / "lora-r4", FIXTURES / "full"]
    found = spectra.layer_spectra(paths, FIXTURES / "base", include=["layers.1.mlp.up_proj", "layers.0.*v_proj"])
    assert [(item.name.split(".", 2)[2], item.tuned) for item in found] == [
        ("0.self_attn.v_proj", "lora-r4"), ("0.self_attn.v_proj", "full"),
        ("1.mlp.up_proj", "lora-r4"), ("1.mlp.up_proj", "full"),
    ]  # fmt: skip
    for item in found:
        W0 = base[f"{item.name}.weight"]
        dW = plain_update(item.tuned, item.name, base)
        U0, s0, _ = np.linalg.svd(W0, full_matrices=False)
        U1, s1, _ = np.linalg.svd(W0 + dW, full_matrices=False)
        assert item.cosines.shape == (160, 160)
        assert np.abs(item.cosines - np.abs(U0.T @ U1))[:, :140].max() < 1e-5
        assert item.base_values == pytest.approx(s0, abs=1e-6)
        assert item.tuned_values == pytest.approx(s1, abs=1e-6)
        update = np.linalg.svd(dW, compute_uv=False)
        assert item.update_values == pytest.approx(update[: item.update_values.size], abs=1e-6)
        assert [vector.intruder for vector in item.vectors] == [c < 0.5 for c in np.abs(U0.T @ U1).max(0)[:10]]
        assert item.random_floor == pytest.approx(random_floor(W0.shape[0], 160))
        assert (item.noise_edge is None) == (item.tuned == "lora-r4")
    small = spectra.layer_spectra(paths[:1], size=7, top_k=3, side="right", include=["layers.1.mlp.up_proj"])[0]
    assert small.cosines.shape == (7, 7)
    assert len(small.vectors) == 3
    assert SIZE > 160
    with pytest.raises(UsageError, match="size = 0"):
        spectra.layer_spectra(paths, size=0)


@pytest.mark.parametrize("engine", ["cached", "exact"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(60, 60), (80, 50), (50, 80)], ids=str)
def test_null_spaces_are_no_directions(make_base, make_adapter, rng, shape, side, engine):
    """A base of rank 3: the measures of its leading subspace do not count arbitrary vectors."""
    W0 = (rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1]))).astype("f4")
    home = make_base({"a.weight": W0, "zero.weight": np.zeros(shape, "f4")})
    B, A = rng.normal(size=(shape[0], 4)).astype("f4"), rng.normal(size=(4, shape[1])).astype("f4")
    adapter = make_adapter({"a": (B, A), "zero": (B.copy(), A.copy())}, lora_alpha=4)
    a, zero = spectra.compare([adapter], home, engine=engine, side=side, draws=1).reports[0].layers
    W, dW = W0.astype(float), B.astype(float) @ A.astype(float)
    if side == "right":
        W, dW = W.T, dW.T
    U0, U1 = np.linalg.svd(W)[0][:, :3], np.linalg.svd(W + dW)[0][:, :7]
    assert a.measures["rho_k"] == pytest.approx(np.linalg.norm(U0.T @ dW) ** 2 / np.linalg.norm(dW) ** 2, abs=1e-5)
    overlap = np.linalg.svd(U0.T @ U1, compute_uv=False)
    assert a.measures["principal_overlap"] == pytest.approx((overlap**2).sum() / 10, abs=1e-5)
    assert len(a.principal_cosines) == 3
    for name in ("rho_k", "principal_overlap", "spectrum_shift"):
        assert zero.measures[name] is None


def test_the_exact_engine_leaves_nothing_out():
    compared = partial(spectra.compare, base=FIXTURES / "base", include=["layers.0.*"], draws=0)
    exact, cached = (
        compared([FIXTURES / "lora-r4", FIXTURES / "full"], engine=engine).rows() for engine in ("exact", "cached")
    )
    for a, b in zip(exact, cached, strict=True):
        for name, value in a.items():
            assert value == (pytest.approx(b[name], rel=1e-4) if isinstance(value, float) else b[name]), name


def test_weights_stored_in_float64_are_compared_with_the_others(make_base, make_adapter, rng):
    W0 = rng.normal(size=(40, 30)).astype("f4")
    home = make_base({"a.weight": W0})
    wide = make_base({"a.weight": W0 + 0.3 * rng.normal(size=(40, 30))}, folder="wide")
    adapter = make_adapter({"a": (rng.normal(size=(40, 1)).astype("f4"), rng.normal(size=(1, 30)).astype("f4"))})
    found = spectra.compare([wide, adapter], home, merge=[[(1.0, wide), (0.5, adapter)]], quick=True)
    assert len(found.overlaps) == 3
    assert "float64_weights" in found.reports[2].layers[0].flags


def test_merges_that_make_no_sense(make_base, make_adapter, rng):
    r4 = FIXTURES / "lora-r4"
    for weight in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"lora-r4: weight = .*expected a finite number"):
            spectra.compare([], merge=[[(weight, r4)]])
    with pytest.raises(UsageError, match="a merge of nothing"):
        spectra.compare([], merge=[[]])
    # An embedding to one of them, and a matrix to the other.
    home = make_base({"model.table.weight": rng.normal(size=(30, 8)).astype("f4")}, "table")
    whole = make_base({"model.table.weight": rng.normal(size=(30, 8)).astype("f4")}, "whole")
    rows = {"base_model.model.model.table.trainable_tokens_delta": rng.normal(size=(2, 8)).astype("f4")}
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2], "r": None, "lora_alpha": None}
    tokens = make_adapter({}, "tokens", extra=rows, **config)
    with pytest.raises(UsageError, match=r"'model.table.weight' as linear, another as embedding"):
        spectra.compare([], home, merge=[[(0.5, whole), (0.5, tokens)]], quick=True)
    # One tensor that is embedding and head: an adapter of both merges with itself.
    home = make_base(
        {"model.embed_tokens.weight": rng.normal(size=(50, 20)).astype("f4")}, config={"tie_word_embeddings": True}
    )
    extra = {
        "base_model.model.model.embed_tokens.lora_embedding_A": rng.normal(size=(2, 50)).astype("f4"),
        "base_model.model.model.embed_tokens.lora_embedding_B": rng.normal(size=(20, 2)).astype("f4"),
    }
    head = (rng.normal(size=(50, 2)).astype("f4"), rng.normal(size=(2, 20)).astype("f4"))
    adapter = make_adapter({"lm_head": head}, extra=extra, target_modules=["embed_tokens", "lm_head"])
    found = spectra.compare([adapter], home, merge=[[(0.5, adapter), (0.5, adapter)]], quick=True)
    whole, merged_again = found.reports
    assert {layer.name for layer in whole.layers} == {"model.embed_tokens", "lm_head"}
    for one, other in zip(whole.layers, merged_again.layers, strict=True):
        assert one.measures["update_norm_fro"] == pytest.approx(other.measures["update_norm_fro"], rel=1e-6)


def test_the_canonical_form_names_no_places(family, tmp_path):
    shutil.copytree(FIXTURES / "lora-r1", tmp_path / "checkpoint-7")
    paths = [tmp_path / "checkpoint-7", tmp_path / "checkpoint-7"]
    found = spectra.compare(paths, FIXTURES / "base", quick=True, include=["layers.0.*"])
    assert str(tmp_path) not in found.to_json(canonical=True)
    assert "checkpoint-7" not in found.to_json(canonical=True)
    merged_steps = spectra.compare([], FIXTURES / "base", merge=[[(1, paths[0])]], quick=True, include=["layers.0.*"])
    assert merged_steps.steps == (None,)
