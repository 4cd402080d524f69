"""Certificates: proofs, sample by sample, of the properties that survive replacing dense weights by sparse ones."""
