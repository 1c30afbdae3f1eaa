"""The names of sites in a recording: those that the field uses for the residual stream."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lazarus.facts import ComponentSite, Site

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final_norm", "logits"
TOP_IDS, TOP_LOGPROBS = "top_ids", "top_logprobs"
"""In place of logits: the likeliest tokens at each place, and their log-probabilities.

The log-probabilities have one more column, for all other tokens together.
"""
KNOWN_SITE = re.compile(
    r"embedding|final_norm|logits|top_ids|top_logprobs|(resid_post|attn_out|mlp_out|router|experts)\.[0-9]{1,6}"
)


def in_stream(name: str) -> bool:
    """Return whether a site is of the residual stream, and so of its width: what a norm gives may not be."""
    return name == EMBEDDING or name.startswith("resid_post.")


def ordered(names: Iterable[str]) -> list[str]:
    """Return names of sites in the order in which the states reach them.

    >>> ordered(["final_norm", "resid_post.10", "mlp_out.2", "resid_post.2", "embedding"])
    ['embedding', 'mlp_out.2', 'resid_post.2', 'resid_post.10', 'final_norm']
    """

    def place(name: str) -> tuple[int, int, str]:
        kind, _, layer = name.partition(".")
        if layer:
            return 1, int(layer), f"~{kind}" if kind == "resid_post" else kind
        return (0 if kind == EMBEDDING else 2), 0, kind

    return sorted(names, key=place)


def site_name(site: Site) -> str:
    """Return what a site is called in a recording.

    >>> site_name(16), site_name("final_norm")
    ('resid_post.16', 'final_norm')
    """
    if isinstance(site, int):
        return f"resid_post.{site}"
    return f"{site.name}.{site.layer}" if isinstance(site, ComponentSite) else site
