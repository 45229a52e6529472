"""Combinations of adapters: the laws against float64, where Hugging Face PEFT is right, and where it is not."""

import math
import sys

import peft
import peftops
import pytest
import torch
from peftops.methods import deltas
from peftops.methods.combine import combine
from peftops.methods.files import PREFIX, load_adapter, save_adapter
from peftops.methods.progress import progress
from torch import nn

from .models import Net, distance, llama, tokens
from .saved_adapters import TARGETS, adapter, delta, rank_of, same, stored

LOW_RANK = ("linear", "cat", "svd")
DENSE = ("ties", "dare", "dare_ties")


# ---- the sum ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": ({}, {}, lambda layer: (5 / 3, 5 / 3)),
    "rslora": (
        {"use_rslora": True},
        {"r": 7, "use_rslora": True},
        lambda layer: (5 / math.sqrt(3), 5 / math.sqrt(7)),
    ),
    "ranks": ({}, {"r": 5, "lora_alpha": 2}, lambda layer: (5 / 3, 2 / 5)),
    "patterns": (
        {"rank_pattern": {"conv": 2}, "alpha_pattern": {"up": 9}},
        {"alpha_pattern": {"embed|down": 1}, "use_rslora": True},
        lambda layer: (
            {"conv": 5 / 2, "up": 9 / 3}.get(layer, 5 / 3),
            (1 if layer in ("embed", "down") else 5) / math.sqrt(3),
        ),
    ),
    "bias": (
        {"lora_bias": True, "targets": TARGETS[1:]},
        {"lora_bias": True, "targets": TARGETS[1:], "use_rslora": True},
        lambda layer: (5 / 3, 5 / math.sqrt(3)),
    ),
}


@pytest.mark.parametrize("kind", ["linear", "cat"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (2.0, -0.5)])
def test_sum_against_float64(variant, kind, weights, tmp_path):
    first, second, scalings = VARIANTS[variant]
    paths = {"a": adapter(tmp_path, "a", **first), "b": adapter(tmp_path, "b", **second)}
    report = combine(paths, weights, kind, output=tmp_path / "out")
    for layer in first.get("targets", TARGETS):
        wanted = [
            sum(w * part for w, part in zip(weights, parts, strict=True))
            for parts in zip(
                *(delta(p, layer, s) for p, s in zip(paths.values(), scalings(layer), strict=True)), strict=True
            )
        ]
        for actual, expected in zip(stored(tmp_path / "out", layer), wanted, strict=True):
            if expected.norm():
                same(actual, expected)
    assert [layer.name for layer in report.layers] == sorted(first.get("targets", TARGETS))
    assert report.worst.error < 3e-7
    assert all(layer.rank == rank_of(tmp_path / "out", layer.name) for layer in report.layers)


@pytest.mark.parametrize("kind", LOW_RANK)
@pytest.mark.parametrize("weights", [{"a": 1, "b": 0}, {"b": 0.0, "a": 1.0}])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"up": 2}, "rank_pattern": {"conv": 5}}]
)
def test_one_adapter_alone_is_reproduced_with_its_bits(kind, weights, options, tmp_path):
    paths = {"a": adapter(tmp_path, "a", **options), "b": adapter(tmp_path, "b", r=4, targets=["head"])}
    report = combine(paths, weights, kind, output=tmp_path / "out")
    before, after = load_adapter(paths["a"])[1], load_adapter(tmp_path / "out")[1]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert report.worst.error < 1e-15
    ids = tokens()
    net = Net()
    outputs = []
    for path in (paths["a"], tmp_path / "out"):
        tuning = peftops.load(net, path)
        outputs.append(net(ids))
        tuning.detach()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0 if not options else 1e-6, atol=0 if not options else 1e-6)


@pytest.mark.parametrize("kind", deltas.KINDS)
def test_weights_of_zero_give_the_base(kind, tmp_path):
    paths = {"a": adapter(tmp_path, "a", modules_to_save=["head"]), "b": adapter(tmp_path, "b", bias="all")}
    combine(paths, [0, 0], kind, output=tmp_path / "out")
    net, ids = Net(), tokens()
    base = net(ids)
    peftops.load(net, tmp_path / "out")
    torch.testing.assert_close(net(ids), base)


def test_layer_that_an_adapter_lacks_counts_as_zero(tmp_path):
    paths = {"a": adapter(tmp_path, "a", targets=["up", "conv"]), "b": adapter(tmp_path, "b", targets=["up", "head"])}
    combine(paths, {"a": 2.0, "b": 3.0}, output=tmp_path / "out")
    for layer in ("up", "conv", "head"):
        same(
            stored(tmp_path / "out", layer)[0],
            sum(w * delta(paths[n], layer, 5 / 3)[0] for n, w in (("a", 2), ("b", 3))),
        )
    tuning = peftops.load(Net(), tmp_path / "out")
    assert {module.name for module in tuning.summary().modules} == {"conv", "up", "head"}


@pytest.mark.parametrize(
    ("one", "other", "wide"),
    [("bfloat16", "bfloat16", "bfloat16"), ("float16", "bfloat16", "float32"), ("bfloat16", "float32", "float32")],
)
@pytest.mark.parametrize("kind", deltas.KINDS)
def test_dtype_is_the_widest(one, other, wide, kind, tmp_path):
    paths = {name: adapter(tmp_path, name, getattr(torch, dtype)) for name, dtype in (("a", one), ("b", other))}
    report = combine(paths, [0.7, 0.4], kind, output=tmp_path / "out", **({"density": 1.0} if kind in DENSE else {}))
    assert {layer.dtype for layer in report.layers} == {getattr(torch, wide)}
    if kind in ("linear", "cat"):
        # One rounding of each factor that is scaled.
        assert report.worst.error < (1e-2 if wide == "bfloat16" else 1e-6)
        for entry in report.layers:
            wanted = sum(w * delta(paths[n], entry.name, 5 / 3)[0] for n, w in (("a", 0.7), ("b", 0.4)))
            assert distance(stored(tmp_path / "out", entry.name)[0], wanted) == pytest.approx(entry.error, abs=1e-8)


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "cat"])
@pytest.mark.parametrize("reader", ["peftops", "peft"])
def test_the_combination_loads_and_adds_the_deltas(kind, reader, tmp_path):
    """base + sum of w (merged weight - base weight), in a transformer with rslora, patterns and mixed targets."""
    weights = {"a": 0.8, "b": -0.5}
    config = llama().config
    model = type(llama())(config)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    paths = {}
    for name, options in (
        (
            "a",
            {
                "target_modules": ["q_proj", "down_proj"],
                "use_rslora": True,
                "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            },
        ),
        ("b", {"target_modules": ["q_proj", "v_proj"], "r": 5, "alpha_pattern": {"v_proj": 3}}),
    ):
        model.load_state_dict(state)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
        wrapped.save_pretrained(tmp_path / name)
        paths[name] = tmp_path / name
        model = wrapped.unload()
    wanted = {key: value.double() for key, value in state.items()}
    for name, path in paths.items():
        model.load_state_dict(state)
        merged = peft.PeftModel.from_pretrained(model, path).merge_and_unload()
        for key, value in merged.state_dict().items():
            wanted[key] = wanted[key] + weights[name] * (value.double() - state[key].double())
    combine(paths, weights, kind, output=tmp_path / "out")
    model.load_state_dict({key: value.float() for key, value in wanted.items()})
    ids = tokens()
    expected = model.eval()(ids).logits
    model.load_state_dict(state)
    base = model(ids).logits
    if reader == "peft":
        actual = peft.PeftModel.from_pretrained(model, tmp_path / "out")(ids).logits
    else:
        peftops.load(model, tmp_path / "out")
        actual = model(ids).logits
    assert distance(actual, expected) < 1e-5 < 1e-2 < distance(base, expected)


# ---- what is stored whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"modules_to_save": ["head"]}, {"bias": "all"}, {"bias": "lora_only"}])
@pytest.mark.parametrize("kind", ["linear", "ties"])
def test_heads_and_biases_are_averaged(options, kind, tmp_path):
    """base + sum of w_i (value_i - base) is the weighted mean where the weights sum to 1."""
    net = Net()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    paths = {}
    for name in "ab":
        paths[name] = adapter(tmp_path, name, net=Net(), targets=["up"], **options)
    combine(paths, [1.25, -0.25], kind, output=tmp_path / "out")
    found, ours = [load_adapter(path)[1] for path in paths.values()], load_adapter(tmp_path / "out")[1]
    keys = [key for key in ours if "lora_" not in key]
    assert keys == [key for key in found[0] if "lora_" not in key] and keys
    for key in keys:
        same(ours[key], 1.25 * found[0][key].double() - 0.25 * found[1][key].double())
    net.load_state_dict(state)
    tuning = peftops.load(net, tmp_path / "out")
    name = "head.weight" if "modules_to_save" in options else "up.bias"
    key = PREFIX + name.replace("up.bias", "up.base_layer.bias")
    assert torch.equal(net.get_parameter(name), ours[key])
    assert tuning.method.bias == options.get("bias", "none")


def test_weights_that_do_not_sum_to_one_need_the_base(tmp_path):
    paths = {name: adapter(tmp_path, name, targets=["up"], modules_to_save=["head"]) for name in "ab"}
    with pytest.raises(ValueError, match=r"head.bias is stored whole in 'a', 'b', whose weights sum to 2; .* sum to 1"):
        combine(paths, [1, 1], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_head_of_one_adapter_is_kept_where_its_weight_is_one(tmp_path):
    paths = {"a": adapter(tmp_path, "a", modules_to_save=["head"]), "b": adapter(tmp_path, "b")}
    combine(paths, [1, 0.5], output=tmp_path / "out")
    before, (config, after) = load_adapter(paths["a"])[1], load_adapter(tmp_path / "out")
    assert config["modules_to_save"] == ["head"]
    assert torch.equal(before[f"{PREFIX}head.weight"], after[f"{PREFIX}head.weight"])
    with pytest.raises(ValueError, match="stored whole in 'a', whose weights sum to 0.5"):
        combine(paths, [0.5, 1], output=tmp_path / "other")


def test_copies_of_the_embedding_must_be_the_same(tmp_path):
    """PEFT stores the whole frozen embedding beside its factors."""
    base, paths = llama(), {}
    state = {key: value.clone() for key, value in base.state_dict().items()}
    for name in "ab":
        base.load_state_dict(state)
        config = peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
        wrapped = peft.get_peft_model(base, config)
        wrapped.save_pretrained(tmp_path / name)
        paths[name], base = tmp_path / name, wrapped.unload()
    combine(paths, [1, 2], output=tmp_path / "out")
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    config, tensors = load_adapter(tmp_path / "out")
    assert torch.equal(tensors[key], state["model.embed_tokens.weight"])
    peftops.load(base, tmp_path / "out")
    config, tensors = load_adapter(paths["a"])
    save_adapter(tmp_path / "a", config, {**tensors, key: tensors[key] + 1})
    with pytest.raises(
        ValueError, match="embed_tokens.base_layer.weight, a weight of the base .* differs in 'a' and 'b'"
    ):
        combine(paths, [1, 2], output=tmp_path / "other")


# ---- refused ---------------------------------------------------------------------------------------------------------


def refused(tmp_path, match, paths=None, weights=(1, 1), **options):
    paths = paths or {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b")}
    with pytest.raises(ValueError, match=match):
        combine(paths, weights, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "options", "match"),
    [
        ((1, 1), {"kind": "mean"}, "kind is 'mean', but it must be one of 'linear', 'cat'"),
        ((1,), {}, "must hold 2 numbers"),
        ({"a": 1, "c": 1}, {}, r"weights names \['a', 'c'\], but adapters has \['a', 'b'\]"),
        ((1, math.nan), {}, "weight of 'b' is nan"),
        ((math.inf, 1), {}, "weight of 'a' is inf"),
        ((1, "1"), {}, "weight of 'b' is '1'"),
        ((1, 1), {"rank": 0}, "rank is 0"),
        ((1, 1), {"rank": 4, "kind": "cat"}, 'rank of "cat" is the sum'),
        ((1, 1), {"density": 0.5}, "'linear' drops nothing"),
        ((1, 1), {"density": 0, "kind": "ties"}, r"density is 0, but it must be in \(0, 1\]"),
        ((1, 1), {"density": 1.5, "kind": "dare"}, "density is 1.5"),
    ],
)
def test_bad_arguments(weights, options, match, tmp_path):
    refused(tmp_path, match, {"a": tmp_path, "b": tmp_path}, weights, **options)


def test_no_adapters():
    with pytest.raises(ValueError, match="it must map names to directories"):
        combine({}, [], output="nowhere")


def test_different_shapes_and_kinds_are_listed(tmp_path):
    wide, other = Net(), Net()
    wide.up, other.conv = nn.Linear(10, 15), nn.Linear(12, 10)
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b", net=wide), "c": adapter(tmp_path, "c", net=other)}
    refused(
        tmp_path,
        r"\(2\): .*up is a linear layer \[10\] -> 14 in 'a', a linear layer \[10\] -> 15 in 'b'",
        paths,
        (1, 1, 1),
    )
    refused(
        tmp_path, r"conv is a convolution \[12, 3\] -> 10 in 'a', a linear layer \[12\] -> 10 in 'c'", paths, (1, 1, 1)
    )


def test_bias_modes_must_agree(tmp_path):
    paths = {"a": adapter(tmp_path, "a", bias="all"), "b": adapter(tmp_path, "b")}
    refused(tmp_path, "bias must be the same, but is 'all' in 'a', 'none' in 'b'", paths)


def test_bias_of_b_beside_an_embedding(tmp_path):
    """No adapter could hold both."""
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b", targets=["up"], lora_bias=True)}
    refused(tmp_path, "'b' has lora_bias, which cannot stand beside an embedding, embed", paths)


def test_bias_of_b_in_one_adapter_alone(tmp_path):
    paths = {
        "a": adapter(tmp_path, "a", targets=["up", "conv"]),
        "b": adapter(tmp_path, "b", targets=["up"], lora_bias=True),
    }
    combine(paths, [1, 0.5], output=tmp_path / "out")
    same(stored(tmp_path / "out", "up")[1], 0.5 * delta(paths["b"], "up", 5 / 3)[1])
    assert not stored(tmp_path / "out", "conv")[1].any()
    peftops.load(Net(), tmp_path / "out")
    peft.PeftModel.from_pretrained(Net(), tmp_path / "out")


def test_factors_that_are_not_finite(tmp_path):
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b")}
    config, tensors = load_adapter(paths["b"])
    tensors[f"{PREFIX}up.lora_A.weight"][0, 0] = math.nan
    save_adapter(paths["b"], config, tensors)
    refused(tmp_path, r"'b' \(.*\): .*up.lora_A.weight holds values that are not finite", paths)


def test_result_beyond_its_dtype(tmp_path):
    paths = {"a": adapter(tmp_path, "a", torch.float16), "b": adapter(tmp_path, "b", torch.float16)}
    refused(tmp_path, "would not be finite in torch.float16", paths, (1e12, 1e-12), kind="ties")


@pytest.mark.parametrize(
    ("options", "match"),
    [({"use_dora": True}, "use_dora is True"), ({"init_lora_weights": "pissa"}, "fits another base")],
)
def test_other_methods(options, match, tmp_path):
    path = adapter(tmp_path, "a", targets=["up"], **options)
    refused(tmp_path, match, {"a": path, "b": path})


def test_grouped_convolution(tmp_path):
    net = Net()
    net.conv = nn.Conv1d(12, 10, 3, padding=1, groups=2)
    with pytest.warns(UserWarning, match="groups > 1"):
        path = adapter(tmp_path, "a", net=net, r=4)
    refused(tmp_path, r"conv has B .* \(a convolution with groups, which cannot be combined", {"a": path, "b": path})


def test_factor_of_an_unknown_kind(tmp_path):
    path = adapter(tmp_path, "a")
    config, tensors = load_adapter(path)
    save_adapter(path, config, {**tensors, f"{PREFIX}up.lora_magnitude_vector": torch.ones(14)})
    refused(tmp_path, "lora_magnitude_vector is not supported", {"a": path, "b": path})


def test_directory_without_factors(tmp_path):
    path = adapter(tmp_path, "a", modules_to_save=["head"])
    config, tensors = load_adapter(path)
    save_adapter(path, config, {key: value for key, value in tensors.items() if "lora_" not in key})
    refused(tmp_path, "holds no LoRA factors", {"a": path, "b": path})


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_half_a_layer(missing, tmp_path):
    path = adapter(tmp_path, "a")
    config, tensors = load_adapter(path)
    del tensors[f"{PREFIX}up.{missing}.weight"]
    save_adapter(path, config, tensors)
    refused(tmp_path, "up has only one of its factors", {"a": path, "b": path})


def test_rank_that_the_configuration_does_not_say(tmp_path):
    path = adapter(tmp_path, "a")
    config, tensors = load_adapter(path)
    save_adapter(path, {**config, "r": 4}, tensors)
    refused(tmp_path, r"A \[3, .*\], but its rank is 4", {"a": path, "b": path})


def test_recorded_bases(tmp_path):
    """A fingerprint speaks of the base under the adapted layers: it is compared between equal sets of layers."""
    paths = {}
    for name, targets in (("a", ["up"]), ("b", ["up"]), ("c", ["down"])):
        net = Net()
        tuning = peftops.attach(net, peftops.LoRA(rank=2, target_modules=targets))
        tuning.save(tmp_path / name)
        paths[name] = tmp_path / name
    refused(tmp_path, "'a' and 'b' were trained on different base models", {"a": paths["a"], "b": paths["b"]})
    combine({"a": paths["a"], "c": paths["c"]}, [1, 1], output=tmp_path / "mixed")
    assert "peftops_base_fingerprint" not in load_adapter(tmp_path / "mixed")[0]
    combine({"a": paths["a"], "again": paths["a"]}, [1, 1], output=tmp_path / "same")
    configs = [load_adapter(path)[0] for path in (paths["a"], tmp_path / "same")]
    assert configs[0]["peftops_base_fingerprint"] == configs[1]["peftops_base_fingerprint"]


def test_names_of_different_bases_are_a_warning(tmp_path):
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b")}
    for name, path in paths.items():
        config, tensors = load_adapter(path)
        save_adapter(path, {**config, "base_model_name_or_path": f"base-{name}", "task_type": "CAUSAL_LM"}, tensors)
    with pytest.warns(UserWarning, match="'a': 'base-a', 'b': 'base-b'"):
        combine(paths, [1, 1], output=tmp_path / "out")
    config = load_adapter(tmp_path / "out")[0]
    assert config["base_model_name_or_path"] is None and config["task_type"] == "CAUSAL_LM"


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report(tmp_path):
    paths = {"a": adapter(tmp_path, "a"), "b": adapter(tmp_path, "b")}
    report = combine(paths, [0.5, 0.25], "svd", output=tmp_path / "out", rank=2)
    lines = str(report).splitlines()
    assert lines[0] == f"svd of a: 0.5, b: 0.25 -> {tmp_path / 'out'}" and len(lines) == 2 + len(TARGETS)
    assert lines[2].split()[0] == report.worst.name and report.weights == {"a": 0.5, "b": 0.25}
    errors = [float(line.split()[-1]) for line in lines[2:]]
    assert errors == sorted(errors, reverse=True)


def test_the_same_targets_keep_their_choice(tmp_path):
    options = {"targets": r"up|down"}
    combine(
        {"a": adapter(tmp_path, "a", **options), "b": adapter(tmp_path, "b", **options)}, [1, 1], output=tmp_path / "x"
    )
    assert load_adapter(tmp_path / "x")[0]["target_modules"] == "up|down"
    combine({"a": tmp_path / "a", "c": adapter(tmp_path, "c", targets=["up"])}, [1, 1], output=tmp_path / "y")
    assert load_adapter(tmp_path / "y")[0]["target_modules"] == ["down", "up"]


def test_long_work_shows_its_progress_on_a_terminal(monkeypatch, capsys):
    items = list(range(3))
    assert list(progress(items, "combine")) == items and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(items, "combine")) == items
    assert "0/3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress(items, "combine")) == items and capsys.readouterr().err == ""
