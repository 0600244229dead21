"""What the attention_and_kv_cache chapter draws, from recordings of its code and from its formulas."""

import math

import svg

from llmbook.kit import draw
from llmbook.kit.hardware import gpu
from llmbook.kit.style import BLUE, COLORS, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, rank_color

from .calculator import MODELS, Model, devices_for_weights, kv_bytes, sequences_that_fit, with_other_heads
from .decode import choose_parts, dealt
from .heads import Heads, places
from .story import HEADS, PAGE, PAGES, ROOM, STORY, Moment, play

WIDTH, CHIP, PITCH = 800, "H100 SXM", 21
KINDS = {"no cache": "none", "static": "static", "paged": "paged"}
STEPS = range(len(STORY))
OWNERS = {"A": BLUE, "B": ORANGE, "C": GREEN, "D": PURPLE}


# --- tokens arriving one by one


def arriving(cache: str, step: int) -> svg.SVG:
    """Attention rows computed by a forward pass, what the cache holds, and what both cost."""
    moment = play(KINDS[cache])[step]
    parts = [draw.text(0, 17, f"Pass {step}: {STORY[step].words}", bold=True, size=16)]
    for b in range(3):
        parts.append(_triangle(270 * b, 66, moment, b))
    parts.append(draw.line(0, 304, WIDTH, 304, color=GREY, width=1, opacity=0.5))
    memory = {"no cache": _nothing, "static": _rows, "paged": _pool}[cache]
    parts.append(memory(moment, step, 330))
    parts.append(draw.line(0, 500, WIDTH, 500, color=GREY, width=1, opacity=0.5))
    for n, (name, value, most, color) in enumerate(_meters(cache, step)):
        x, y = (n % 2) * 410, 526 + 46 * (n // 2)
        parts.append(draw.text(x, y, f"{name}: {value:,}"))
        parts.append(draw.box(x, y + 7, 380, 14, GREY, opacity=0.16))
        parts.append(draw.box(x, y + 7, 380 * value / most, 14, color))
    return draw.canvas(WIDTH, 600, *parts)


def _triangle(x: float, y: float, moment: Moment, b: int) -> draw.Elements:
    """One sequence's attention matrix, as far as it exists; computed rows in red, the rest was computed before."""
    name, length, rows = moment.names[b], moment.lengths[b], moment.rows[b]
    if not length:
        return draw.text(x, y - 24, f"place {b}: empty", bold=True, color=GREY)
    first, words = length - len(rows), f"{len(rows)} row{'s' * (len(rows) != 1)} computed"
    parts = draw.text(x, y - 24, f"{name}: {length} tokens", bold=True, color=OWNERS[name], size=15)
    parts += draw.text(x, y - 7, words if len(rows) else "waits: nothing computed", color=RED if len(rows) else GREY)

    def look(r: int, c: int) -> tuple[str, float]:
        if c > r:
            return GREY, 0.06
        if r < first:
            return GREY, 0.3
        return COLORS["P"], 0.15 + 0.85 * round(float(rows[r - first, c]) * 8) / 8

    parts += draw.matrix(x, y, length, length, 15, look)
    if len(rows) and moment.before[b] < length:
        top = y + 15 * moment.before[b]
        parts += draw.text(x + 15 * length + 4, top + 12, "new" if length - moment.before[b] == 1 else "new, from here")
    return parts


def _nothing(moment: Moment, step: int, y: float) -> draw.Elements:
    parts = draw.text(0, y, "No cache: every key and value is computed in every pass, and forgotten", bold=True)
    for b in range(3):
        top, busy = y + 20 + 40 * b, len(moment.rows[b]) > 0
        parts += draw.text(0, top + 18, f"place {b}", color=GREY)
        for token in range(moment.lengths[b] if busy else 0):
            parts += draw.box(64 + 25 * token, top, 22, 26, OWNERS[moment.names[b]], str(token), stroke=RED, size=12)
        if busy:
            words = f"{moment.before[b]} of {moment.lengths[b]} computed once more"
            parts += draw.text(64 + 25 * ROOM + 12, top + 18, words)
    return parts


def _slot(x: float, y: float, moment: Moment, b: int, token: int, label: bool = True) -> draw.Elements:
    """One slot of a cache: appended now, held from before, or empty."""
    color = OWNERS[moment.names[b]] if b >= 0 else GREY
    if b < 0 or token >= moment.lengths[b]:
        return draw.box(x, y, 22, 26, color if b >= 0 else GREY, opacity=0.13)
    new = token >= moment.before[b]
    return draw.box(x, y, 22, 26, color, str(token), opacity=1 if new else 0.45, stroke=RED if new else None, size=12)


def _rows(moment: Moment, step: int, y: float) -> draw.Elements:
    used = sum(moment.lengths)
    parts = draw.text(0, y, f"Static: {ROOM} slots reserved per place", bold=True)
    parts += draw.text(WIDTH, y, f"{used} of {3 * ROOM} slots used, {3 * ROOM - used} reserved and idle", anchor="end")
    for b in range(3):
        top = y + 20 + 40 * b
        parts += draw.text(0, top + 18, f"place {b}", color=GREY)
        for token in range(ROOM):
            parts += _slot(64 + 25 * token, top, moment, b, token)
        if moment.lengths[b]:
            word = f"{moment.names[b]} reads {moment.lengths[b]}, appends {len(moment.rows[b])}"
            parts += draw.text(64 + 25 * ROOM + 12, top + 18, word)
    return parts + draw.text(64, y + 156, "red rim: appended by this pass; pale: held and read", size=12)


def _pool(moment: Moment, step: int, y: float) -> draw.Elements:
    owner = {page: (b, n) for b, table in enumerate(moment.tables) for n, page in enumerate(table)}
    free, idle = PAGES - len(owner), len(owner) * PAGE - sum(moment.lengths)
    parts = draw.text(0, y, f"Paged: {PAGES} pages of {PAGE} slots", bold=True)
    words = f"{free} pages free for anyone, {idle} idle slot{'s' * (idle != 1)} in pages"
    parts += draw.text(WIDTH, y, words, anchor="end")
    for page in range(PAGES):
        x, top = 108 * (page % 4), y + 34 + 44 * (page // 4)
        b, n = owner.get(page, (-1, 0))
        parts += draw.text(x, top - 2, f"page {page}" + ("" if b >= 0 else ": free"), size=12)
        for slot in range(PAGE):
            parts += _slot(x + 24 * slot, top + 2, moment, b, n * PAGE + slot)
    for b, table in enumerate(moment.tables):
        top = y + 36 + 44 * b
        name, words = moment.names[b], f"{moment.names[b]}'s table" if table else f"place {b}: no pages"
        parts += draw.text(450, top + 18, words, color=OWNERS[name] if table else GREY, bold=True)
        for n, page in enumerate(table):
            new = n * PAGE >= moment.before[b]
            parts += draw.box(528 + 34 * n, top, 30, 28, OWNERS[name], str(page), opacity=1 if new else 0.45,
                              stroke=RED if new else None)
    return parts


def _meters(cache: str, step: int) -> list[tuple[str, int, int, str]]:
    moments = {name: play(kind) for name, kind in KINDS.items()}
    mine = moments[cache]
    every = [m for run in moments.values() for m in run]
    total, worst = sum(m.flop for m in mine[: step + 1]), sum(m.flop for m in moments["no cache"])
    return [
        ("FLOP in this pass", mine[step].flop, max(m.flop for m in every), COLORS["P"]),
        ("cache bytes read", mine[step].read, max(m.read for m in every), TEAL),
        ("FLOP so far", total, worst, COLORS["P"]),
        ("cache bytes appended", mine[step].written, max(m.written for m in every), TEAL),
    ]


def arriving_caption(cache: str, step: int) -> str:
    m = play(KINDS[cache])[step]
    rows, tokens = sum(map(len, m.rows)), sum(STORY[step].counts)
    return (
        f"{cache}, pass {step}: {STORY[step].words}. {tokens} new tokens, {rows} rows of attention computed; "
        f"{m.flop:,} FLOP, {m.read:,} bytes of cache read, {m.written:,} appended "
        f"(D = {HEADS.dim}, {HEADS.heads} heads, {HEADS.kv_heads} KV heads, bf16)."
    )


# --- the calculator


def _gpus(model: Model) -> int:
    return devices_for_weights(model, gpu(CHIP).memory * 1e9)


def calculator(model: str, tokens: int, batch: int) -> svg.SVG:
    """Bytes per token of every model, the chosen one's cache against a GPU, and the same model with other heads."""
    chosen, n = MODELS[model], _gpus(MODELS[model])
    parts = [draw.text(0, 16, "KV cache per token, KB", bold=True)]
    most = max(m.bytes_per_token() for m in MODELS.values())
    for i, (name, m) in enumerate(sorted(MODELS.items(), key=lambda item: item[1].bytes_per_token())):
        y, mine = 28 + 25 * i, name == model
        parts.append(draw.text(118, y + 15, name, anchor="end", bold=mine, size=12))
        wide = 205 * m.bytes_per_token() / most
        parts.append(draw.box(126, y, wide, 20, TEAL if mine else GREY, opacity=1 if mine else 0.4))
        parts.append(draw.text(132 + wide, y + 15, f"{m.bytes_per_token() / 1000:.3f} {m.kind}", size=12))
    parts.append(draw.text(450, 16, f"{batch} × {tokens:,} tokens, by choice of heads", bold=True))
    forms = with_other_heads(chosen)
    widest = max(kv_bytes(m, batch, tokens) for m in forms.values())
    for i, (name, m) in enumerate(forms.items()):
        y, size, real = 34 + 44 * i, kv_bytes(m, batch, tokens), m == chosen
        parts.append(draw.text(450, y + 18, name, bold=real))
        parts.append(draw.box(566, y, 160 * size / widest, 26, TEAL if real else GREY, opacity=1 if real else 0.4))
        parts.append(draw.text(572 + 160 * size / widest, y + 18, _gb(size)))
    memory, weights = gpu(CHIP).memory, 2 * chosen.parameters / n / 1e9
    kv = kv_bytes(chosen, batch, tokens, n) / 1e9
    y = 306
    words = f"one {CHIP}" if n == 1 else f"each of the {n} {CHIP} that the weights need"
    parts.append(draw.text(0, y - 8, words, bold=True))
    shown = min(kv, 1.08 * memory - weights)  # what sticks out is cut off
    bars = [draw.Bar("weights", weights, "parameters"), draw.Bar("KV cache", shown, "kv")]
    parts.append(draw.ledger(0, y, 730, 40, bars, memory)[:-1])
    fit = sequences_that_fit(chosen, tokens, memory * 1e9, n)
    verdict = f"{weights:.1f} GB of weights + {_gb(1e9 * kv)} of cache: " + (
        "it fits" if weights + kv <= memory else f"too much for {memory:g} GB"
    )
    parts.append(draw.text(0, y + 62, verdict, color="currentColor" if weights + kv <= memory else RED, bold=True))
    parts.append(draw.text(730, y + 62, f"at most {fit:,} sequences of {tokens:,} tokens", anchor="end"))
    return draw.canvas(WIDTH, y + 76, *parts)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.3g} GB"


def calculator_caption(model: str, tokens: int, batch: int) -> str:
    m, n = MODELS[model], _gpus(MODELS[model])
    fit = sequences_that_fit(m, tokens, gpu(CHIP).memory * 1e9, n)
    return (
        f"{model} ({m.kind}): {m.bytes_per_token():,} bytes per token in bf16. {batch} × {tokens:,} tokens take "
        f"{_gb(kv_bytes(m, batch, tokens))} in all, {_gb(kv_bytes(m, batch, tokens, n))} on each of "
        f"{n} GPU{'s' * (n > 1)}; beside the weights {fit:,} such sequences fit (activations left out)."
    )


# --- heads on devices


EXAMPLES = {
    "the notes' example": Heads(512, 8, 4), "Llama-3-70B": MODELS["Llama-3-70B"].attention,
    "Llama-2-7B": MODELS["Llama-2-7B"].attention, "Gemma-2B": MODELS["Gemma-2B"].attention,
}


def placed(model: str, devices: int) -> svg.SVG:
    """Each device's query heads over the KV heads they read; a colour is a KV head."""
    heads = EXAMPLES[model]
    try:
        everywhere, share = places(heads, devices), heads.local(devices)
    except ValueError as refusal:
        refused = draw.text(WIDTH / 2, 60, str(refusal), anchor="middle", color=RED, bold=True, size=15)
        return draw.canvas(WIDTH, 110, draw.box(0, 10, WIDTH, 90, RED, opacity=0.1), refused)
    columns = min(devices, 4)
    wide = (WIDTH - 12 * (columns - 1)) / columns
    per = int((wide - 16) // PITCH)
    lines = math.ceil(share.n_local_heads / per), math.ceil(share.n_local_kv_heads / per)
    tall, parts = PITCH * sum(lines) + 60, []
    for rank, place in enumerate(everywhere):
        x, y = (wide + 12) * (rank % columns), (tall + 12) * (rank // columns)
        parts.append(draw.box(x, y, wide, tall, GREY, opacity=0.13))
        parts.append(draw.text(x + 10, y + 19, f"device {rank}", bold=True))
        middle = y + 43 + PITCH * lines[0]
        words = "keys, values" + (f" · {share.copies} copies" if share.copies > 1 else "")
        parts.append(draw.text(x + 10, middle, words, size=12))
        for numbers, top, group in ((place.query_heads, y + 28, heads.group), (place.kv_heads, middle + 6, 1)):
            for i, head in enumerate(numbers):
                at = (x + 10 + PITCH * (i % per), top + PITCH * (i // per))
                parts.append(draw.box(*at, PITCH - 2, PITCH - 2, rank_color(head // group), str(head), size=12))
    return draw.canvas(WIDTH, (tall + 12) * math.ceil(devices / columns), *parts)


def placed_caption(model: str, devices: int) -> str:
    heads = EXAMPLES[model]
    try:
        share = heads.local(devices)
    except ValueError as refusal:
        return f"{model} on {devices} devices is refused: {refusal}."
    copies = f"; each KV head lives on {share.copies} devices, where plain division says {heads.kv_heads // devices}"
    return (
        f"{model}, {heads.heads} heads and {heads.kv_heads} KV heads on {devices} device{'s' * (devices > 1)}: "
        f"n_local_heads {share.n_local_heads}, n_local_kv_heads {share.n_local_kv_heads}, n_rep {share.n_rep}"
        f"{copies if share.copies > 1 else ''}."
    )


# --- who reads the cache


def splitting(batch: int, tokens: int, keys: str) -> svg.SVG:
    """An H100's multiprocessors and the keys that each reads; a colour is a KV head."""
    sms, (work, n) = gpu(CHIP).sms, _shares(batch, tokens, keys)
    longest, busy = max(map(sum, work)), sum(map(sum, work)) / sms / max(map(sum, work))
    parts = [draw.text(0, 16, f"{8 * batch} (sequence, KV head) pairs × {n} part{'s' * (n > 1)}", bold=True)]
    for sm, programs in enumerate(work):
        x, y, side = sm % 22 * 36, 28 + sm // 22 * 36, 32
        parts.append(draw.box(x, y, side, side, GREY, opacity=0.16))
        bottom: float = y + side
        for turn, walk in enumerate(programs):
            tall = side * walk / longest
            bottom -= tall
            parts.append(draw.box(x, bottom, side, tall - 1, rank_color((sm + turn * sms) // n % 8)))
    y = 28 + 6 * 36 + 24
    for i, (words, share, color) in enumerate((
        (f"the busiest multiprocessor reads {longest:,} keys", longest / tokens, ORANGE),
        (f"{busy:.0%} of the chip reads", busy, TEAL),
    )):
        parts.append(draw.text(i * 410, y, words))
        parts.append(draw.box(i * 410, y + 8, 380, 16, GREY, opacity=0.16))
        parts.append(draw.box(i * 410, y + 8, 380 * share, 16, color))
    return draw.canvas(WIDTH, y + 34, *parts)


def _shares(batch: int, tokens: int, keys: str) -> tuple[list[list[int]], int]:
    sms = gpu(CHIP).sms
    n = choose_parts(8 * batch, tokens, sms) if keys == "in parts" else 1
    return dealt(8 * batch, tokens, n, sms), n


def splitting_caption(batch: int, tokens: int, keys: str) -> str:
    work, n = _shares(batch, tokens, keys)
    return (
        f"Batch {batch}, {tokens:,} tokens, 8 KV heads, keys {keys}: {8 * batch * n} programs on {len(work)} "
        f"multiprocessors, {sum(map(bool, work))} of them busy; the longest walk is {max(map(sum, work)):,} keys."
    )
