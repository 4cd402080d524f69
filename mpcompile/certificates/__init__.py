"""Certificates: proofs, sample by sample, of what replacing dense weights by sparse ones cannot have changed."""
