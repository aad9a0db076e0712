"""The evaluation texts of the paper, cut as its published code and those before it (GPTQ, OmniQuant) cut them."""

from __future__ import annotations

import random
from collections.abc import Callable

from calibrate.errors import UserError, first_line

C4_WINDOWS = 256


def wikitext2(tokenizer, seqlen: int):
    """Token ids of the test set, its lines joined by blank ones: int64 [T]."""
    import torch

    lines = _load("WikiText2", "Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    return torch.tensor(tokenizer("\n\n".join(lines), verbose=False)["input_ids"])


def c4(tokenizer, seqlen: int):
    """256 windows at random places of random documents of the validation set that are long enough: int64 [T]."""
    import torch

    file = "en/c4-validation.00000-of-00008.json.gz"
    documents = _load("C4", "allenai/c4", data_files={"validation": file}, split="validation")
    return torch.tensor(random_windows([each["text"] for each in documents], tokenizer, seqlen, C4_WINDOWS))


def random_windows(documents: list[str], tokenizer, seqlen: int, windows: int) -> list[int]:
    """Token ids of ``windows`` stretches of ``seqlen``, drawn in the order of the published code."""
    draw = random.Random(0)
    tokens: list[int] = []
    while len(tokens) < windows * seqlen:
        document = documents[draw.randint(0, len(documents) - 1)]
        ids = tokenizer(document, verbose=False)["input_ids"]
        if len(ids) >= seqlen:
            start = draw.randint(0, len(ids) - seqlen)
            tokens += ids[start : start + seqlen]
    return tokens


def _load(name: str, *arguments, **settings):
    import datasets

    try:
        return datasets.load_dataset(*arguments, **settings)
    except Exception as error:
        raise UserError(
            f"{name}: the hub did not give it ({first_line(error)}); name local text with --texts {name}=FILE"
        ) from None


STREAMS: dict[str, Callable] = {"WikiText2": wikitext2, "C4": c4}


def streams(local: dict[str, str], seqlen: int) -> Callable:
    """tokenizer -> name -> token ids: of the local texts, or of all the paper's where there are none."""

    def read(tokenizer) -> dict:
        from calibrate.data import token_stream

        if local:
            return {name: token_stream(tokenizer, text) for name, text in local.items()}
        return {name: stream(tokenizer, seqlen) for name, stream in STREAMS.items()}

    return read
