"""What each number of compare is called and means: renderers and docs read it from here."""

from __future__ import annotations

from lazarus.results.glossary import Metric

LENS_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "probability",
            "Probability",
            "1",
            "0 to 1",
            ".4f",
            "softmax(head(norm(h_ℓ))), h_ℓ the state after block ℓ at the last token",
            "the logit lens (nostalgebraist 2020): what the model would say if it stopped there. "
            "At early layers it may read noise, since no layer was trained to be read so",
        ),
        Metric(
            "rank",
            "Rank",
            "1",
            "1 to the size of the vocabulary",
            "d",
            "1 + the number of tokens that are more probable",
            "1 is the first choice",
        ),
        Metric(
            "emergence_layer",
            "Emerges at",
            "1",
            "0 to the last layer, or never",
            "d",
            "min{ℓ : the token is the first choice at every layer from ℓ on}",
            "where the answer is settled; a token that is not the final first choice never emerges",
        ),
        Metric(
            "kl_1_2",
            "KL(1‖2)",
            "nats",
            "0 to ∞",
            ".4f",
            "Σ p₁ (log p₁ − log p₂) over the next token; kl_2_1 the other way round",
            "what is lost where model 2 stands in for model 1 (Kullback & Leibler 1951)",
        ),
        Metric(
            "js",
            "JS",
            "nats",
            "0 to ln 2",
            ".4f",
            "½ KL(p₁‖m) + ½ KL(p₂‖m), m = ½(p₁ + p₂)",
            "0 is the same distribution, ln 2 = 0.6931 is nothing in common (Lin 1991)",
        ),
        Metric(
            "same_first_choice",
            "Same first choice",
            "1",
            "yes or no",
            "",
            "argmax p₁ and argmax p₂ are one token: one id, or one text where the vocabularies differ",
            "at a layer of model 1 and its counterpart in model 2",
        ),
    )
}
