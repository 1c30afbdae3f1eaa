"""Every form in which prompts come → a list of prompts. No torch here, so that it can fail in no time.

typed.py    what the user typed after `-p`, and what the library is given
files.py    a file of prompts: its lines, or the rows of JSON, CSV and Parquet
rows.py     a row → a prompt: its text or chat, response and group, and what a chat template is given besides
chats.py    a chat's messages, each of them whole, in types that a template can be given
prompt.py   the prompt itself, and what is refused of any
"""

from lazarus.prompts.chats import texts_of
from lazarus.prompts.prompt import (
    ASSISTANT,
    EXAMPLE,
    Prompt,
    PromptList,
    check_chats,
    check_prompts,
    check_responses,
)
from lazarus.prompts.typed import make_prompts, parse_prompts, prompt_files

__all__ = [
    "ASSISTANT",
    "EXAMPLE",
    "Prompt",
    "PromptList",
    "check_chats",
    "check_prompts",
    "check_responses",
    "make_prompts",
    "parse_prompts",
    "prompt_files",
    "texts_of",
]
