"""Small random models for the tests of the methods."""

import torch
import transformers
from torch import nn


class Block(nn.Module):
    """A plain PyTorch model with the cases that matter: nested names, no bias, a norm, an embedding, dropout."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(16, 16, bias=False), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)})
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 5)
        self.to(dtype)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["q_proj"](self.norm(x))
            x = x + layer["down"](self.dropout(torch.relu(layer["up"](x))))
        return self.head(x)


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def bert():
    return transformers.BertForSequenceClassification(_bert(transformers.BertConfig))


def roberta():
    return transformers.RobertaForSequenceClassification(_bert(transformers.RobertaConfig))


def _bert(config):
    return config(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        num_labels=3,
        pad_token_id=0,
    )


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "roberta": roberta}


def tokens(rows=3, length=9):
    return torch.randint(1, 11, (rows, length))


def logits(model, ids):
    output = model(ids)
    return output.logits if hasattr(output, "logits") else output


def distance(actual, expected):
    """Relative, in the Euclidean norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def randomise(tuning, std=0.2):
    """Give the trained parameters values as after training."""
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
