"""What the page says in plain words."""

from __future__ import annotations

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
        "what stands at the top is what the audit found.",
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
        "By chance",
        "How many intruders random updates with the same singular values have: seeded draws, their mean and how far a "
        "random total lies from it. A count like it says that the size and the rank of the update explain it, whatever "
        "was learnt.",
    ),
    (
        "θ",
        "The size at which a random update is expected to have its first intruder in a layer, from the base’s singular "
        "values. Far below it, no intruder is to be expected, however long one looks.",
    ),
    (
        "Energy",
        "The intruders’ share of Σσ² of the vectors compared. A count stops at k; this does not.",
    ),
    (
        "Level",
        "The share of the compared vectors that are intruders, put into a word: 0, up to 1 %, up to 10 %, more. It is "
        "this project's convention for gates and tables, and grades no fine-tune: with none, much may be forgotten.",
    ),
    (
        "Noise-like base",
        "A layer that was never trained has the spectrum of plain noise, and anything moves its vectors. Its "
        "intruders are shown, and counted apart.",
    ),
    (
        "Proved small",
        "The size of the update alone rules intruders out; lower bounds on the cosines are the proof.",
    ),
)
ABOUT = "Intruder dimensions: Shuttleworth et al. 2024, arXiv 2410.21228. This page needs no network and sends nothing."
