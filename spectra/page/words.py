"""What the page says in plain words."""

from __future__ import annotations

MEANINGS = {
    "none": "Every leading direction of the tuned weights is close to one that the base already had: the update "
    "turned and rescaled what was there. That is what a gentle fine-tune looks like. It proves nothing about quality.",
    "slight": "Almost all of what dominates the tuned weights was there before. The few new directions are worth a "
    "look at the layers below, no more: the fine-tune works mostly within the base's own structure.",
    "moderate": "Some of the strongest directions of the tuned weights resemble nothing in the base. Such directions "
    "go along with forgetting (Shuttleworth et al. 2024), so evaluate on what the model must not forget before it is "
    "used.",
    "strong": "Many of the strongest directions of the tuned weights resemble nothing in the base. That is a reason to "
    "look closer, not a failure: evaluate on what the model must not forget, and compare with a lower learning rate, "
    "another rank or a full fine-tune.",
    "cannot tell": "No layer could be judged, so this page says nothing about the fine-tune as a whole.",
}
MORE_MATRICES = (
    "Rows are singular vectors of the base, columns those of the tuned weight, the largest singular value at the top "
    "left. A vector that was left alone is a mark on the diagonal; an intruder dimension is a column without one, "
    "under a triangle. Only the leading vectors are shown: a column without a triangle may have its match further down."
)
GLOSSARY = (
    (
        "Intruder dimension",
        "One of the top k singular vectors of the tuned weight W₀ + ΔW whose |cosine| with every singular vector of "
        "the base weight W₀ is strictly below ε. Vectors whose singular values agree up to rounding are compared as "
        "one subspace.",
    ),
    (
        "Index",
        "The rank of a singular vector by its singular value; 0 is the largest. Intruders at low indices weigh more.",
    ),
    (
        "ε (epsilon)",
        "The cosine below which a vector counts as new: 0.5 in the paper. The slider counts anew with another one; "
        "the verdict at the top is the one of the audit.",
    ),
    (
        "At least … at most …",
        "On large weights the audit proves each verdict without computing every cosine, and then only bounds are "
        "known. Where these do not say on which side of another ε a cosine lies, the count is a range. The engines "
        "exact and cached compute all of them.",
    ),
    (
        "Random direction",
        "A direction with no relation to the base has a largest cosine too: about 0.32 in 64 dimensions, 0.12 in "
        "768, 0.06 in 4096. Intruder therefore means spread over many base vectors, not outside their span.",
    ),
    (
        "Severity",
        "The share of compared vectors that are intruders, outside layers whose base is plain noise. It puts a "
        "number into words and is this project's convention. Weights show risk; only an evaluation shows forgetting.",
    ),
    (
        "Noise-like base",
        "A layer that was never trained has the spectrum of plain noise, and anything moves its vectors. Its "
        "intruders are shown, and do not count for the severity.",
    ),
    (
        "Proved small",
        "The size of the update alone rules intruders out; lower bounds on the cosines are the proof.",
    ),
)
ABOUT = "Intruder dimensions: Shuttleworth et al. 2024, arXiv 2410.21228. This page needs no network and sends nothing."
