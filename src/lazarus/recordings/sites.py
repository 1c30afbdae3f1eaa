"""The names of sites in a recording: those that the field uses for the residual stream."""

from __future__ import annotations

import re

from lazarus.facts import ComponentSite, Site

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final_norm", "logits"
TOP_IDS, TOP_LOGPROBS = "top_ids", "top_logprobs"
"""in place of logits: the likeliest tokens at each place, and their log-probabilities"""
KNOWN_SITE = re.compile(
    r"embedding|final_norm|logits|top_ids|top_logprobs|(resid_post|attn_out|mlp_out|router|experts)\.\d+"
)


def site_name(site: Site) -> str:
    """Return what a site is called in a recording.

    >>> site_name(16), site_name("final_norm")
    ('resid_post.16', 'final_norm')
    """
    if isinstance(site, int):
        return f"resid_post.{site}"
    return f"{site.name}.{site.layer}" if isinstance(site, ComponentSite) else site
