"""Notes: what a reader must know of a result beside its numbers, each with a code that stays the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lazarus.messages import in_flags

CODES = {
    # The prompts
    "prompt-list": "The quotation marks of a `-p` list were read as Python's csv reads them: look at "
    "the prompts of the result.",
    "prompt-file": "A file of prompts was read in part, or otherwise than its suffix suggests: look at the "
    "prompts of the result.",
    "prompt-rows": "Some rows of the prompts have fields that were not read, or nulls: what the models were "
    "given lacks these.",
    "chat-template": "A part of some chats did not reach the models as it was given, or a field that only a "
    "chat template takes was left out.",
    "chat-templates-differ": "The models bring different chat templates and one of them wrote the text "
    "for both: the other model reads a form that it was not trained on.",
    "missing-tokenizer": "A model brings no tokenizer and was read with the other's: the ids mean something "
    "only if its vocabulary is the same.",
    "tokenizers-differ": "The tokenizers give the same ids for these prompts and differ elsewhere: other "
    "prompts may be refused.",
    "special-tokens": "A template wrote special tokens that the other model calls otherwise: it reads them "
    "as plain text.",
    "own-tokenizers": "Each model read the texts with its own tokenizer, and how many prompts have other ids "
    "is told: a part of the divergence may be that of the tokens.",
    "recorded": "One of the two is a recording: what ran it, and in which type, is told. What needs its "
    "weights is null.",
    "likeliest-tokens": "A recording has the likeliest tokens and not whole distributions: KL and JS "
    "divergence are lower bounds.",
    "recorded-ids": "Whether the ids of a recording are those that the model's tokenizer gives is not known: "
    "they were taken at their word.",
    "cut-prompts": "Prompts were cut to what fits the models: their numbers are of their beginning.",
    "repeated-prompts": "Some prompts are repeats of others and ran once: they count as often as they were "
    "given, and tell nothing new.",
    "lone-tokens": "Prompts of a single token are compared at position 0, which is left out of the others: "
    "it hardly depends on the text.",
    # Files and how they were loaded
    "hub-unreachable": "The Hub could not be asked, and a model was read from the cache at the commit that "
    "is told: the Hub may have a newer one.",
    "partial-cache": "A model was read from the cache, which lacks settings that the Hub may have: with them "
    "the tokens may be others.",
    "other-weights": "The folder of a model holds other weights than those that were read: these count as "
    "not compared unless they are copies.",
    "wrapped-names": "Names of stored tensors carried a wrapper's prefix and were read without it: the "
    "numbers are as if they had their own names.",
    "missing-tensors": "A checkpoint lacks tensors of its model: they take no part in the comparison.",
    "unplaced-tensors": "Tensors of a checkpoint have no place in its model: they were left out.",
    "not-tensors": "A file holds entries that are no tensors: they were not compared.",
    "quantisation-claim": "A configuration claims a quantisation that the stored weights do not have: they "
    "were read as they are stored.",
    "dtype-not-applied": "A quantised model runs in its own type: the dtype that was asked for did not apply "
    "to it.",
    "gguf-file": "A GGUF model is one file of a repository, or is in parts: what was read of it is told.",
    "gguf-settings": "Settings of a GGUF model were not taken from its file, or are not in it: differences "
    "from the model that it was converted from may come of that alone.",
    "adapter-base": "An adapter names another base than the model that it was put on: it may not fit.",
    "other-adapters": "The folder of an adapter holds others besides, which were not put on.",
    "adapter-tensors": "Tensors of an adapter have no module in the model and were left out: states do not "
    "depend on them.",
    "resized-vocabulary": "The model was resized to the vocabulary of its adapter.",
    "adapter-in-model": "A model in memory runs with the adapter that is in it.",
    "unwrapped-model": "A model in memory was taken out of its wrapper and run as it is inside.",
    "hooked-model": "Something is hooked to a whole model, which could not be run as a whole: weights that "
    "it makes ready may not be.",
    "own-code": "A model has Python code of its own: its tensors are named by their keys alone.",
    "no-layers": "The blocks of a model were not found: no tensor of it is in a layer.",
    "files-changed": "Files of a model changed after they had been read: what is there now is not what was "
    "compared.",
    # How the models ran
    "weights-dequantised": "The weights of a quantised checkpoint were dequantised as they were read, and "
    "the model ran on them: what its format does to activations was not applied.",
    "quantised-pair": "One of the two is quantised, so what each block costs was measured though it was not "
    "asked for: the run takes longer.",
    "no-attribution": "KL(base‖fine-tuned) is not finite on every prompt, so nothing was attributed.",
    "rough-attribution": "The parts of the attribution miss the KL divergence by more than 1 %: their shares "
    "are rough. The path between the weights has jumps, as where experts flip.",
    "streamed": "Both models do not fit into memory and were read from disk a block at a time: the numbers "
    "are the same, and the run takes longer.",
    "batches-read-weights": "Every batch read all weights from disk, because the pass cannot go on after one "
    "block: the numbers are the same, and the run takes longer.",
    "eager-attention": "Both models ran with eager attention, because each would have taken another: a "
    "difference of kernels is no difference of models.",
    "encoder-only": "The encoder of an encoder-decoder was compared, and its decoder was not.",
    "repeated-blocks": "Blocks run more than once: layer i is the i-th call.",
    "parallel-streams": "The residual stream has several parallel streams: a layer's state is all of them.",
    "run-dtypes": "The models ran in different types: part of the difference is the rounding of the narrower "
    "one.",
    "float32-precision": "The caller had set a lower precision of float32 products: the differences may be "
    "those of rounding.",
    "no-padding": "Padding changes the states of an architecture, or that could not be seen: prompts ran "
    "alone or with others of their length, and the numbers are free of it.",
    "common-blocks": "The first blocks are the same in both models and ran once for both: divergence there "
    "is exactly 0 where the same states entered them.",
    "shared-prefix": "The first tokens are the same in all prompts and ran once, or why they did not: the "
    "numbers are the same but for rounding.",
    "shards-reused": "Shards of an earlier run were taken from the folder: their numbers were measured then.",
    # What was compared
    "not-compared": "Parts of the models took no part in the comparison: no number says anything of them.",
    "settings-differ": "The configurations differ in these settings: part of the difference may come of "
    "them.",
    "vocabularies-differ": "The vocabularies differ, and how their tokens were matched is told: what one "
    "model alone can give counts as one more outcome, or is not compared.",
    "rows-by-number": "Rows of a vocabulary's tensors were compared by their number and not by token: they "
    "may be of different tokens.",
    "components-left-out": "Something inside the blocks was not compared: the numbers say nothing of it.",
    "depths-differ": "The models have different numbers of layers, and how these are matched is told.",
    "widths-differ": "The residual streams have different widths: there is no cosine, and CKA is given "
    "instead.",
    "tied-tensors": "A tensor is tied to another, in one model or in both, and how it was compared is told.",
    "unmatched-tensors": "Tensors have no counterpart of their shape: they were not compared.",
    "stored-types": "The two are stored in different types: a part of the change may be rounding.",
    "no-parting": "The parting was asked for, and first choices agree after every token.",
    # What is not finite
    "broken-weights": "Weights of a model hold NaN or infinity: numbers that come of them are no measure.",
    "absurd-weights": "Weights of a model hold numbers that no training makes, but a flipped bit does.",
    "not-finite": "States or logits of a model are not finite, from where on and why: nothing is measured "
    "where they are not.",
    "states-left-out": "States that are zero or not finite were left out at these layers: means there are "
    "over fewer prompts or tokens.",
    "logits-left-out": "Logits that are not finite were left out: the effect on the output is of the others.",
    "output-not-measured": "There are no logits to compare: the effect on the output was not measured.",
    "labels-matched": "Two heads do not have the same labels in the same order, and how they were matched is "
    "told: labels that one model alone has were not compared.",
    "embedded-whole": "Prompts are longer than sentence-transformers would read: their embeddings are of all "
    "tokens.",
    "nothing-mined": "No tokens were mined from the logits, and why: the readout is of the mean difference "
    "alone.",
    "infinite-kl": "A KL divergence is infinite, and null in JSON: one model gives the probability 0 to what "
    "the other can give.",
    "undefined-change": "The relative change of some tensors is undefined: they have none, and gates on it "
    "fail.",
    "missing-spectrum": "Some changed matrices have no spectrum: squares of their change leave the range of "
    "float64.",
    # How far the numbers can be trusted
    "few-prompts": "There are few prompts: intervals are rough or absent, and of too few no onset is given.",
    "alike-prompts": "Unrelated prompts are all but the same at these layers: no normalised divergence is "
    "given there.",
    "dominant-dimension": "One dimension carries more than half of the mean cosine at these layers: the "
    "cosine says little of the others.",
    "noise-not-measured": "The noise is not known, everywhere or at some sites: differences there make no "
    "verdict.",
    "cka-sample": "CKA is of a sample of the prompts.",
    "kept-tokens": "Single tokens are kept of some prompts alone, or of none: there was no room for more.",
    "rounded-merge": "Whether one model is the other merged and rounded, or how much of the adapter's update "
    "the rounding kept, is told.",
    "merge-too-small": "An adapter's update is too small for the stored type: whether tensors hold its merge "
    "cannot be told from them.",
    "merge-scale": "Tensors hold another multiple of an adapter's update than once: the merge was skipped, "
    "made twice or scaled.",
    # A series
    "no-distances": "The states of the models of a series were not kept: they were compared with base, and "
    "not with one another.",
    "steps-not-in-order": "The steps in the names of a series do not ascend: the order in which the models "
    "were given was taken for that of the training.",
    # The logit lens
    "other-ids": "One vocabulary was read as other ids by the two tokenizers: part of the difference may "
    "come of that alone.",
    "lens-by-cutting": "The model itself was cut after each block to read a layer, because its end does not "
    "read the last block alone.",
    "tracked-token": "A tracked text is no single token of a model: its first one is tracked, or none.",
}
"""Each code: what a note of it tells, and what that means for the numbers."""


@dataclass(frozen=True)
class Note:
    """A sentence that a reader of a result must know, with its kind.

    Raises:
        ValueError: the code is not in `CODES`.
    """

    code: str
    """what kind of thing it tells: a key of `CODES`"""
    text: str
    """the sentence, without a full stop"""
    model: str | None = None
    """the model that it is about; None where it is about both, or about neither"""
    layers: tuple[int, ...] = ()
    """the layers that it is about, where it is about some"""
    prompts: tuple[int, ...] = ()
    """the prompts that it is about, where it is about some"""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"{self.code!r} is no code of a note")


class Notes:
    """The notes of a run in the order in which they come, each text once. It is passed down and added to."""

    def __init__(self, notes: Iterable[Note] = ()) -> None:
        self._notes: dict[str, Note] = {}
        self.extend(notes)

    def add(
        self,
        code: str,
        text: str,
        *,
        model: str | None = None,
        layers: Iterable[int] = (),
        prompts: Iterable[int] = (),
    ) -> None:
        """Add a note, unless its text is there already.

        Raises:
            ValueError: the code is not in `CODES`.
        """
        self.extend([Note(code, text, model, tuple(layers), tuple(prompts))])

    def extend(self, notes: Iterable[Note]) -> None:
        """Add notes in their order, those whose text is there already left out.

        Options that a text has marked are spelled as they are typed: results are read on the command line
        and by people who never called Python.
        """
        for note in notes:
            text = in_flags(note.text)
            self._notes.setdefault(text, replace(note, text=text))

    @property
    def texts(self) -> list[str]:
        """The sentences, in order."""
        return list(self._notes)

    @property
    def codes(self) -> list[str]:
        """Each one's code, in the same order."""
        return [note.code for note in self]

    def __iter__(self) -> Iterator[Note]:
        return iter(self._notes.values())

    def __len__(self) -> int:
        return len(self._notes)


def notes_of(codes: Sequence[str], texts: Sequence[str]) -> list[Note]:
    """Return the notes of a result as they were made, by their codes and texts."""
    return [Note(code, text) for code, text in zip(codes, texts, strict=True)]
