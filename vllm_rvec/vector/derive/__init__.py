"""New vectors from stored ones: `transform`, `combine`, `random_like`.

Each reads its inputs tensor by tensor, encodes what it computes anew, and adds one step to the
manifest's lineage. Donors, tokenizer, sketch, vocabulary and architecture are carried over; the
round trip is not, since base + v is no longer the tuned donor.
"""
