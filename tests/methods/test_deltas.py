"""The arithmetic of combining adapters: the best low-rank sums, TIES and DARE, and Hugging Face PEFT's."""

import json
import math

import peft
import pytest
import torch
from peftops.methods import deltas
from peftops.methods.combine import combine
from peftops.methods.files import PREFIX, load_adapter

from .models import Net, distance
from .saved_adapters import TARGETS, adapter, delta, same, stored

LOW_RANK = ("linear", "cat", "svd")
DENSE = ("ties", "dare", "dare_ties")


# ---- low rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOW_RANK)
def test_negative_weight_takes_an_adapter_away(kind, tmp_path):
    path = adapter(tmp_path, "a")
    report = combine({"a": path, "again": path}, [1, -1], kind, output=tmp_path / "out")
    for layer in TARGETS:
        assert stored(tmp_path / "out", layer)[0].norm() < 1e-6
    assert {layer.rank for layer in report.layers} == ({6} if kind == "cat" else {1})


def test_linear_takes_the_smallest_rank_that_holds_the_sum(tmp_path):
    path, other = adapter(tmp_path, "a"), adapter(tmp_path, "b", r=4)
    report = combine({"a": path, "again": path, "b": other}, [0.25, 0.75, 2], output=tmp_path / "out")
    assert {layer.rank for layer in report.layers} == {7} and report.worst.error < 3e-7
    for layer in TARGETS:
        same(stored(tmp_path / "out", layer)[0], delta(path, layer, 5 / 3)[0] + 2 * delta(other, layer, 5 / 4)[0])


@pytest.mark.parametrize(
    ("kind", "rank", "stored_rank"), [("svd", None, 4), ("svd", 2, 2), ("linear", 5, 5), ("svd", 50, 7)]
)
def test_low_rank_approximation_is_the_best_one(kind, rank, stored_rank, tmp_path):
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b", r=4, use_rslora=True)}
    report = combine(paths, [0.6, 0.4], kind, rank=rank, output=tmp_path / "out")
    for entry in report.layers:
        wanted = 0.6 * delta(paths["a"], entry.name, 5 / 3)[0] + 0.4 * delta(paths["b"], entry.name, 5 / 2)[0]
        values = torch.linalg.svdvals(wanted)
        best = (values[stored_rank:].norm() / values.norm()).item()
        assert entry.rank == stored_rank and entry.error == pytest.approx(best, abs=3e-7)
        assert distance(stored(tmp_path / "out", entry.name)[0], wanted) == pytest.approx(entry.error, abs=1e-9)


# ---- TIES and DARE ---------------------------------------------------------------------------------------------------


def ties(vectors, density):
    """Algorithm 1 of the paper, entry by entry."""
    trimmed = []
    for vector in vectors:
        flat = vector.flatten()
        keep = flat.abs().argsort(descending=True)[: max(round(density * flat.numel()), 1)]
        trimmed.append(torch.zeros_like(flat).index_copy(0, keep, flat[keep]))
    merged = []
    for values in torch.stack(trimmed).T.tolist():
        sign = 1 if sum(values) >= 0 else -1
        chosen = [value for value in values if value * sign > 0]
        merged.append(sum(chosen) / len(chosen) if chosen else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(vectors[0].shape)


@pytest.mark.parametrize("density", [None, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0)])
def test_ties_against_the_paper(density, weights, tmp_path):
    paths = {name: adapter(tmp_path, name, r=r, use_rslora=r == 4) for name, r in (("a", 3), ("b", 4), ("c", 3))}
    report = combine(paths, weights, "ties", density=density, rank=99, output=tmp_path / "out")
    for layer in TARGETS:
        scalings = (5 / 3, 5 / 2, 5 / 3)
        vectors = [w * delta(p, layer, s)[0] for w, p, s in zip(weights, paths.values(), scalings, strict=True)]
        same(stored(tmp_path / "out", layer)[0], ties(vectors, density or 0.2), 3e-6)
    assert report.worst.error < 3e-6


def test_ties_leaves_out_an_adapter_of_weight_zero(tmp_path):
    paths = {name: adapter(tmp_path, name) for name in "abc"}
    combine(paths, [1, 1, 0], "ties", output=tmp_path / "three", rank=99)
    combine({name: paths[name] for name in "ab"}, [1, 1], "ties", output=tmp_path / "two", rank=99)
    assert (tmp_path / "three/adapter_model.safetensors").read_bytes() == (
        tmp_path / "two/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", DENSE)
def test_dense_kinds_are_stored_at_the_largest_rank_and_say_what_it_cost(kind, tmp_path):
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b", r=4)}
    whole = combine(paths, [1, 1], kind, density=0.5, rank=99, output=tmp_path / "whole")
    report = combine(paths, [1, 1], kind, density=0.5, output=tmp_path / "out")
    for entry in report.layers:
        wanted = stored(tmp_path / "whole", entry.name)[0]
        values = torch.linalg.svdvals(wanted)
        assert entry.rank == 4 and entry.error == pytest.approx((values[4:].norm() / values.norm()).item(), abs=1e-5)
        assert distance(stored(tmp_path / "out", entry.name)[0], wanted) == pytest.approx(entry.error, abs=1e-5)
    assert whole.worst.error < 1e-5 < report.worst.error


@pytest.mark.parametrize("kind", ["dare", "dare_ties"])
def test_dare_is_seeded(kind, tmp_path):
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b")}
    state = torch.get_rng_state()
    files = []
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        combine(paths, [1, 1], kind, output=tmp_path / name, seed=seed)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2] and torch.equal(torch.get_rng_state(), state)


def test_dare_drops_and_rescales():
    """Of 200 draws the mean is the sum, and a single one holds 1 / density times the entry or nothing."""
    a, b = torch.rand(6, 8) + 1, torch.rand(6, 8) + 1
    generator = torch.Generator().manual_seed(0)
    single = deltas._merged([a.clone()], "dare", 0.25, generator)
    kept = single != 0
    torch.testing.assert_close(single[kept], a[kept] * 4)
    draws = [deltas._merged([a.clone(), b.clone()], "dare", 0.25, generator) for _ in range(200)]
    assert distance(torch.stack(draws).mean(0), a + b) < 0.15
    share = (
        torch.stack([deltas._merged([a.clone()], "dare", 0.25, generator) for _ in range(200)]).ne(0).double().mean()
    )
    assert abs(share - 0.25) < 0.02


def test_dare_of_everything_is_the_sum(tmp_path):
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b")}
    combine(paths, [0.3, 0.9], "dare_linear", density=1, rank=99, output=tmp_path / "out")
    for layer in TARGETS:
        wanted = 0.3 * delta(paths["a"], layer, 5 / 3)[0] + 0.9 * delta(paths["b"], layer, 5 / 3)[0]
        same(stored(tmp_path / "out", layer)[0], wanted, 2e-6)


def test_large_matrices_take_a_randomised_svd(monkeypatch):
    matrix = torch.randn(90, 6) @ torch.randn(6, 80) + 0.05 * torch.randn(90, 80)
    state = torch.get_rng_state()
    exact = deltas._truncated(matrix, 8)
    monkeypatch.setattr(deltas, "_FULL_SVD", 10)
    near = deltas._truncated(matrix, 8)
    errors = [distance(u * s @ vh, matrix) for u, s, vh in (exact, near)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3) and torch.equal(torch.get_rng_state(), state)


# ---- Hugging Face PEFT -----------------------------------------------------------------------------------------------


def theirs(folder, paths, weights, kind, name="theirs", **options):
    """PEFT's own combination, in a directory."""
    first, *others = paths
    model = peft.PeftModel.from_pretrained(Net(), paths[first], adapter_name=first)
    for other in others:
        model.load_adapter(paths[other], other)
    model.add_weighted_adapter(list(paths), list(weights), name, combination_type=kind, **options)
    model.save_pretrained(folder, selected_adapters=[name])
    return folder / name


@pytest.mark.parametrize(
    ("kind", "options", "targets"),
    [
        ("cat", {}, ["embed", "up", "down"]),
        ("svd", {"rank": 2}, ["embed", "up", "down"]),
        ("svd", {"rank": 99}, ["embed", "up", "down"]),
        ("ties", {"rank": 99, "density": 0.5}, ["up", "down"]),
    ],
)
def test_as_peft_where_peft_is_right(kind, options, targets, tmp_path):
    """Without rslora, biases and cross terms. PEFT's TIES on deltas is called ties_svd; full rank is 10 there."""
    paths = {"a": adapter(tmp_path, "a", targets=targets), "b": adapter(tmp_path, "b", targets=targets)}
    combine(paths, [0.5, 0.5], kind, output=tmp_path / "ours", **options)
    others = {"svd_rank": min(options["rank"], 10)} if "rank" in options else {}
    others |= {"density": options["density"]} if "density" in options else {}
    name = {"ties": "ties_svd"}.get(kind, kind)
    other = theirs(tmp_path, paths, [0.5, 0.5], name, **others)
    for layer in targets:
        same(stored(tmp_path / "ours", layer)[0], stored(other, layer)[0], 1e-5)


def test_peft_adds_cross_terms_and_we_do_not(tmp_path):
    """PEFT's "linear" is (sum_i c_i B_i) (sum_j c_j A_j) with c = sqrt(w s): off by every B_i A_j."""
    paths = {"a": adapter(tmp_path, "a", targets=["up"]), "b": adapter(tmp_path, "b", targets=["up"])}
    combine(paths, [0.7, 0.3], output=tmp_path / "ours")
    other = theirs(tmp_path, paths, [0.7, 0.3], "linear")
    wanted = 0.7 * delta(paths["a"], "up", 5 / 3)[0] + 0.3 * delta(paths["b"], "up", 5 / 3)[0]
    factors = [load_adapter(path)[1] for path in paths.values()]
    a, b = ([f[f"{PREFIX}up.lora_{x}.weight"].double() for f in factors] for x in "AB")
    cross = 5 / 3 * math.sqrt(0.7 * 0.3) * (b[0] @ a[1] + b[1] @ a[0])
    same(stored(tmp_path / "ours", "up")[0], wanted)
    same(stored(other, "up")[0], wanted + cross, 1e-6)
    assert distance(stored(other, "up")[0], wanted) > 0.5


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_is_off_with_rslora_and_we_are_not(kind, tmp_path):
    options = {"targets": ["up"], "use_rslora": True, "r": 4}
    paths = {"a": adapter(tmp_path, "a", **options), "b": adapter(tmp_path, "b", **options)}
    combine(paths, [0.7, 0.3], kind, output=tmp_path / "ours", **({"rank": 8} if kind == "svd" else {}))
    other = theirs(tmp_path, paths, [0.7, 0.3], kind, **({"svd_rank": 8} if kind == "svd" else {}))
    wanted = 0.7 * delta(paths["a"], "up", 5 / 2)[0] + 0.3 * delta(paths["b"], "up", 5 / 2)[0]
    same(stored(tmp_path / "ours", "up")[0], wanted, 2e-6)
    config = json.loads((other / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["r"] == config["lora_alpha"] == 8
    same(delta(other, "up", math.sqrt(8))[0], math.sqrt(8) * wanted, 2e-6)
