"""Damage to files of every kind that users bring, for `tests.fuzz`: each function changes one file at random."""

import copy
import io
import json
import random
import struct
import zipfile
import zlib

INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**64 - 1)
VALUES = (None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**400, 1e308, -0.5, "", "x", "16", "é" * 300, [], {}, [[]])
VALUES += ([1, 2], ["a"], {"a": 1}, {"depth": 16}, [2**40], float("nan"), float("inf"))


def mutate_bytes(random: random.Random, data: bytes) -> bytes:
    """Return the content after one to four changes, half of them in its first 512 bytes."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if not content:
            return b""
        length = len(content)
        place = random.choice(
            (
                random.randrange(min(512, length)),
                random.randrange(length),
                max(0, length - 1 - random.randrange(min(1024, length))),
            )
        )
        span = min(random.choice((1, 2, 4, 8, 32, 256)), length - place)
        match random.randrange(8):
            case 0:
                content[place] ^= 1 << random.randrange(8)
            case 1:
                content[place : place + span] = random.randbytes(span)
            case 2:
                size = random.choice((1, 2, 4, 8))
                number = random.choice(INTERESTING) & (2 ** (8 * size) - 1)
                content[place : place + size] = number.to_bytes(size, random.choice(("little", "big")))
            case 3:
                del content[place : place + span]
            case 4:
                content[place:place] = content[place : place + span] * random.choice((1, 1, 50))
            case 5:
                del content[place:]
            case 6:
                content[place : place + span] = bytes(span)
            case 7:
                other = random.randrange(length)
                content[place : place + span] = content[other : other + span]
    return bytes(content)


def mutate_json(random: random.Random, data: bytes) -> bytes:
    """Return JSON in which a value is replaced, removed or renamed; half of the time, change bytes instead."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    tree = json.loads(data)
    for _ in range(random.choice((1, 1, 2))):
        node, path = tree, []
        while isinstance(node, dict | list) and node and (not path or random.random() < 0.8):
            key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
            path.append((node, key))
            node = node[key]
        if not path:
            return json.dumps(copy.deepcopy(random.choice(VALUES))).encode()
        parent, key = path[-1]
        match random.randrange(4):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[random.choice(("", "a", key + "_", key.upper()))] = parent.pop(key)
            case 2 if isinstance(parent, dict):
                parent[random.choice(("", "extra", key * 2))] = copy.deepcopy(random.choice(VALUES))
            case _:
                parent[key] = copy.deepcopy(random.choice(VALUES))
    return json.dumps(tree).encode()


def mutate_safetensors(random: random.Random, data: bytes) -> bytes:
    """Return a file with a mutated JSON header of the right length, or with changed bytes."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__")
    if metadata and random.random() < 0.6:
        name = random.choice(list(metadata))
        metadata[name] = (
            mutate_json(random, metadata[name].encode()).decode(errors="replace") if metadata[name][:1] in "{[" else "x"
        )
        text = json.dumps(header).encode()
    else:
        text = mutate_json(random, json.dumps(header).encode())
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def mutate_pth(random: random.Random, data: bytes) -> bytes:
    """Return an archive whose pickle is mutated and whose checksums fit, or one with changed bytes."""
    if random.random() < 0.4 or not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(random, data)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl") or random.random() < 0.02:
                content = mutate_bytes(random, content)
            if random.random() > 0.01:
                archive.writestr(name, content)
    return target.getvalue()


def mutate_onnx(random: random.Random, data: bytes) -> bytes:
    """Return a graph in which nodes, attributes, constants or sides are changed, or one with changed bytes."""
    import onnx

    if random.random() < 0.4:
        return mutate_bytes(random, data)
    model = onnx.load_model_from_string(data)
    graph = model.graph
    numbers = (-(2**63), -1, 0, 1, 2, 7, 2**20, 2**62)
    kinds = sorted(
        {node.op_type for node in graph.node} | {"Shape", "Concat", "Reshape", "Squeeze", "Pad", "Clip", "Add"}
    )
    for _ in range(random.choice((1, 1, 2, 3))):
        node, tensor = random.choice(graph.node), random.choice(graph.initializer)
        match random.randrange(9):
            case 0:
                node.op_type = random.choice(kinds)
            case 1 if node.input:
                names = [name for other in graph.node for name in (*other.input, *other.output)]
                node.input[random.randrange(len(node.input))] = random.choice(names)
            case 2 if node.attribute:
                attribute = random.choice(node.attribute)
                attribute.i = random.choice(numbers)
                attribute.f = random.choice((0.0, -1.0, 1e38, float("nan")))
                for i in range(len(attribute.ints)):
                    attribute.ints[i] = random.choice(numbers)
            case 3 if node.attribute:
                attribute = random.choice(node.attribute)
                attribute.type = random.randrange(1, 12)
                del attribute.ints[random.randrange(len(attribute.ints) + 1) :]
            case 4 if tensor.dims:
                tensor.dims[random.randrange(len(tensor.dims))] = random.choice(numbers)
            case 5:
                tensor.data_type = random.randrange(25)
            case 6:
                del graph.node[random.randrange(len(graph.node))]
            case 7:
                tensor.data_location = onnx.TensorProto.EXTERNAL
                tensor.external_data.add(key="location", value=random.choice(("", ".", "..", "own.onnx", "/dev/zero")))
                tensor.external_data.add(key="offset", value=random.choice(("0", "-1", "x", "9" * 30)))
            case 8:
                del node.input[:1]
                del node.output[random.randrange(2) :]
    return model.SerializeToString()


def mutate_zip(random: random.Random, data: bytes) -> bytes:
    """Return an archive with one mutated member and checksums that fit, or one with changed bytes."""
    if random.random() < 0.4 or not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(random, data)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        chosen = random.choice(source.namelist())
        for name in source.namelist():
            content = source.read(name)
            if name == chosen:
                content = (mutate_json if name.endswith(".json") else mutate_bytes)(random, content)
            archive.writestr(name, content)
    return target.getvalue()


def mutate_png(random: random.Random, data: bytes) -> bytes:
    """Return a PNG file with changed bytes or changed packed pixels; half of the time, its checksums fit."""
    if random.random() < 0.3:
        place = data.index(b"IDAT")
        size = struct.unpack(">I", data[place - 4 : place])[0]
        packed = zlib.compress(mutate_bytes(random, zlib.decompress(data[place + 4 : place + 4 + size])))
        body = b"IDAT" + packed
        chunk = struct.pack(">I", len(packed)) + body + struct.pack(">I", zlib.crc32(body))
        return data[: place - 4] + chunk + data[place + 8 + size :]
    content = mutate_bytes(random, data)
    if random.random() < 0.5 or content[:8] != data[:8]:
        return content
    chunks, place = [content[:8]], 8
    while place + 12 <= len(content):
        size = struct.unpack(">I", content[place : place + 4])[0]
        body = content[place + 4 : place + 8 + size]
        chunks.append(content[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + size
    return b"".join([*chunks, content[place:]])


def mutate_run(random: random.Random, data: bytes) -> bytes:
    """Return a mutated file of a checkpoint's metadata: JSON or bytes."""
    return (mutate_json if data[:1] == b"{" else mutate_bytes)(random, data)
