"""Random walks through everything that a tuning can do; after each step the model is compared with the formula in
float64 on a copy of the base.
"""

import copy
import json
import pickle
import pkgutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peftops.methods import LoRA, attach, load
from peftops.methods.files import PREFIX
from safetensors.torch import load_file, save_file
from torch import nn

from .models import Net, distance, randomise, tokens

METHODS = {
    "plain": LoRA(rank=2, alpha=3, target_modules=["up", "down"]),
    "biased": LoRA(rank=3, alpha=2, target_modules=["up", "conv"], lora_bias=True, use_rslora=True),
    "head": LoRA(rank=1, alpha=4, target_modules=["down"], modules_to_save=["head"]),
    "biases": LoRA(rank=4, alpha=4, target_modules=["up", "conv", "head"], bias="lora_only"),
    "embed": LoRA(rank=2, alpha=1, target_modules=["embed", "down"], alpha_pattern={"embed": 6}),
    "all": LoRA(rank=2, alpha=1, target_modules=["up"], bias="all"),
}
NAMES = st.sampled_from("abc")
KINDS = st.sampled_from(sorted(METHODS))
SHAPES = {
    "embed": lambda r: ((r, 11), (12, r)),
    "conv": lambda r: ((r, 12, 3), (10, r, 1)),
    "up": lambda r: ((r, 10), (14, r)),
    "down": lambda r: ((r, 14), (10, r)),
    "head": lambda r: ((r, 10), (4, r)),
}


class Known:
    """What the walk knows of one adapter: method; layers, name -> (A, B, bias of B or None, s); own, full name in the
    model -> value that replaces the base's; trainable.
    """

    def __init__(self, method, trainable):
        self.method, self.trainable = method, trainable
        self.layers, self.own = {}, {}

    @classmethod
    def drawn(cls, method, base):
        """Random values, as after training."""
        known = cls(method, trainable=False)
        for path in method.target_modules:
            adapter = method.adapter_of(path)
            a, b = (torch.randn(shape, dtype=torch.float64) * 0.3 for shape in SHAPES[path](adapter.rank))
            bias = torch.randn(len(b), dtype=torch.float64) if method.lora_bias else None
            known.layers[path] = (a, b, bias, adapter.scaling)
        known.own = {name: base[name] + torch.randn_like(base[name]) * 0.1 for name in own_names(method, base)}
        return known

    def read(self, model, name):
        """Take over what training has made of it."""
        parameters = dict(model.named_parameters())
        for path, (a, b, bias, s) in self.layers.items():
            live = [parameters.get(f"{path}.{key}.{name}") for key in ("lora_a", "lora_b", "lora_bias")]
            assert live[0][len(a) :].abs().sum() == 0 and live[1][:, b.shape[1] :].abs().sum() == 0
            a, b = live[0].detach()[: len(a)].clone(), live[1].detach()[:, : b.shape[1]].clone()
            self.layers[path] = (a, b, None if bias is None else live[2].detach().clone(), s)
        self.own = {key: parameters[key].detach().clone() for key in self.own}

    def write(self, folder):
        """In PEFT's format, by its rules for the names."""
        tensors = {}
        for path, (a, b, bias, _) in self.layers.items():
            kind = "lora_embedding_{}" if path == "embed" else "lora_{}.weight"
            tensors[f"{PREFIX}{path}.{kind.format('A')}"] = a
            tensors[f"{PREFIX}{path}.{kind.format('B')}"] = b
            if bias is not None:
                tensors[f"{PREFIX}{path}.lora_B.bias"] = bias
        for name, value in self.own.items():
            owner, key = name.split(".")
            tensors[f"{PREFIX}{owner}{'.base_layer' if owner in self.layers else ''}.{key}"] = value
        folder.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
        method = self.method
        config = {"peft_type": "LORA", "r": method.rank, "lora_alpha": method.alpha, "bias": method.bias}
        config |= {
            "use_rslora": method.use_rslora,
            "lora_bias": method.lora_bias,
            "alpha_pattern": method.alpha_pattern,
        }
        config |= {"target_modules": list(method.target_modules), "modules_to_save": method.modules_to_save}
        (folder / "adapter_config.json").write_text(json.dumps(config))


def own_names(method, base):
    """The parameters that the method trains outside of its factors."""
    biases = {"none": (), "lora_only": method.target_modules, "all": ("conv", "up", "head")}[method.bias]
    heads = [name for name in base if name.startswith(tuple(f"{path}." for path in method.modules_to_save or ()))]
    return [*heads, *(f"{path}.bias" for path in biases if f"{path}.bias" in base)]


def summed(base, adapters):
    """The base's parameters with these adapters (pairs of a Known and its weight) in them."""
    values = dict(base)
    for known, _ in adapters:
        values.update(known.own)
    for known, weight in adapters:
        for path, (a, b, bias, s) in known.layers.items():
            product = weight * s * (b.flatten(1) @ a.flatten(1))
            product = product.t() if path == "embed" else product
            values[f"{path}.weight"] = values[f"{path}.weight"] + product.view(base[f"{path}.weight"].shape)
            if bias is not None:
                values[f"{path}.bias"] = values.get(f"{path}.bias", 0.0) + weight * s * bias
    return values


class Walk(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.written = 0

    def teardown(self):
        if hasattr(self, "tuning"):
            model = self.tuning.detach()
            state = model.state_dict()
            assert state.keys() == self.base.keys()
            assert all(torch.equal(value, self.base[name]) for name, value in state.items())
            assert all(parameter.requires_grad for parameter in model.parameters())
            assert [type(module) for module in model.modules()] == [type(module) for module in self.net.modules()]
        self.folder.cleanup()

    @initialize(seed=st.integers(0, 2**31), name=NAMES, kind=KINDS, from_file=st.booleans(), trainable=st.booleans())
    def start(self, seed, name, kind, from_file, trainable):
        torch.manual_seed(seed)
        self.net, self.ids = Net().double(), tokens(2, 5)
        self.base = {key: value.clone() for key, value in self.net.state_dict().items()}
        model = copy.deepcopy(self.net)
        if from_file:
            known, folder = self._directory(kind)
            self.tuning = load(model, folder, trainable=trainable, name=name)
        else:
            known, self.tuning = Known(METHODS[kind], trainable=True), attach(model, METHODS[kind], name=name)
            self._learn(known, kind)
        known.trainable = trainable or not from_file
        self.known, self.active, self.merged = {name: known}, {name: 1.0}, False
        self._settle(name, known, from_file)

    def _directory(self, kind):
        known = Known.drawn(METHODS[kind], self.base)
        folder = Path(self.folder.name) / str(self.written)
        self.written += 1
        known.write(folder)
        return known, folder

    def _learn(self, known, kind):
        """Shapes and s of a new adapter; its values are read from the model."""
        drawn = Known.drawn(METHODS[kind], self.base)
        known.layers, known.own = drawn.layers, {key: self.base[key] for key in drawn.own}

    def _settle(self, name, known, from_file):
        """Give a new adapter values as after training."""
        if from_file:
            return
        own, known.own = known.own, {}
        with torch.no_grad():
            for key, parameter in self.tuning.model.named_parameters():
                if key.endswith(f".{name}"):
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        known.read(self.tuning.model, name)
        known.own = own

    def _conflict(self, names):
        own = [key for name in names for key in self.known[name].own]
        return len(own) > len(set(own))

    # ---- steps -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.merged)
    @rule(name=NAMES, kind=KINDS, from_file=st.booleans(), trainable=st.booleans())
    def add(self, name, kind, from_file, trainable):
        known, source = Known(METHODS[kind], trainable), METHODS[kind]
        if from_file:
            known, source = self._directory(kind)
        if name in self.known:
            with pytest.raises(ValueError, match="there is an adapter of that name"):
                self.tuning.add(name, source)
            return
        self.tuning.add(name, source, trainable=trainable)
        if not from_file:
            self._learn(known, kind)
            self._settle(name, known, from_file)
        known.trainable = trainable
        self.known[name] = known

    @precondition(lambda self: not self.merged)
    @rule(weights=st.dictionaries(NAMES, st.sampled_from([1.0, 0.3, -2.0, 0.0])))
    def activate(self, weights):
        weights = {name: weight for name, weight in weights.items() if name in self.known}
        if self._conflict(weights):
            with pytest.raises(ValueError, match="one of them can be active"):
                self.tuning.activate(weights)
            return
        self.tuning.activate(weights)
        self.active = weights

    @precondition(lambda self: not self.merged)
    @rule(name=NAMES, kind=KINDS)
    def swap(self, name, kind):
        if name not in self.known:
            return
        known, folder = self._directory(kind)
        before = dict(self.tuning.named_parameters())
        others = [key for key in self.active if key != name]
        if name in self.active and any(key in self.known[other].own for other in others for key in known.own):
            with pytest.raises(ValueError, match="one of them can be active"):
                self.tuning.swap(name, folder)
            return
        self.tuning.swap(name, folder)
        known.trainable = self.known[name].trainable
        self.known[name] = known
        assert all(before.get(key, parameter) is parameter for key, parameter in self.tuning.named_parameters())

    @precondition(lambda self: not self.merged)
    @rule(name=NAMES)
    def delete(self, name):
        if name in self.known and len(self.known) > 1:
            self.tuning.delete(name)
            del self.known[name]
            self.active.pop(name, None)

    @precondition(lambda self: not self.merged)
    @rule()
    def train(self):
        if not any(self.known[name].trainable for name in self.active):
            return
        optimizer = self.tuning.optimizer(1e-2, weight_decay=0.1)
        for _ in range(2):
            self.tuning.model(self.ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name in self.active:
            self.known[name].read(self.tuning.model, name)

    @rule()
    def merge(self):
        self.tuning.merge()
        self.merged = True

    @rule()
    def unmerge(self):
        self.tuning.unmerge()
        self.merged = False

    @precondition(lambda self: self.merged)
    @rule(name=NAMES)
    def what_needs_the_factors_is_refused(self, name):
        for call in (lambda: self.tuning.add(name, METHODS["plain"]), lambda: self.tuning.activate(name)):
            with pytest.raises(RuntimeError, match="not possible while merged"):
                call()

    @rule()
    def disabled(self):
        with self.tuning.disabled():
            assert torch.equal(self.tuning.model(self.ids), self.net(self.ids))

    @rule(name=NAMES, back=st.booleans())
    def save(self, name, back):
        if name not in self.known:
            return
        folder = Path(self.folder.name) / "out"
        self.tuning.save(folder, name)
        model = copy.deepcopy(self.net)
        load(model, folder)
        self._compare(model, [(self.known[name], 1.0)])

    @rule(how=st.sampled_from([copy.deepcopy, lambda tuning: pickle.loads(pickle.dumps(tuning))]))
    def copied(self, how):
        old, self.tuning = self.tuning, how(self.tuning)
        old.detach()

    # ---- after each step ---------------------------------------------------------------------------------------------

    @invariant()
    def model_is_the_formula(self):
        adapters = [(self.known[name], weight) for name, weight in self.active.items()]
        self._compare(self.tuning.model, adapters)
        assert self.tuning.active == self.active and self.tuning.adapters.keys() == self.known.keys()
        assert self.tuning.merged == self.merged

    @invariant()
    def trained_is_what_was_asked_for(self):
        wanted = set()
        for name, known in self.known.items():
            if known.trainable:
                for path, (*_, bias, _) in known.layers.items():
                    keys = ("lora_a", "lora_b") if bias is None else ("lora_a", "lora_b", "lora_bias")
                    wanted.update(f"{path}.{key}.{name}" for key in keys)
                wanted.update(known.own if name in self.active else ())
        assert {name for name, _ in self.tuning.named_parameters()} == wanted
        assert {name for name, p in self.tuning.model.named_parameters() if p.requires_grad} == wanted

    def _compare(self, model, adapters):
        values = summed(self.base, adapters)
        reference = copy.deepcopy(self.net)
        for name, value in values.items():  # a bias of B may be the layer's only one
            reference.get_submodule(name.split(".")[0]).register_parameter(name.split(".")[1], nn.Parameter(value))
        # The scale is a float32 number.
        assert distance(model(self.ids), reference(self.ids)) < 1e-6


TestWalk = Walk.TestCase
TestWalk.settings = hypothesis.settings(stateful_step_count=12)


# ---- what a walk has no step for -------------------------------------------------------------------------------------


def up_and_down(**options):
    """A tuning with two adapters, both active."""
    tuning = attach(Net(), METHODS["plain"], name="a")
    tuning.add("b", LoRA(rank=3, target_modules=["up", "conv"], **options), trainable=True)
    tuning.activate(["a", "b"])
    randomise(tuning)
    return tuning


def test_a_swap_drops_the_gradients_of_what_it_replaces(tmp_path):
    attach(Net(), LoRA(rank=5, target_modules=["up", "down"])).save(tmp_path)
    tuning, ids = up_and_down(), tokens()
    tuning.model(ids).sum().backward()
    with pytest.warns(UserWarning, match="another base model"):
        tuning.swap("a", tmp_path)
    assert all((p.grad is None) == name.endswith(".a") for name, p in tuning.named_parameters())
    tuning.model(ids).sum().backward()


def test_a_head_that_leaves_takes_its_gradient_along():
    method, ids = LoRA(rank=1, target_modules=["up"], modules_to_save=["head"]), tokens()
    tuning = attach(Net(), method, name="a")
    tuning.add("b", method, trainable=True)
    tuning.model(ids).sum().backward()
    head = tuning.model.head.weight
    with tuning.disabled():
        tuning.model(ids)
    tuning.activate({"a": 0.5})
    assert head.grad is not None
    tuning.activate("b")
    assert head.grad is None


def test_parameters_that_the_user_unfroze_stay_so(tmp_path):
    attach(Net(), LoRA(rank=2, target_modules=["head", "down"])).save(tmp_path)
    tuning = up_and_down()
    mine = [tuning.model.head.weight, tuning.model.head.bias, tuning.model.up.bias, tuning.model.embed.weight]
    for parameter in mine:
        parameter.requires_grad_(True)
    with pytest.warns(UserWarning, match="another base model"):
        tuning.swap("a", tmp_path)
        tuning.add("c", tmp_path)
    tuning.add("d", LoRA(rank=1, target_modules=["embed", "up"]))
    tuning.activate("c")
    tuning.delete("a")
    assert all(parameter.requires_grad for parameter in mine)


@pytest.mark.parametrize("place", ["peftops.nn.lora.LoRALayer.delta_weight", "peftops.methods.tuning.measure_layer"])
def test_a_merge_that_fails_half_way_leaves_nothing_behind(place, monkeypatch):
    tuning, ids = up_and_down(lora_bias=True), tokens()
    before, output = copy.deepcopy(tuning.model.state_dict()), tuning.model(ids)
    with monkeypatch.context() as patch:
        patch.setattr(place, failing_after(pkgutil.resolve_name(place), 2))
        with pytest.raises(MemoryError):
            tuning.merge(report=True)
    assert not tuning.merged and torch.equal(tuning.model(ids), output)
    assert all(torch.equal(value, before[key]) for key, value in tuning.model.state_dict().items())


def failing_after(function, calls):
    """`function`, which runs out of memory after so many calls."""
    left = iter(range(calls))

    def limited(*arguments):
        if next(left, None) is None:
            raise MemoryError("full")
        return function(*arguments)

    return limited


def test_a_probe_without_numbers_is_refused_before_the_merge():
    tuning = up_and_down()
    tuning.model.forward = lambda ids: Net.forward(tuning.model, ids).argmax(-1)
    with pytest.raises(ValueError, match="no floating tensor"):
        tuning.merge(keep_base=False, probe=tokens())
    assert not tuning.merged


def test_a_default_device_changes_nothing():
    tuning, ids = up_and_down(), tokens()
    output = tuning.model(ids)
    with torch.device("meta"):
        tuning.activate(["a", "b"])
        tuning.merge()
    assert distance(tuning.model(ids), output) < 1e-5


def test_the_factors_of_an_adapter_are_no_biases_of_the_model(tmp_path):
    tuning = attach(Net(), LoRA(rank=1, target_modules=["up"]), name="bias")
    tuning.add("b", LoRA(rank=1, target_modules=["down"], bias="all"), trainable=True)
    tuning.save(tmp_path, "b")
    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    biases = {f"{PREFIX}{path}.bias" for path in ("conv", "up", "head")}
    assert {key for key in keys if ".lora_" not in key} == biases and len(keys) == 5
