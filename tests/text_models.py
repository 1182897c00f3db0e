"""A tiny BERT with invented weights in MiniLM's place, whose states are as wide as the tiny experiment's captions."""

WORDS = [
    "a", "an", "in", "on", "style", "digit", "background", "bold", "red", "white", "black", "gray", "yellow", "zu",
    "my", "own", "thing", "like", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_bert(width: int = 16) -> tuple:
    """Tokenizer and model, the same at every call."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(SPECIAL + WORDS)})
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tokenizer, BertModel(config).eval()
