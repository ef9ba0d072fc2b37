#!/usr/bin/env python3
"""Trains the bundled demo model and writes it as GGUF: models/demo.gguf.

Needs python3-torch and python3-numpy (Debian: also a fast BLAS, libopenblas0-serial). Everything is in this file: a
byte-level BPE trainer, a llama-architecture model, the training loop, a GGUF version 3 writer for Q8_0 and F32, and a
check that reads the written file back.

scripts/README.md has the commands.
"""

import argparse
import collections
import json
import math
import random
import re
import struct
import time

import numpy as np
import torch
import torch.nn.functional as F

N_VOCAB = 1024
N_CTX = 512
N_EMBD = 256
N_LAYER = 5
N_HEAD = 8
N_HEAD_KV = 4
N_FF = 512
HEAD_DIM = N_EMBD // N_HEAD
ROPE_BASE = 10000.0
RMS_EPS = 1e-5

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


# --------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE with GPT-2's pre-tokenizer.

# GPT-2's pattern with \p{L} and \p{N} written for ASCII; the training text has no other letters.
PRE_TOKEN = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def byte_alphabet():
    """The printable character that stands for each byte in GPT-2 style vocabularies."""
    keep = list(range(0x21, 0x7F)) + list(range(0xA1, 0xAD)) + list(range(0xAE, 0x100))
    chars, extra = {b: chr(b) for b in keep}, 0
    for b in range(256):
        if b not in chars:
            chars[b] = chr(256 + extra)
            extra += 1
    return [chars[b] for b in range(256)]


BYTE_CHARS = byte_alphabet()
CHAR_BYTES = {c: b for b, c in enumerate(BYTE_CHARS)}


def merge_word(symbols, pair):
    """symbols with every non-overlapping occurrence of pair, from the left, joined."""
    out, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and symbols[i] == pair[0] and symbols[i + 1] == pair[1]:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def train_bpe(docs, n_merges):
    """n_merges pair merges (left, right) in rank order: those that make the numbers up to 40 single tokens, so that sums are
    a matter of single tokens, then the most frequent ones over docs."""
    counts = collections.Counter()
    for doc in docs:
        for fragment in re.split("|".join(map(re.escape, SPECIAL)), doc):
            counts.update(PRE_TOKEN.findall(fragment))
    words = []
    for word, n in counts.items():
        words.append(([BYTE_CHARS[b] for b in word.encode()], n))
    merges = [tuple(str(n)) for n in range(10, 41)] + [(BYTE_CHARS[0x20], str(n)) for n in range(41)]
    for merge in merges:
        words = [(merge_word(s, merge), n) for s, n in words]
    while len(merges) < n_merges:
        pairs = collections.Counter()
        for symbols, n in words:
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        words = [(merge_word(s, best) if best[0] in s else s, n) for s, n in words]
    return merges


class Tokenizer:
    """Standard BPE: within a pre-token, the adjacent pair of lowest rank is merged first, the leftmost of equals."""

    def __init__(self, tokens, merges):
        self.tokens = tokens
        self.ids = {t: i for i, t in enumerate(tokens)}
        self.ranks = {tuple(m): i for i, m in enumerate(merges)}
        self.cache = {}
        self.special = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")

    def encode_word(self, word):
        if word not in self.cache:
            symbols = [BYTE_CHARS[b] for b in word.encode()]
            while len(symbols) > 1:
                rank, i = min((self.ranks.get(p, 1 << 30), i) for i, p in enumerate(zip(symbols, symbols[1:])))
                if rank == 1 << 30:
                    break
                symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
            self.cache[word] = [self.ids[s] for s in symbols]
        return self.cache[word]

    def encode(self, text):
        """Token ids of text; control tokens written out in it become their ids."""
        out = []
        for fragment in self.special.split(text):
            if fragment in SPECIAL:
                out.append(self.ids[fragment])
            else:
                for word in PRE_TOKEN.findall(fragment):
                    out.extend(self.encode_word(word))
        return out

    def decode(self, ids):
        """Text of ids; control tokens are written out."""
        out = b""
        for i in ids:
            t = self.tokens[i]
            out += t.encode() if t in SPECIAL else bytes(CHAR_BYTES[c] for c in t)
        return out.decode(errors="replace")


def make_tokenizer(docs):
    merges = train_bpe(docs, N_VOCAB - len(SPECIAL) - 256)
    return Tokenizer(SPECIAL + BYTE_CHARS + [a + b for a, b in merges], merges), merges


# --------------------------------------------------------------------------------------------------------------
# Model. Weights are a dict with GGUF tensor names; a matrix is [rows, columns], y = W x.

def tensor_shapes():
    shapes = {"token_embd.weight": (N_VOCAB, N_EMBD), "output_norm.weight": (N_EMBD,)}
    for i in range(N_LAYER):
        b = "blk.{}.".format(i)
        shapes.update({
            b + "attn_norm.weight": (N_EMBD,), b + "attn_q.weight": (N_HEAD * HEAD_DIM, N_EMBD),
            b + "attn_k.weight": (N_HEAD_KV * HEAD_DIM, N_EMBD), b + "attn_v.weight": (N_HEAD_KV * HEAD_DIM, N_EMBD),
            b + "attn_output.weight": (N_EMBD, N_HEAD * HEAD_DIM), b + "ffn_norm.weight": (N_EMBD,),
            b + "ffn_gate.weight": (N_FF, N_EMBD), b + "ffn_up.weight": (N_FF, N_EMBD), b + "ffn_down.weight": (N_EMBD, N_FF)})
    return shapes


def init_weights():
    weights = {}
    for name, shape in tensor_shapes().items():
        if len(shape) == 1:
            w = torch.ones(shape)
        elif name == "token_embd.weight":
            w = torch.randn(shape) * 0.05
        else:
            scale = 1.0 / math.sqrt(shape[1])
            w = torch.randn(shape) * scale * (0.3 if "attn_output" in name or "ffn_down" in name else 1.0)
        weights[name] = w.requires_grad_()
    return weights


def rms_norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS) * w


def rope_table(n):
    """cos and sin [n, HEAD_DIM/2] for positions 0..n-1."""
    freq = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angle = torch.arange(n, dtype=torch.float32)[:, None] * freq
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotates the pairs (2i, 2i+1) of the last dimension of x [B, H, T, HEAD_DIM]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Attention(torch.autograd.Function):
    """softmax(q k^T + mask) v. The backward uses rowsum(dP * P) = rowsum(dO * O) (Dao et al. 2022, arXiv:2205.14135), several
    times faster on the CPU than the one of torch.softmax."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        p = torch.softmax((q @ k.transpose(2, 3)).add_(mask), -1)
        out = p @ v
        ctx.save_for_backward(q, k, v, p, out)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, p, out = ctx.saved_tensors
        d_scores = (d_out @ v.transpose(2, 3)).sub_((d_out * out).sum(-1, keepdim=True)).mul_(p)
        return d_scores @ k, d_scores.transpose(2, 3) @ q, p.transpose(2, 3) @ d_out, None


def linear_bf16(x, w):
    """F.linear with the product in bfloat16: twice as fast where the CPU has it, and exact enough for training."""
    return F.linear(x.bfloat16(), w.bfloat16()).float()


def forward(w, ids, mask, linear=F.linear):
    """Logits [B, T, N_VOCAB] of ids [B, T]; mask is added to the attention scores, [B or 1, 1, T, T]."""
    n_batch, n_tokens = ids.shape
    cos, sin = rope_table(n_tokens)
    x = F.embedding(ids, w["token_embd.weight"])
    group = N_HEAD // N_HEAD_KV
    for i in range(N_LAYER):
        b = "blk.{}.".format(i)
        h = rms_norm(x, w[b + "attn_norm.weight"])
        q = linear(h, w[b + "attn_q.weight"]).view(n_batch, n_tokens, N_HEAD, HEAD_DIM).transpose(1, 2)
        k = linear(h, w[b + "attn_k.weight"]).view(n_batch, n_tokens, N_HEAD_KV, HEAD_DIM).transpose(1, 2)
        v = linear(h, w[b + "attn_v.weight"]).view(n_batch, n_tokens, N_HEAD_KV, HEAD_DIM).transpose(1, 2)
        q, k = rope(q, cos, sin) * HEAD_DIM ** -0.5, rope(k, cos, sin)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        h = Attention.apply(q, k, v, mask).transpose(1, 2).reshape(n_batch, n_tokens, N_HEAD * HEAD_DIM)
        x = x + linear(h, w[b + "attn_output.weight"])
        h = rms_norm(x, w[b + "ffn_norm.weight"])
        h = F.silu(linear(h, w[b + "ffn_gate.weight"])) * linear(h, w[b + "ffn_up.weight"])
        x = x + linear(h, w[b + "ffn_down.weight"])
    return F.linear(rms_norm(x, w["output_norm.weight"]), w["token_embd.weight"])


def causal_mask(n):
    return torch.full((n, n), -1e9).triu(1)[None, None]


@torch.no_grad()
def generate(w, tok, prompt, n_max, stop=True):
    """Greedy continuation of prompt: ids, and the smallest gap between the best and the second logit."""
    ids, out, margin = tok.encode(prompt), [], 1e9
    while len(out) < n_max and len(ids) < N_CTX:
        logits = forward(w, torch.tensor([ids]), causal_mask(len(ids)))[0, -1]
        top = logits.topk(2)
        margin = min(margin, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
        out.append(ids[-1])
        if stop and ids[-1] in (0, 2):
            break
    return out, margin


# --------------------------------------------------------------------------------------------------------------
# Training.

def pack_rows(docs, n_tokens, r):
    """Yields (ids, targets, document number) rows of n_tokens that begin with a document; -100 where nothing follows.

    Documents are taken from a window so that they fill the row; one longer than a row is cut.
    """
    window, source = [], iter(docs)
    while True:
        ids, number, left = [], [], n_tokens + 1
        while left > 0:
            while len(window) < 48:
                d = next(source, None)
                if d is None:
                    break
                window.append(d)
            if not window:
                return
            fits = [i for i, d in enumerate(window) if len(d) <= left]
            if not ids and not fits:
                fits = [0]
            if not fits:
                break
            d = window.pop(fits[0] if r.random() < 0.5 or left > 200 else max(fits, key=lambda i: len(window[i])))
            d = d[:left]
            number += [number[-1] + 1 if number else 0] * len(d)
            ids += d
            left -= len(d)
        pad = n_tokens + 1 - len(ids)
        yield ids[:-1] + [0] * pad, ids[1:] + [-100] * pad, number[:-1] + [-1] * pad


def batches(docs, seed):
    """Endless batches of 3072 tokens: (ids, targets, mask).

    Three of four have rows of 256 tokens in which a document sees only itself, as it will when it is a prompt; the fourth
    has rows of 512 in which everything before is seen, so that distances up to the context length are trained.
    """
    r = random.Random(seed)
    epoch = 0
    while True:
        order = list(docs)
        r.shuffle(order)
        cut = len(order) * 3 // 4
        short, long = pack_rows(order[:cut], 256, r), pack_rows(order[cut:], 512, r)
        step = 0
        while True:
            n_rows, source = (6, long) if step % 4 == 3 else (12, short)
            rows = [row for row in (next(source, None) for _ in range(n_rows)) if row is not None]
            if len(rows) < n_rows:
                break
            ids, targets, number = (torch.tensor(x) for x in zip(*rows))
            mask = causal_mask(ids.shape[1])
            if n_rows == 12:
                mask = mask + (number[:, None, :, None] != number[:, None, None, :]).float() * -1e9
            yield ids, targets, mask
            step += 1
        epoch += 1
        print("epoch", epoch, "done", flush=True)


class Muon:
    """Momentum whose update matrix is replaced by its nearest semi-orthogonal one (Newton-Schulz, Jordan 2024)."""

    def __init__(self, params, momentum=0.95, decay=0.02):
        self.params, self.momentum, self.decay = params, momentum, decay
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr):
        for p, m in zip(self.params, self.buffers):
            m.mul_(self.momentum).add_(p.grad)
            u = p.grad + self.momentum * m
            wide = u.shape[0] <= u.shape[1]
            u = u if wide else u.t()
            u = (u / (u.norm() + 1e-7)).bfloat16()
            for _ in range(5):
                s = u @ u.t()
                u = 3.4445 * u + (-4.7750 * s + 2.0315 * (s @ s)) @ u
            u = (u if wide else u.t()).float()
            p.mul_(1 - lr * self.decay)
            p.add_(u, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
            p.grad = None


@torch.no_grad()
def sums_accuracy(w, tok):
    """Share of all sums and differences whose answer is the best next token, as text and as a chat."""
    out = []
    for form in ("{} {} {} =", "<|im_start|>user\nWhat is {} {} {}?<|im_end|>\n<|im_start|>assistant\n{} {} {} ="):
        rows, answers = [], []
        for a in range(21):
            for b in range(21):
                for op, c in (("+", a + b), ("-", a - b)):
                    if c >= 0:
                        rows.append(tok.encode(form.format(*(a, op, b) * 2)))
                        answers.append(tok.encode(" {}".format(c))[0])
        right = 0
        by_length = collections.defaultdict(list)
        for row, answer in zip(rows, answers):
            by_length[len(row)].append((row, answer))
        for n, group in by_length.items():
            logits = forward(w, torch.tensor([g[0] for g in group]), causal_mask(n))[:, -1]
            right += int((logits.argmax(-1) == torch.tensor([g[1] for g in group])).sum())
        out.append(round(right / len(rows), 4))
    return out


PROMPTS = [
    "Once upon a time there was a fox named Lily.",
    "Question: What is the capital of France?\nAnswer:",
    "Building a website can be done in 10 simple steps:",
    "7 + 5 =",
    "The sky is",
    "I believe the meaning of life is",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nTell me a short story about a rabbit named Oscar.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is 17 + 16?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat colour is the sky?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhow do i make a cup of tea<|im_end|>\n<|im_start|>assistant\n",
]


def train(args):
    torch.manual_seed(args.seed)
    with open(args.text, encoding="utf-8") as f:
        texts = [json.loads(line) for line in f]
    tok, merges = make_tokenizer(texts[:20000])
    w = init_weights()
    print("numbers as one token:", all(len(tok.encode(s + str(n))) == 1 for n in range(41) for s in ("", " ")), flush=True)
    docs = [tok.encode(t) + [0] for t in texts]
    n_tokens = sum(map(len, docs))
    print("documents {}, tokens {}, characters per token {:.2f}".format(len(docs), n_tokens, sum(map(len, texts)) / n_tokens), flush=True)
    held_out, docs = docs[:300], docs[300:]
    del texts

    print("parameters", sum(p.numel() for p in w.values()))
    matrices = [p for n, p in w.items() if p.dim() == 2 and n != "token_embd.weight"]
    others = [p for n, p in w.items() if p.dim() == 1 or n == "token_embd.weight"]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    held_rows = [row for _, row in zip(range(24), pack_rows(held_out, 256, random.Random(0)))]

    start, step, last_report, shown = time.time(), 0, time.time(), 0.0
    losses = []
    for ids, targets, mask in batches(docs, args.seed):
        done = step / args.steps if args.steps else (time.time() - start) / (60 * args.minutes)
        if done >= 1:
            break
        # Linear warm-up over 40 steps, constant, then down to zero over the last 60%.
        factor = min(1.0, (step + 1) / 40) * min(1.0, (1 - done) / 0.6)
        for g in adam.param_groups:
            g["lr"] = args.lr_adam * factor
        loss = F.cross_entropy(forward(w, ids, mask, linear_bf16 if args.bf16 else F.linear).view(-1, N_VOCAB), targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        muon.step(args.lr_muon * factor)
        losses.append(float(loss.detach()))
        step += 1
        if time.time() - last_report > 20:
            print("step {} done {:.3f} loss {:.4f} tokens/s {:.0f}".format(
                step, done, sum(losses[-20:]) / len(losses[-20:]), step * 3072 / (time.time() - start)), flush=True)
            last_report = time.time()
        if args.checkpoints and done - shown > 0.11:
            shown = done
            with torch.no_grad():
                x, y, number = (torch.tensor(v) for v in zip(*held_rows))
                m = causal_mask(256) + (number[:, None, :, None] != number[:, None, None, :]).float() * -1e9
                held = float(F.cross_entropy(forward(w, x, m).view(-1, N_VOCAB), y.view(-1)))
            print("held-out loss {:.4f}, sums right {}".format(held, sums_accuracy(w, tok)), flush=True)
            for prompt in PROMPTS:
                print("  ", repr(prompt), "->", repr(tok.decode(generate(w, tok, prompt, 40)[0])), flush=True)
            write_gguf("{}/checkpoint.gguf".format(args.checkpoints), w, tok, merges)
    print("steps {}, tokens {}, {:.1f} minutes, sums right {}".format(step, step * 3072, (time.time() - start) / 60, sums_accuracy(w, tok)))
    write_gguf(args.output, w, tok, merges)
    check(args.output)


# --------------------------------------------------------------------------------------------------------------
# GGUF version 3.

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TYPE_F32, TYPE_Q8_0 = 0, 8
ALIGNMENT = 32


def gguf_string(s):
    b = s.encode()
    return struct.pack("<Q", len(b)) + b


def gguf_value(kind, value):
    if kind == STRING:
        return gguf_string(value)
    return struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<B"}[kind], value)


def quantize_q8_0(x):
    """Blocks of 32 values: scale as half, 32 signed bytes."""
    blocks = x.reshape(-1, 32).astype(np.float32)
    d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, d, out=np.zeros_like(d), where=d > 0)
    scaled = blocks * inverse
    q = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled).astype(np.int8)  # halves away from zero
    return np.concatenate([d.astype("<f2").view(np.uint8), q.view(np.uint8)], 1).tobytes()


def write_gguf(path, w, tok, merges):
    items = [
        ("general.architecture", STRING, "llama"), ("general.type", STRING, "model"), ("general.name", STRING, "Caravan demo"),
        ("general.license", STRING, "MIT"), ("general.description", STRING, "A toy model trained on generated text: stories about "
         "animals, greetings, small sums, colours, capitals and short how-to lists."),
        ("general.languages", (ARRAY, STRING), ["en"]), ("general.file_type", U32, 7), ("general.quantization_version", U32, 2),
        ("llama.context_length", U32, N_CTX), ("llama.embedding_length", U32, N_EMBD), ("llama.block_count", U32, N_LAYER),
        ("llama.feed_forward_length", U32, N_FF), ("llama.attention.head_count", U32, N_HEAD),
        ("llama.attention.head_count_kv", U32, N_HEAD_KV), ("llama.attention.layer_norm_rms_epsilon", F32, RMS_EPS),
        ("llama.rope.dimension_count", U32, HEAD_DIM), ("llama.rope.freq_base", F32, ROPE_BASE), ("llama.vocab_size", U32, N_VOCAB),
        ("tokenizer.ggml.model", STRING, "gpt2"), ("tokenizer.ggml.pre", STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", (ARRAY, STRING), tok.tokens),
        ("tokenizer.ggml.token_type", (ARRAY, I32), [3] * len(SPECIAL) + [1] * (N_VOCAB - len(SPECIAL))),
        ("tokenizer.ggml.merges", (ARRAY, STRING), [" ".join(m) for m in merges]),
        ("tokenizer.ggml.bos_token_id", U32, 0), ("tokenizer.ggml.eos_token_id", U32, 0), ("tokenizer.ggml.eot_token_id", U32, 2),
        ("tokenizer.ggml.padding_token_id", U32, 0), ("tokenizer.ggml.add_bos_token", BOOL, 0),
        ("tokenizer.chat_template", STRING, CHAT_TEMPLATE),
    ]
    out = b"GGUF" + struct.pack("<IQQ", 3, len(w), len(items))
    for key, kind, value in items:
        out += gguf_string(key)
        if isinstance(kind, tuple):
            out += struct.pack("<IIQ", ARRAY, kind[1], len(value)) + b"".join(gguf_value(kind[1], v) for v in value)
        else:
            out += struct.pack("<I", kind) + gguf_value(kind, value)
    data = b""
    for name, p in w.items():
        x = p.detach().numpy()
        raw, kind = (x.astype("<f4").tobytes(), TYPE_F32) if x.ndim == 1 else (quantize_q8_0(x), TYPE_Q8_0)
        out += gguf_string(name) + struct.pack("<I", x.ndim) + struct.pack("<{}Q".format(x.ndim), *reversed(x.shape))
        out += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % ALIGNMENT)
    out += bytes(-len(out) % ALIGNMENT)
    with open(path, "wb") as f:
        f.write(out + data)
    print(path, len(out) + len(data), "bytes", flush=True)


def read_gguf(path):
    """Metadata dict and tensors as float32 torch tensors, dequantised; reads what write_gguf writes."""
    raw = open(path, "rb").read()
    at = 0

    def take(fmt):
        nonlocal at
        v = struct.unpack_from(fmt, raw, at)
        at += struct.calcsize(fmt)
        return v if len(v) > 1 else v[0]

    def string():
        nonlocal at
        n = take("<Q")
        at += n
        return raw[at - n:at].decode()

    def value(kind):
        if kind == ARRAY:
            element, n = take("<IQ")
            return [value(element) for _ in range(n)]
        return string() if kind == STRING else take({U32: "<I", I32: "<i", F32: "<f", BOOL: "<B"}[kind])

    if raw[:4] != b"GGUF":
        raise ValueError(path + ": not a GGUF file")
    at = 4
    _, n_tensors, n_items = take("<IQQ")
    meta = {}
    for _ in range(n_items):
        key = string()
        meta[key] = value(take("<I"))
    infos = []
    for _ in range(n_tensors):
        name = string()
        n_dims = take("<I")
        dims = [take("<Q") for _ in range(n_dims)]
        infos.append((name, dims, *take("<IQ")))
    base = at + -at % ALIGNMENT
    tensors = {}
    for name, dims, kind, offset in infos:
        n = math.prod(dims)
        if kind == TYPE_F32:
            x = np.frombuffer(raw, "<f4", n, base + offset).copy()
        else:
            blocks = np.frombuffer(raw, np.uint8, n // 32 * 34, base + offset).reshape(-1, 34)
            d = blocks[:, :2].copy().view("<f2").astype(np.float32)
            x = blocks[:, 2:].copy().view(np.int8).astype(np.float32) * d
        tensors[name] = torch.from_numpy(x.reshape(dims[::-1]))
    return meta, tensors


def load(path):
    meta, w = read_gguf(path)
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    return Tokenizer(meta["tokenizer.ggml.tokens"], merges), w


def check(path):
    """Prints greedy answers of the written file."""
    tok, w = load(path)
    for prompt in PROMPTS:
        ids, margin = generate(w, tok, prompt, 160)
        print("{}\n=> {}\n   (smallest margin {:.3f})\n".format(prompt, tok.decode(ids), margin))
    print("sums right (plain, chat):", sums_accuracy(w, tok))


def write_expected(path, output):
    """Prompts with their token ids and up to 24 greedy tokens, fewer where the model ends its answer.

    Only prompts where every step is decided by more than 0.1: a kernel that rounds activations to 8 bits still agrees.
    """
    tok, w = load(path)
    cases = []
    for prompts, n_wanted in ((LONG_PROMPTS, 4), (SHORT_PROMPTS, 2)):
        kept = 0
        for prompt in prompts:
            ids, margin = generate(w, tok, prompt, 24)
            print("{:8.3f} {:3} {!r} -> {!r}".format(margin, len(ids), prompt, tok.decode(ids)))
            if margin > 0.1 and kept < n_wanted and (len(ids) == 24) == (prompts is LONG_PROMPTS):
                kept += 1
                cases.append({"prompt": prompt, "tokens": tok.encode(prompt), "greedy": ids, "text": tok.decode(ids),
                              "min_margin": round(margin, 3)})
    with open(output, "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join("  " + json.dumps(c) for c in cases) + "\n]\n")


LONG_PROMPTS = [
    "Building a website can be done in 10 simple steps:",
    "How to plant a garden in 10 simple steps:\nStep 1:",
    "Question: Count to 12.\nAnswer:",
    "Once upon a time there was a fox named Lily. Lily lived in a warm valley. One day, Lily",
    "Once upon a time there was a fox named Lily.",
    "Once upon a time, there was a little bear named Tom. One night, Tom could not sleep.",
    "There once was a small owl called Nora. Nora had no friends and often felt alone.",
    "Max was a rabbit. One day, Max lost his red ball.",
    "Making a sandwich can be done in 10 simple steps:",
]
SHORT_PROMPTS = [
    "Question: What is the capital of France?\nAnswer:",
    "I believe the meaning of life is",
    "Q: What colour is the sky?\nA:",
    "Question: What is 7 + 5?\nAnswer:",
]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", help="documents of make_demo_text.py")
    p.add_argument("--minutes", type=float, default=36, help="train this long")
    p.add_argument("--steps", type=int, default=0, help="train this many steps instead (repeatable)")
    p.add_argument("--lr-muon", type=float, default=0.02)
    p.add_argument("--lr-adam", type=float, default=0.004)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    p.add_argument("--checkpoints", help="existing directory for checkpoint.gguf; also prints samples on the way")
    p.add_argument("--check", metavar="GGUF")
    p.add_argument("--expected", metavar="GGUF")
    p.add_argument("-o", "--output", default="models/demo.gguf")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # the backward of softmax is several times slower on denormals
    if args.check:
        check(args.check)
    elif args.expected:
        write_expected(args.expected, args.output)
    else:
        train(args)


if __name__ == "__main__":
    main()
