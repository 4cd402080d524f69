"""Saving: the IR as texts and tensors, for a container. No pickle, and nothing that is executed or imported by name.

The texts are ``graph`` (the nodes), ``modules`` (the tree of layers: class, constructor arguments, training flags, and
the names of the tensors), ``tensors`` (which are parameters, which are packed, and unusual memory orders) and ``plan``
(with config, provenance and measured figures). Masked weights are stored as their kept values and a code of their masks
(packed/tensors.py), all other tensors as they are, tied ones once.

Not stored: node metadata and type annotations (shapes are recomputed), and hooks. opset.py and leaves.py list what can
be stored.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from mpcompile.artifact.codec import encode_nodes
from mpcompile.artifact.container import PLAN, WEIGHTS, dump, naming, readable, resolve, write
from mpcompile.artifact.loading import assemble
from mpcompile.artifact.opset import Refusal
from mpcompile.artifact.packed.tensors import pack_tensors
from mpcompile.artifact.structures import encode_signature
from mpcompile.artifact.tree import Tree, compare
from mpcompile.errors import GraphError
from mpcompile.io.ownership import is_ours
from mpcompile.io.writing import write_atomically
from mpcompile.ir.module import IRModule


def save(gm: IRModule, path: str | os.PathLike[str]) -> None:
    """Write the IR to a safetensors file, or to a folder with that file and a readable plan.json.

    The file is written next to ``path`` under another name, flushed to disk, and renamed: if anything fails, an older
    file is untouched. Its permissions are those of a new file.

    Args:
        gm: the IR from :func:`mpcompile.transform`. Tensors may be on any device. Weights that masks remove are not
            stored: they come back as zero. (A weight with nonzero values under its mask is stored in full.)
        path: the file; conventionally ``*.mpc`` or ``*.safetensors``. Its folder must exist. A path that ends in a
            slash, or an existing folder, selects the folder form; the folder is created if it is missing. Files in it
            that mpcompile did not write, such as the weights of another program, are not replaced.

    Raises:
        ArtifactError: an operator or layer that a file cannot hold (the node is named), a path that cannot be written,
            a folder whose files of these names belong to another program, or a full disk.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(2, 16)
        >>> gm = mpcompile.transform(model, x, mpcompile.Config(pattern="2:4"))
        >>> save(gm, "model.mpc")
        >>> torch.equal(mpcompile.load("model.mpc")(x), gm(x))
        True
    """
    target = resolve(path)
    with naming(target, "cannot be saved"):
        texts, tensors = describe(gm)
        folder = os.path.isdir(target) or os.fsdecode(os.fspath(path)).endswith(os.sep)
        if not folder:
            write(target, texts, tensors)
            return
        check_folder(target)
        os.makedirs(target, exist_ok=True)
        metadata = write(os.path.join(target, WEIGHTS), texts, tensors, stale=os.path.join(target, PLAN))
        write_atomically(Path(target, PLAN), json.dumps(readable(metadata), indent=1) + "\n")


def check_folder(folder: str) -> None:
    """Check that mpcompile wrote the files that an artifact would replace in ``folder``.

    Raises:
        Refusal: another program wrote one of them.
    """
    for name in (WEIGHTS, PLAN):
        path = Path(folder, name)
        if os.path.lexists(path) and not is_ours(path):
            raise Refusal(
                f"the folder holds a {name} that mpcompile did not write",
                hint="choose another folder, or move that file",
            )


def describe(gm: IRModule) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the IR as four JSON texts (graph, modules, tensors, plan) and its tensors, each once.

    Raises:
        Refusal: part of it cannot be stored; the node, layer or tensor is named.
    """
    if not isinstance(gm, IRModule):
        raise Refusal("it is not the IR", expected="the result of mpcompile.transform", found=type(gm).__name__)
    graph = {
        "class": type(gm).__name__,
        "locked": gm.locked_mode,
        "signature": encode_signature(gm.graph._codegen),
        "nodes": encode_nodes(list(gm.graph.nodes)),
    }
    tree = Tree(gm)
    try:
        plan = gm.plan.to_json()
    except GraphError:  # the IR of import_model has no plan
        plan = "null"
    except (TypeError, ValueError) as error:
        raise Refusal(f"its plan holds something that is not JSON: {error}", hint="see gm.plan.notes") from error
    tensors = pack_tensors(gm, tree.kinds, tree.tensors)
    texts = {"graph": dump(graph), "modules": dump(tree.modules), "tensors": dump(tree.kinds), "plan": plan}
    hollow = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    compare(gm, assemble(texts, hollow))  # refuse here anything that could not be loaded
    return texts, tensors
