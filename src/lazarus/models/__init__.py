"""MODEL, as the user typed it → a loaded model whose blocks are known, and its tokenizer.

reference.py   what a MODEL names: a Hub id, a folder, a GGUF file, an adapter, MODEL+ADAPTER
gguf/          GGUF files: their parts, their settings, their tensors
opening.py     a checkpoint's configuration, model class and dtype, before any weight is read
hub.py         repositories of the Hub: their commits and files; hub_client.py limits the waits for it,
               hub_faults.py tells what goes wrong there
inside.py      which files of a folder may be read
files.py       the files that a model is read from, and whether they change; digests.py has their SHA-256
stored.py      the tensors of safetensors files: where they are, reading them, and whether two are the same
checkpoint.py  how transformers makes parameters of a checkpoint's stored tensors
wrappers.py    what a wrapper has put around the names of a checkpoint's tensors
contents.py    what a folder holds besides the weights that are read
quantised/     quantised checkpoints: what they claim, and their weights decoded as they are read
load.py        from that name to weights in memory, each set of weights once
loaded.py      a model in memory, with all that is asked of it
underneath.py  the model that an adapter stands on
in_memory.py   a model that the caller has in memory
whole.py       what a model does when it first runs as a whole, done once
sharing.py     a second checkpoint over the first one's weights: only what differs is read
kinds.py       models that take the same beside a base
stand_ins.py   models of random weights, for estimates; of one that is paged, stand_in_pager.py;
               skipping.py counts the blocks that do not run
paging.py      a pair that is read block by block; pager.py does the reading, layout.py says of what and when,
               tables.py reads the rows of large embeddings
room.py        how much memory is free
design.py      whether two models differ in their weights alone
equality.py    whether two tensors, modules or other values are the same: yes, no, or not known
tokenizer.py   the tokenizer that belongs to it, or another by its name
chats.py       what its chat template makes of a chat
rendering.py   a process in which templates are rendered, with limits
chat_forms.py  the other forms in which templates take a chat
turns.py       where the responses are in that
adapters.py    PEFT adapters, and two module trees over one storage
adapter_files.py  what the folder of an adapter holds: its tensors by PEFT's names, and what else
adapter_limits.py  what an adapter's configuration may ask of PEFT
fitting.py     where an adapter's tensors belong on a model of another class
effective.py   the tensors that it computes with: base and what its adapters add
adapted.py     what an adapter has put on a model, and whether it changes anything
formats.py     folders that hold a model in a form that is not read
plausible.py   settings that ask for more than the files could hold
faults.py      the faults of the libraries below, put as what to do about them
settings.py    the settings in which two configurations differ
outside.py     what two checkpoints hold besides what is compared
embedders.py   the modules of a sentence-transformers model after its transformer, and whether they differ
sentence.py    those modules, run
sameness.py    what two models have in common in their weights, and why a fine-tune may change nothing
anatomy.py     where a transformers model keeps its blocks, and how long its context is
"""

from lazarus.models.anatomy import Anatomy, block_settings, dissect
from lazarus.models.chats import ChatTemplate, render_chats
from lazarus.models.design import same_design
from lazarus.models.effective import Effective, Parts, effective_tensors, unwrapped
from lazarus.models.equality import ABSURD, Equality, Fault, fault_of, has_non_finite, same_bits
from lazarus.models.in_memory import wrap_model
from lazarus.models.kinds import kind_of
from lazarus.models.layout import is_hollow
from lazarus.models.load import Weights, load_base, load_beside, load_one, load_pair
from lazarus.models.loaded import LoadedModel
from lazarus.models.opening import LoadOptions
from lazarus.models.outside import Beside, Compared, find_beside, find_outside
from lazarus.models.pager import Pager
from lazarus.models.paging import Footprint, check_paged, estimate, fits_surely, load_paged
from lazarus.models.reference import ModelReference, Source, parse_model
from lazarus.models.room import free_bytes, give_back
from lazarus.models.sameness import shared_blocks, weights_identical, why_the_same
from lazarus.models.sentence import Embedder, NotReadError, read_embedder
from lazarus.models.settings import settings_that_differ
from lazarus.models.skipping import Clock
from lazarus.models.stand_in_pager import StandInPager, page
from lazarus.models.stand_ins import StandIn, stand_in, stand_in_pair
from lazarus.models.tokenizer import find_tokenizer, load_tokenizer, tokenizer_digest, uncached_tokenizer
from lazarus.models.turns import Span, render_responses

__all__ = [
    "ABSURD",
    "Anatomy",
    "Beside",
    "ChatTemplate",
    "Clock",
    "Compared",
    "Effective",
    "Embedder",
    "Equality",
    "Fault",
    "Footprint",
    "LoadOptions",
    "LoadedModel",
    "ModelReference",
    "NotReadError",
    "Pager",
    "Parts",
    "Source",
    "Span",
    "StandIn",
    "StandInPager",
    "Weights",
    "block_settings",
    "check_paged",
    "dissect",
    "effective_tensors",
    "estimate",
    "fault_of",
    "find_beside",
    "find_outside",
    "find_tokenizer",
    "fits_surely",
    "free_bytes",
    "give_back",
    "has_non_finite",
    "is_hollow",
    "kind_of",
    "load_base",
    "load_beside",
    "load_one",
    "load_paged",
    "load_pair",
    "load_tokenizer",
    "page",
    "parse_model",
    "read_embedder",
    "render_chats",
    "render_responses",
    "same_bits",
    "same_design",
    "settings_that_differ",
    "shared_blocks",
    "stand_in",
    "stand_in_pair",
    "tokenizer_digest",
    "uncached_tokenizer",
    "unwrapped",
    "weights_identical",
    "why_the_same",
    "wrap_model",
]
