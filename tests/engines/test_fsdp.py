"""FSDP2 (`fully_shard`) on two ranks against one process, and torch.distributed.checkpoint."""

import peftops
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..methods.models import llama
from .common import adapted, assert_close, assert_equal, sequences, state, values
from .ranks import WORLD

STEPS = 3
PLAIN = {"lora": {"dropout": 0.0}, "attention_dropout": 0.0}
WIDE = {"lora": {"dropout": 0.0, "adapter_dtype": torch.float32}, "attention_dropout": 0.0, "dtype": torch.bfloat16}
BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


def sharded(model, **options):
    """Each decoder layer is a unit of its own, the rest another one."""
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def by_linear(model, **options):
    for module in model.modules():
        if isinstance(module, peftops.nn.LoRALinear):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def whole(tensors):
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def train(model, optimizer, batches):
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batches(count=STEPS):
    return sequences(count * WORLD).view(count, WORLD, -1)


def gradients(model, tuning, ids):
    loss_of(model.train(), ids).backward()
    return whole({name: parameter.grad for name, parameter in tuning.named_parameters()})


# ---- training --------------------------------------------------------------------------------------------------------


def like_one_process(rank, shard):
    model, tuning = adapted(**PLAIN)
    shard(model)
    train(model.train(), tuning.optimizer(lr=1e-2), batches()[:, rank : rank + 1])
    assert all(isinstance(parameter, DTensor) for parameter in tuning.parameters())
    actual = whole(values(tuning))
    model, tuning = adapted(**PLAIN)
    train(model.train(), tuning.optimizer(lr=1e-2), batches())
    assert_close(actual, values(tuning))


@pytest.mark.parametrize("shard", [sharded, by_linear])
def test_it_trains_like_one_process(ranks, shard):
    ranks(like_one_process, shard)


def gradients_like_float32(rank, options, policy):
    """What rounding to bfloat16 costs, and no more; the factors and their gradients stay in float32."""
    ids = batches(1)[0]
    model, tuning = adapted(**options)
    sharded(model, **policy)
    actual = gradients(model, tuning, ids[rank : rank + 1])
    assert {parameter.dtype for parameter in tuning.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    model, tuning = adapted(**options)
    assert_close(actual, gradients(model.float(), tuning, ids), 0.05)


@pytest.mark.parametrize(("options", "policy"), [(WIDE, {}), (PLAIN, BF16), (WIDE, BF16)])
def test_float32_factors_over_a_bfloat16_base_and_mixed_precision(ranks, options, policy):
    ranks(gradients_like_float32, options, policy)


def with_dropout_and_checkpointing(rank, checkpointing):
    """Each rank draws masks from its own generator; the mean of their gradients is the gradient."""
    ids = batches(1)[0]
    model, tuning = adapted()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sharded(model)
    torch.manual_seed(100 + rank)
    actual = gradients(model, tuning, ids[rank : rank + 1])

    expected = {name: torch.zeros_like(value) for name, value in actual.items()}
    for other in range(WORLD):
        model, tuning = adapted()
        torch.manual_seed(100 + other)
        for name, gradient in gradients(model, tuning, ids[other : other + 1]).items():
            expected[name] += gradient / WORLD
    assert_close(actual, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_and_checkpointing(ranks, checkpointing):
    ranks(with_dropout_and_checkpointing, checkpointing)


def accumulated(rank):
    ids = sequences(2 * WORLD)
    model, tuning = adapted(**PLAIN)
    sharded(model)
    model.set_requires_gradient_sync(False)
    loss_of(model.train(), ids[rank : rank + 1]).backward()
    model.set_requires_gradient_sync(True)
    actual = gradients(model, tuning, ids[WORLD + rank :][:1])
    model, tuning = adapted(**PLAIN)
    expected = gradients(model, tuning, ids)
    assert_close(actual, {name: 2 * gradient for name, gradient in expected.items()})


def test_accumulation_without_communication(ranks):
    ranks(accumulated)


# ---- the tuning ------------------------------------------------------------------------------------------------------


def handled(rank, folder):
    """Saving, merging and switching off are collective; what would change the parameters has an error."""
    ids = sequences(2)

    def output(model):
        with torch.no_grad():
            return model.eval()(ids).logits

    plain, reference = adapted(**PLAIN)
    expected, names = output(plain), reference.summary().parameters
    with reference.disabled():
        base = output(plain)
    model, tuning = adapted(**PLAIN)
    sharded(model)
    assert torch.equal(output(model), expected)
    assert tuning.summary().parameters == names
    tuning.save(folder)
    dist.barrier()
    with tuning.disabled():
        assert torch.equal(output(model), base)
    tuning.merge()
    assert_close({"merged": output(model)}, {"merged": expected})
    tuning.unmerge()
    assert torch.equal(output(model), expected)
    assert_equal(whole(state(model)), state(plain))
    for name, call in {
        "add": lambda: tuning.add("other", peftops.LoRA(rank=2)),
        "swap": lambda: tuning.swap("default", folder),
        "detach": tuning.detach,
        "attach": lambda: peftops.attach(sharded(llama()), peftops.LoRA(rank=2)),
        "load": lambda: peftops.load(sharded(llama()), folder),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name}: not possible once fully_shard has taken the model"):
            call()
    assert torch.equal(output(model), expected)
    assert_equal(values(peftops.load(reference.detach(), folder, trainable=True)), whole(values(tuning)))


def test_the_tuning_of_a_sharded_model(ranks, tmp_path):
    ranks(handled, tmp_path)
    model, tuning = adapted(**PLAIN)
    tuning.save(tmp_path / "plain")
    alone, both = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "plain", tmp_path))
    assert_equal(both, alone)
    assert (tmp_path / "plain" / "adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


def several(rank):
    """Adapters that were there before are activated, scaled and trained like those of one process."""
    ids, results = batches(1)[0], []
    for parallel in (True, False):
        model, tuning = adapted(**PLAIN)
        tuning.add("other", peftops.LoRA(rank=2, init="orthogonal"), trainable=True)
        if parallel:
            sharded(model)
        for active in ("other", {"default": 0.5, "other": -1.0}):
            tuning.activate(active)
            model.zero_grad()
            loss_of(model.train(), ids[rank : rank + 1] if parallel else ids).backward()
            own = {name: parameter.grad for name, parameter in tuning.named_parameters()}
            results.append(whole({name: gradient for name, gradient in own.items() if gradient is not None}))
    other, both, expected_other, expected_both = results
    assert_close(other, expected_other)
    assert_close(both, expected_both)
    assert len(both) == 2 * len(other)


def test_several_adapters(ranks):
    ranks(several)


def from_meta(rank):
    """Built without storage, sharded, materialised, filled from the first rank."""
    reference, original = adapted(**PLAIN)
    with torch.device("meta"):
        model = llama()
    tuning = peftops.attach(model, peftops.LoRA(rank=4, alpha=8))
    sharded(model)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state(reference) if rank == 0 else {}, options=options)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    ids = sequences(2)
    assert torch.equal(model.eval()(ids).logits, reference.eval()(ids).logits)
    assert_close(gradients(model, tuning, ids), gradients(reference, original, ids))


def test_from_the_meta_device(ranks):
    ranks(from_meta)


# ---- state dictionaries and torch.distributed.checkpoint -------------------------------------------------------------


def only_what_is_trained(rank):
    model, tuning = adapted(**PLAIN)
    expected = values(tuning)
    sharded(model)
    trained = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    saved = get_model_state_dict(model, options=trained)
    assert_equal(saved, expected)
    other, again = adapted(seed=4, **PLAIN)
    sharded(other)
    set_model_state_dict(other, saved, options=StateDictOptions(full_state_dict=True, strict=False))
    assert_equal(whole(values(again)), expected)


def test_a_state_dict_of_what_is_trained(ranks):
    ranks(only_what_is_trained)


def parts_of(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def load_parts(model, optimizer, folder):
    parts = parts_of(model, optimizer)
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])


def trained_and_saved(rank, folder):
    """Two steps, a checkpoint, two more; and again from the checkpoint."""
    mine = batches(4)[:, rank : rank + 1]
    model, tuning = adapted()
    sharded(model)
    optimizer = tuning.optimizer(lr=1e-2)
    torch.manual_seed(rank)
    train(model.train(), optimizer, mine[:2])
    at_the_cut, generator = whole(values(tuning)), torch.get_rng_state()
    dcp.save(parts_of(model, optimizer), checkpoint_id=folder)
    losses = train(model, optimizer, mine[2:])
    expected = whole(values(tuning))

    model, tuning = adapted(seed=4)
    sharded(model)
    optimizer = tuning.optimizer(lr=1e-2)
    load_parts(model, optimizer, folder)
    assert_equal(whole(values(tuning)), at_the_cut)
    torch.set_rng_state(generator)
    assert train(model.train(), optimizer, mine[2:]) == losses
    assert_equal(whole(values(tuning)), expected)
    if rank == 0:
        torch.save(at_the_cut, folder / "cut.pt")


def test_a_checkpoint_resumes_to_the_last_bit_and_fits_one_process(ranks, tmp_path):
    ranks(trained_and_saved, tmp_path)
    model, tuning = adapted(seed=4)
    optimizer = tuning.optimizer(lr=1e-2)
    load_parts(model, optimizer, tmp_path)
    assert_equal(values(tuning), torch.load(tmp_path / "cut.pt"))
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {2}


def test_a_checkpoint_of_one_process_resumes_to_the_last_bit(tmp_path):
    model, tuning = adapted()
    optimizer = tuning.optimizer(lr=1e-2)
    train(model.train(), optimizer, batches(4)[:2])
    dcp.save(parts_of(model, optimizer), checkpoint_id=tmp_path)
    generator = torch.get_rng_state()
    losses = train(model, optimizer, batches(4)[2:])

    other, again = adapted(seed=4)
    optimizer = again.optimizer(lr=1e-2)
    load_parts(other, optimizer, tmp_path)
    torch.set_rng_state(generator)
    assert train(other.train(), optimizer, batches(4)[2:]) == losses
    assert_equal(values(again), values(tuning))
