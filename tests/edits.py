"""Random edits of small text files, as a careless hand, a kill or a bad disk makes them."""

import copy
import json
import random

ODD = [
    None, True, False, -1, 0, 1, 2, 10**6, 2**31, 1e400, float("nan"), 10**400, "", "x", "0", "\udcff", "\0", [], {}, [[]],
    {"": 0}, {"name": "x"}, "../..", "../x", "/etc/passwd", "1e999", 2**63, -(2**63), 0.5, 1.5, "step", "000000", "é" * 300,
    ["a", None], [None], [1] * 100, "null",
]  # fmt: skip
BYTES = [
    b"\0", b"\xff", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b"[" * 3000, b'"', b'""', b",", b";", b"\t", b"\r",
    b"\n", b":", b": ", b"-", b"&a *a", b"!!python/name:os.x", b"e999", b"NaN", b"Infinity", b"1e400", b"null", b"\\ud800", b"\\u0000",
    b"..", b"/", b"9" * 400, "é".encode(),
]  # fmt: skip


def damaged(text: bytes, rng: random.Random) -> bytes:
    """`text` with bytes flipped, cut off, doubled, left out, put in or in another encoding, or its lines in another order."""
    out, at = bytearray(text), rng.randrange(len(text) + 1)
    span = slice(at, at + rng.choice([0, 1, 1, 4, 30]))
    kind = rng.randrange(8)
    if kind == 0:
        return text[:at]
    if kind == 1:
        for _ in range(rng.choice([1, 1, 3, 20])):
            if out:
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[span] = out[span] * 2
    elif kind == 3:
        del out[span]
    elif kind == 4:
        out[span] = rng.choice(BYTES)
    elif kind == 5:
        encoding = rng.choice(["utf-16", "utf-32", "utf-16-le", "cp1252"])
        return text.decode(errors="replace").encode(encoding, "replace")
    else:
        lines = text.split(b"\n")
        if kind == 6:
            rng.shuffle(lines)
        else:
            lines = rng.choices(lines, k=rng.randint(1, 2 * len(lines)))
        return b"\n".join(lines)
    return bytes(out)


def changed(tree, rng: random.Random):
    """A copy of parsed JSON or YAML with one value, somewhere in it, made another or left out, or one added."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "extends", "deepspeed", 3, str(key) + "s"])] = holder[key]
    elif kind == 2:
        holder[key] = [holder[key]] * rng.randint(1, 2)
    elif kind == 3:
        holder[key] = {"x": holder[key]}
    elif kind == 4:
        holder[key] = str(holder[key])
    elif kind == 5:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 6 and isinstance(holder[key], int):
        holder[key] += rng.choice([-1, 1, 10**6, -(10**6)])
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return tree if rng.random() < 0.98 else rng.choice(ODD)


def several(edit, content, rng: random.Random):
    """`content` after one to three of these edits."""
    for _ in range(rng.randint(1, 3)):
        content = edit(content, rng)
    return content


def _places(tree):
    """(the dict or list that holds it, its key or index) of every value in the tree."""
    if isinstance(tree, (dict, list)):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, key
            yield from _places(value)


def edited_json(text: bytes, rng: random.Random) -> bytes:
    """One JSON object, edited as a tree or as bytes."""
    if rng.random() < 0.5:
        return damaged(text, rng)
    return json.dumps(changed(json.loads(text), rng)).encode("utf-8", "surrogatepass")


def edited_lines(text: bytes, rng: random.Random) -> bytes:
    """A JSON-lines file, one of its lines edited."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = edited_json(lines[at], rng)
    return b"\n".join(lines) + rng.choice([b"\n", b""])
