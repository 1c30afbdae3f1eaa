"""The metrics of compare, each described once."""

from __future__ import annotations

from lazarus.results.glossary import Metric

LENS_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "probability",
            heading="Probability",
            unit="1",
            range="0 to 1",
            format=".4f",
            formula="softmax(head(norm(h_ℓ))), h_ℓ the state after block ℓ at the last token",
            source="the logit lens (nostalgebraist 2020): what the model would say if it stopped there. "
            "At early layers it may read noise, since no layer was trained to be read so",
            schema="0 to 1; null where the logits are not finite",
        ),
        Metric(
            "rank",
            heading="Rank",
            unit="1",
            range="1 to the size of the vocabulary",
            format="d",
            formula="1 + the number of tokens that are more probable",
            source="1 is the first choice",
        ),
        Metric(
            "emergence_layer",
            heading="Emerges at",
            unit="1",
            range="0 to the last layer, or never",
            format="d",
            formula="min{ℓ : the token is the first choice at every layer from ℓ on}",
            source="where the answer is settled; a token that is not the final first choice never emerges",
        ),
        Metric(
            "kl_1_2",
            heading="KL(1‖2)",
            unit="nats",
            range="0 to ∞",
            format=".4f",
            formula="Σ p₁ (log p₁ − log p₂) over the next token; kl_2_1 the other way round",
            source="what is lost where model 2 stands in for model 1 (Kullback & Leibler 1951)",
            schema="KL(model 1‖model 2), nats",
        ),
        Metric(
            "js",
            heading="JS",
            unit="nats",
            range="0 to ln 2",
            format=".4f",
            formula="½ KL(p₁‖m) + ½ KL(p₂‖m), m = ½(p₁ + p₂)",
            source="0 is the same distribution, ln 2 = 0.6931 is nothing in common (Lin 1991)",
            schema="Jensen-Shannon divergence, nats, 0 to ln 2",
        ),
        Metric(
            "same_first_choice",
            heading="Same first choice",
            unit="1",
            range="yes or no",
            format="",
            formula="argmax p₁ and argmax p₂ are one token: one id, or one text where the vocabularies "
            "differ",
            source="at a layer of model 1 and its counterpart in model 2",
        ),
    )
}
