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


_DECODER = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}
_ENCODER = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
_VISION |= {"image_size": 8, "patch_size": 4}


class Net(nn.Module):
    """One layer of each kind, one of them without a bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.conv = nn.Conv1d(12, 10, 3, padding=1)
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 10, bias=False)
        self.head = nn.Linear(10, 4)

    def forward(self, ids):
        # Contiguous: from a transposed input torch computes other last bits where the weight is frozen.
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2).contiguous()
        return self.head(x + self.down(self.up(x).relu()))


def llama(**options):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER, intermediate_size=24, **heads, **options))


def qwen2(tie_word_embeddings=True):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_DECODER, intermediate_size=24, **heads, tie_word_embeddings=tie_word_embeddings)
    )


def mistral():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_DECODER, intermediate_size=24, **heads))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def opt():
    sizes = {"ffn_dim": 24, "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 16}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**_DECODER, **sizes))


def bert():
    return transformers.BertForSequenceClassification(_bert(transformers.BertConfig))


def roberta():
    return transformers.RobertaForSequenceClassification(_bert(transformers.RobertaConfig))


def _bert(config):
    return config(**_ENCODER, intermediate_size=24, max_position_embeddings=40, num_labels=3, pad_token_id=0)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=60, **sizes, decoder_start_token_id=0)
    )


def bart():
    both = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=60, d_model=16, **sizes, max_position_embeddings=32, pad_token_id=0)
    )


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_VISION, num_labels=3))


def clip():
    text = {**_ENCODER, "num_hidden_layers": 1, "intermediate_size": 24, "max_position_embeddings": 32}
    return transformers.CLIPModel(
        transformers.CLIPConfig({**text, "bos_token_id": 0, "eos_token_id": 1}, _VISION, projection_dim=8)
    )


MODELS = {make.__name__: make for make in (llama, gpt2, bert, roberta)}
FAMILIES = MODELS | {make.__name__: make for make in (qwen2, mistral, opt, t5, bart, vit, clip)}


def inputs(model):
    """Keyword arguments for a call of `model`."""
    pixels, ids = {"pixel_values": torch.randn(3, 3, 8, 8)}, {"input_ids": tokens()}
    kind = type(model).__name__
    if kind.startswith("ViT"):
        return pixels
    if kind.startswith("CLIP"):
        return {**ids, **pixels}
    return {**ids, "decoder_input_ids": tokens()} if kind.startswith(("T5", "Bart")) else ids


def outputs(model, arguments):
    """What `model` returns for `inputs`, as one tensor."""
    result = model(**arguments)
    return result.logits if "logits" in result else torch.cat([result.text_embeds, result.image_embeds])


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
