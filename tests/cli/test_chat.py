"""Conversations: the chat template renders them, and the assistant's turns can be learned alone."""

import json

import pytest
from peftops.cli import chat
from peftops.cli.errors import InputError
from transformers import AutoTokenizer

from .conftest import ANIMALS, FILLER, METALS, tokenizer, write_jsonl
from .test_finetune import fails, finetune

pytestmark = pytest.mark.usefixtures("no_plot")
# Roles as single words, a header for the answer at inference, an end after every turn.
PLAIN = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}"
    "{%- generation %}{{ m['content'] }} [SEP] {% endgeneration %}{% else %}{{ m['content'] }} [SEP] {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
# As templates that drop the reasoning of earlier answers: what came before looks different once more follows.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }} {% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %} "
    "[SEP] {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
STRICT = "{{ raise_exception('Roles must alternate') }}"

TALK = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "the old"},
    {"role": "assistant", "content": "cat dog"},
    {"role": "user", "content": "new"},
    {"role": "assistant", "content": "hen"},
]


def with_template(template):
    made = tokenizer(False, "user", "assistant", "system")
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_only_what_the_assistant_wrote_is_learned(template):
    made = with_template(template)
    ids, trained = chat.encode_completions(made, TALK, "here")
    words = made.convert_ids_to_tokens(ids)
    assert (
        " ".join(words)
        == "system a [SEP] user the old [SEP] assistant cat dog [SEP] user new [SEP] assistant hen [SEP]"
    )
    learned = [word for word, on in zip(words, trained, strict=True) if on]
    assert learned == ["cat", "dog", "[SEP]", "hen", "[SEP]"]
    assert ids == chat.encode(made, TALK, "here")


def test_a_template_without_a_header_teaches_it():
    made = with_template(PLAIN.partition("{% if add")[0])
    ids, trained = chat.encode_completions(made, TALK[1:3], "here")
    learned = [word for word, on in zip(made.convert_ids_to_tokens(ids), trained, strict=True) if on]
    assert learned == ["assistant", "cat", "dog", "[SEP]"]  # at inference the model has to write it


def test_what_cannot_be_told_apart_is_an_error():
    with pytest.raises(InputError, match="here: --completion-only: the chat template renders message 3 differently"):
        chat.encode_completions(with_template(FORGETFUL), TALK, "here")
    assert chat.encode_completions(with_template(FORGETFUL), TALK[:3], "here")
    with pytest.raises(InputError, match="here: no message of an assistant"):
        chat.encode_completions(with_template(PLAIN), TALK[:2], "here")
    with pytest.raises(InputError, match=r"here: the chat template refuses the messages \(Roles must alternate\)"):
        chat.encode(with_template(STRICT), TALK, "here")


@pytest.fixture
def talking(llama, tmp_path):
    """A model whose tokenizer has a chat template."""
    folder = tmp_path / "talking"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    made = with_template(PLAIN)
    made.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert len(made) <= config["vocab_size"]
    return folder


@pytest.fixture
def talks(tmp_path):
    rows = []
    for i in range(40):
        question = " ".join(FILLER[: 1 + i % 7]) + " " + FILLER[i % 8]
        rows.append({"messages": [{"role": "user", "content": question + f" {'old ' * (i // 8)}"},
                                  {"role": "assistant", "content": (ANIMALS + METALS)[i % 10]}]})  # fmt: skip
    return write_jsonl(tmp_path / "talks.jsonl", rows)


@pytest.mark.parametrize("options", [(), ("--completion-only",), ("--completion-only", "--packing")])
def test_a_run_learns_conversations(talking, talks, tmp_path, options):
    output = tmp_path / "run"
    assert finetune(talking, talks, output, "--epochs", 2, "--lr", 1e-2, "--max-length", 32, *options) == 0
    steps = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    evaluations = [step["eval_loss"] for step in steps if "eval_loss" in step]
    assert evaluations[-1] < evaluations[0]
    assert AutoTokenizer.from_pretrained(talking).chat_template == PLAIN


def test_a_cut_answer_is_left_out_with_a_note(talking, talks, tmp_path, capsys):
    options = ("--epochs", 1, "--completion-only", "--max-length")
    assert finetune(talking, talks, tmp_path / "run", *options, 10) == 0
    assert "rows are left out: --max-length 10 cuts off what is to be learned" in capsys.readouterr().err
    arguments = ("finetune", "--model", talking, "--data", talks, "--output", tmp_path / "none", *options, 3)
    assert "talks.jsonl: --max-length 3 cuts off what is to be learned in every row" in fails(capsys, *arguments)


def test_what_conversations_need_is_said(llama, talking, talks, unlabelled, tmp_path, capsys):
    def run(model, data, *options):
        return fails(capsys, "finetune", "--model", model, "--data", data, "--output", tmp_path / "run", *options)

    assert f"--model {llama}: its tokenizer has no chat template" in run(llama, talks)
    assert "unlabelled.jsonl: wanted rows of the same kind as in" in run(talking, talks, "--eval-data", unlabelled)
    assert "--completion-only: wanted rows with a column 'messages'" in run(llama, unlabelled, "--completion-only")
    for value, message in (
        ([], "column 'messages' is [], wanted a list of messages"),
        ("hello", "column 'messages' is \"hello\", wanted a list"),
        ([{"role": "user"}], "column 'messages' holds {\"role\": \"user\"}, wanted an object with the texts 'role'"),
        ([{"from": "human", "value": "hi"}], "wanted an object with the texts 'role' and 'content'"),
        (["hi"], "column 'messages' holds \"hi\", wanted an object"),
    ):
        data = write_jsonl(tmp_path / "bad.jsonl", [{"messages": value}])
        assert "bad.jsonl line 1: column 'messages'" in run(talking, data)
        assert message in run(talking, data)
