"""Small tokenizers of the usual kinds, as tokenizer.json, and texts that spell their special tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

LETTERS = [chr(i) for i in range(33, 127)]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["the quick <|endoftext|> brown fox says <|im_start|>"] * 50, trainer)
    return made


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2 and Mistral: merges that make a special token of its letters."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "</": 3, "s>": 4, "▁": 5}
    for letter in LETTERS:
        ids.setdefault(letter, len(ids))
    made = Tokenizer(models.BPE(ids, [("<", "/"), ("s", ">"), ("</", "s>")], unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def sentencepiece_unigram() -> Tokenizer:
    """As T5 and XLNet: the special tokens are pieces, likelier than any other."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0)]
    made = Tokenizer(models.Unigram([*pieces, *((letter, -5.0) for letter in LETTERS)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def wordpiece() -> Tokenizer:
    """As BERT: words, of which a special token is one."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    words = [*special, *LETTERS, *("##" + letter for letter in LETTERS)]
    ids = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=1000))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.add_special_tokens(special)
    return made


KINDS = {
    "byte-level": (byte_level, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"]),
    "sentencepiece bpe": (sentencepiece_bpe, ["<unk>", "<s>", "</s>"]),
    "sentencepiece unigram": (sentencepiece_unigram, ["<unk>", "<s>", "</s>"]),
    "wordpiece": (wordpiece, ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]),
}


def texts_of(kind: str) -> list[str]:
    """Ten texts that spell special tokens alone, together, in words and between them."""
    a, b, c, *_ = [*KINDS[kind][1], *KINDS[kind][1]]
    return [a, b, c, f"{a}{b}", f"say {a} twice: {a}", f"x{b}y", f"({c})", f"{a} {b} {c}", f"end {b}", f"{c}{c}{c} z"]
