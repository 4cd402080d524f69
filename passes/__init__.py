"""Passes: each turns a graph into a graph.

A pass is one file, or one folder with its helpers inside. The contract is in base.py, the state that the passes of a
run share in context.py, and the recording of decisions in decision.py. rewriting.py has the graph edits that several
passes make; channels/ finds out which weight axes hold the same channels.

They run in this order: ``analyze``, ``allocate``, ``permute``, ``merge_tokens``, ``mask``, ``restore``; for inference,
then ``fold_norm``, ``fold_scale``, ``lower`` and ``fuse``. Only ``lower`` knows engines.
"""
