"""Certificates: what replacing dense weights by sparse ones cannot have changed, proved sample by sample."""
