"""Owns the demo model's tokenizer: byte-level byte-pair encoding, trained on the training files, lossless on any text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
VOCABULARY = 3072


def train_tokenizer(documents: list[str], context: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding (Sennrich et al. 2016) over bytes, split like GPT-2's: a run of spaces before a word is one piece.

    documents: the training files. context: the model's longest window, in tokens, which the tokenizer's users read from it.
    Every byte is a token of its own, so decode(encode(text)) == text for every text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
