"""A fine-tune changed, written again, and checked.

How a repair is made: for the layers of which vectors were chosen (``choice.py``), ``svd/triplets.py`` gives both
sides of W1's leading triplets, from the float64 Gram matrix below 1024, else by Lanczos (or from that matrix, where
float32's products leave the directions off by more than 3e-5), in either case rotated within their span by float64
products, with residuals and bounds on how far the directions are off.  The change (λ − 1) Σ σ u vᵀ joins the factors
of a low-rank update, and two QR factorisations and a small SVD give the new ones (``analysis/scaling.py``); nothing
of the weight's size is decomposed for that.  DoRA keeps its row scales D: D⁻¹ times the change goes into its factors,
and its magnitudes are computed anew.  ``r`` and ``lora_alpha`` of the config stay; changed modules get entries in
``rank_pattern`` and ``alpha_pattern`` that leave their scaling as it was, so that readers who know one scaling for
all are right, too.

What is reported is measured on the values as stored, with those bounds added, and the result is audited in the same
pass.  A checkpoint is copied (``merged.py``), and only the bytes of edited tensors are written, where its header says
that they are.
"""
