"""Cases of what the program makes and takes back: manifests, ONNX files, stores, prepared scans, checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import onnx
import torch

from dcformer_deploy.runtime.manifest import DIGEST_FIELD, MANIFEST_NAME

from .judge import Case
from .mutate import INTERESTING, INTERESTING_FLOATS, JUNK, mutate_bytes, mutate_json
from .seeds import Seeds

_TEXT = "text.fp32.onnx"


def _use(random: Random, scan: Path) -> Case:
    return Case(
        random.choice(
            (
                ["inspect", "b"],
                ["inspect", "b", "--json"],
                ["zeroshot", "b", str(scan), "--json"],
                ["embed-text", "b", "Pleural effusion.", "--json"],
                ["zeroshot", "b", str(scan), "--no-verify", "--json"],
            )
        )
    )


def _sign(content: Any) -> str:
    """As a careful attacker would: the digest fits."""
    if isinstance(content, dict):
        content.pop(DIGEST_FIELD, None)
        try:
            canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (ValueError, TypeError):
            canonical = ""
        content[DIGEST_FIELD] = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
    return json.dumps(content)


def manifest(random: Random, seeds: Seeds, folder: Path) -> Case:
    """Manifests: damaged text, values of other kinds, paths out of the bundle; mostly with a digest that fits."""
    bundle = Path(shutil.copytree(seeds.bundle, folder / "b"))
    path = bundle / MANIFEST_NAME
    kind = random.randrange(8)
    if kind == 0:
        data = mutate_bytes(random, path.read_bytes())
    elif kind == 1:
        data = random.choice(
            (
                b"",
                b"[]",
                b"null",
                b"{}",
                b"[" * 200_000,
                b'{"schema_version": 1e999}',
                b"\xff\xfe{}",
                b'{"a": NaN}',
                b"{" * 10,
            )
        )
    else:
        content = json.loads(path.read_text())
        if kind == 2:
            record = random.choice(content["files"])
            record["path"] = random.choice(
                (
                    "../b/" + record["path"],
                    str(seeds.bundle / record["path"]),
                    "/etc/passwd",
                    ".",
                    "",
                    "a/../../x",
                    "/dev/zero",
                    "con\0",
                    "\\\\host\\x",
                    record["path"] + "/",
                )
            )
            _rename(content, record, random)
        elif kind == 3:
            name = random.choice(content["files"])["path"]
            (bundle / name).unlink()
            (bundle / name).symlink_to(
                random.choice((str(seeds.bundle / name), "/etc/passwd", "/dev/zero", ".", name))
            )
        else:
            content = mutate_json(random, content)
        data = (_sign(content) if kind == 3 or random.random() < 0.8 else json.dumps(content)).encode(
            "utf-8", "surrogatepass"
        )
    path.write_bytes(data)
    return _use(random, seeds.nifti)


def _rename(content: Any, record: Any, random: Random) -> None:
    """Whatever names the first graph's file names the record's instead."""
    if random.random() < 0.5:
        content["graphs"][0]["file"] = record["path"]
    else:
        content["text"]["file"] = record["path"]


def graphs(random: Random, seeds: Seeds, folder: Path) -> Case:
    """ONNX files with a manifest that fits them: damaged bytes, other operators and sizes, data kept elsewhere."""
    bundle = Path(shutil.copytree(seeds.bundle, folder / "b"))
    # The one that ONNX Runtime is given: there may be one for it beside the one for any library.
    image = next(name for name in ("image.fp32.onnxruntime.onnx", "image.fp32.onnx") if (bundle / name).exists())
    name = random.choice((image, image, _TEXT))
    path = bundle / name
    kind = random.randrange(6)
    if kind <= 1:
        data = path.read_bytes()
        edge = random.choice((len(data), 20_000))
        path.write_bytes(mutate_bytes(random, data, 0, edge))
    elif kind == 2:
        model = onnx.load(path, load_external_data=False)
        _change_graph(random, model)
        path.write_bytes(model.SerializeToString())
    elif kind == 3:
        model = onnx.load(path, load_external_data=False)
        _keep_elsewhere(random, model, seeds)
        path.write_bytes(model.SerializeToString())
    elif kind == 4:
        path.write_bytes(
            random.choice((b"", b"\x08", bytes(1000), b"PK\x03\x04", (seeds.bundle / _TEXT).read_bytes()))
        )
    else:
        path = next(bundle.glob("image.fp32.weights*"), path)
        path.write_bytes(mutate_bytes(random, path.read_bytes()))
    content = json.loads((bundle / MANIFEST_NAME).read_text())
    for record in content["files"]:
        if record["path"] == path.name:
            record.update(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bytes=path.stat().st_size)
    (bundle / MANIFEST_NAME).write_text(_sign(content))
    scan = str(seeds.nifti)
    return Case(
        random.choice(
            (
                ["inspect", "b"],
                ["zeroshot", "b", scan, "--json"],
                ["zeroshot", "b", scan, "--json"],
                ["embed-text", "b", "Pleural effusion.", "--json"],
            )
        )
    )


def _change_graph(random: Random, model: Any) -> None:
    graph = model.graph
    for _ in range(random.choice((1, 1, 3))):
        node = random.choice(graph.node)
        kind = random.randrange(6)
        if kind == 0:
            node.op_type = random.choice(
                ("Add", "Conv", "MatMul", "Nothing", "Loop", "If", "Reshape", "Expand", "Tile")
            )
        elif kind == 1 and node.attribute:
            attribute = random.choice(node.attribute)
            attribute.i = random.choice(INTERESTING) % 2**63
            for index in range(len(attribute.ints)):
                attribute.ints[index] = random.choice(INTERESTING)
        elif kind == 2 and node.input:
            node.input[random.randrange(len(node.input))] = random.choice(
                (node.output[0], "", "nothing", graph.input[0].name)
            )
        elif kind == 3 and graph.initializer:
            tensor = random.choice(graph.initializer)
            if tensor.dims:
                tensor.dims[random.randrange(len(tensor.dims))] = random.choice(INTERESTING)
            tensor.data_type = random.choice((tensor.data_type, 1, 7, 10, 99))
        elif kind == 4:
            graph.output[0].name = random.choice(("x", graph.input[0].name))
        else:
            model.opset_import[0].version = random.choice((0, 1, 22, 999))


def _keep_elsewhere(random: Random, model: Any, seeds: Seeds) -> None:
    """Weights said to lie in another file: outside of the bundle, absolute, a device, beyond the end."""
    tensor = random.choice(model.graph.initializer)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    place = random.choice(
        (
            "../b/manifest.json",
            "/etc/passwd",
            str(seeds.bundle / _TEXT),
            "manifest.json",
            "/dev/zero",
            "../../../../../../etc/passwd",
            "",
            ".",
            "nowhere",
            "*/_ORT_MEM_ADDR_/*",
        )
    )
    for key, value in (
        ("location", place),
        ("offset", random.choice(("0", "4096", "-1", "9" * 30, "x"))),
        ("length", random.choice(("4", "16", "-4", "9" * 15))),
    ):
        if random.random() < 0.9:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value


def stores(random: Random, seeds: Seeds, folder: Path) -> Case:
    """Stores of embeddings and sets of prepared scans, damaged."""
    source, name = random.choice(((seeds.store, "store"), (seeds.prepared, "prepared")))
    place = Path(shutil.copytree(source, folder / name))
    # Not by name: some are hashes that hold a time.
    files = sorted((file for file in place.rglob("*") if file.is_file()), key=lambda f: (f.suffix, len(f.name)))
    file = random.choice(files)
    if file.suffix == ".json" and random.random() < 0.7:
        file.write_text(json.dumps(mutate_json(random, json.loads(file.read_text()))), errors="surrogatepass")
    elif random.random() < 0.1:
        file.unlink()
    else:
        file.write_bytes(mutate_bytes(random, file.read_bytes()))
    if name == "store":
        return random.choice(
            (
                Case(
                    ["search", "store", "Pleural effusion.", "--bundle", str(seeds.bundle), "--json"], kept=("store",)
                ),
                Case(["embed", str(seeds.bundle), str(seeds.nifti), "--out", "store"], kept=("store",)),
                Case(["index", "store"], kept=("store",)),
            )
        )
    return Case(
        [
            "zeroshot",
            str(seeds.bundle),
            *sorted(map(str, (path.relative_to(folder) for path in place.rglob("*.zip")))),
            "--json",
        ]
    )


class _Call:
    """Pickles as a call of a function of the system."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def checkpoints(random: Random, seeds: Seeds, folder: Path) -> Case:
    """Checkpoints: damaged archives, other tensors and arguments, pickles that call, headers that lie."""
    path = folder / "c.pth"
    kind = random.randrange(8)
    if kind == 0:
        path.write_bytes(mutate_bytes(random, seeds.checkpoint.read_bytes()))
    elif kind == 1:
        data = seeds.checkpoint.read_bytes()
        path.write_bytes(mutate_bytes(random, data, data.rfind(b"PK\x01\x02") - 4000))
    elif kind == 2:
        path = folder / "c.safetensors"
        data = seeds.safetensors.read_bytes()
        path.write_bytes(mutate_bytes(random, data, 0, 8 + int.from_bytes(data[:8], "little")))
    elif kind == 3:
        path.write_bytes(
            random.choice(
                (
                    b"",
                    b"\x80\x02}q\x00.",
                    pickle.dumps(_Call()),
                    pickle.dumps({"model": [1] * 9}),
                    b"PK\x03\x04",
                    bytes(99),
                )
            )
        )
    elif kind == 4:
        torch.save({"model": _Call(), "args": _Call()}, path)
    elif kind == 5:
        _edit_pickle(random, seeds.checkpoint, path)
    else:
        content = torch.load(seeds.checkpoint, weights_only=False)
        _change_tensors(random, content)
        torch.save(content, path)
    more = random.choice(
        ([], [], ["--input-size", random.choice(("128", "0", "-1", "127", "100000"))], ["--reduction", "depth"])
    )
    return Case(["export", path.name, "--tokenizer", str(seeds.tokenizer), "--out", "out", *more], reads_only=True)


def _edit_pickle(random: Random, source: Path, path: Path) -> None:
    """The archive is sound, the pickle in it is not."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = mutate_bytes(random, data)
            new.writestr(info.filename, data)


def _change_tensors(random: Random, content: dict[str, Any]) -> None:
    state = content["model"]
    for key in random.sample(sorted(state), random.choice((1, 1, 3))):
        tensor = state[key]
        kind = random.randrange(8)
        if kind == 0:
            del state[key]
        elif kind == 1:
            state[random.choice((key + "x", "", "module." + key))] = state.pop(key)
        elif kind == 2:
            state[key] = tensor.to(
                random.choice((torch.float16, torch.int8, torch.complex64, torch.bool, torch.float64))
            )
        elif kind == 3:
            state[key] = tensor.reshape(-1) if random.random() < 0.5 else tensor[None]
        elif kind == 4 and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[0] = random.choice(INTERESTING_FLOATS)
        elif kind == 5:
            state[key] = random.choice(JUNK)
        elif kind == 6:
            state[key] = torch.zeros(1).expand(random.choice((1 << 20, 1 << 40)))
        else:
            state[key] = tensor.to_sparse() if tensor.ndim else tensor
    if random.random() < 0.3:
        arguments = content["args"]
        setattr(arguments, random.choice(("model", "input_size", "reduction", "lr")), random.choice(JUNK))
