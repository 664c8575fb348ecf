"""A stand-in for the model hub: a server on this machine, files laid out as there.

`facebook/opt-125m` as it is on the hub (no tokenizer.json, no safetensors; 50,265
words in the vocabulary, 50,272 rows), at a small width; a CLIP in open_clip's format,
with its own configuration; a SigLIP, whose tower is one of timm's; and a CLIP whose
tower has no grid of tokens. A subprocess finds them through HF_ENDPOINT.
"""

import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import open_clip
import torch
from safetensors.torch import save as safetensors_bytes
from transformers import OPTConfig, OPTForCausalLM

COMMIT = "27dcfa74d334bc871f3234de431e71c6eeba5dd6"
OPT, CLIP = "facebook/opt-125m", "timm/vit_large_patch14_clip_224.openai"
SIGLIP, NO_GRID = "timm/ViT-B-16-SigLIP", "timm/crossvit"
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 28,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 14,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 64,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


def byte_letters():
    """The 256 letters that GPT-2's tokenizer writes bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def vocabulary(n_words=50_265):
    """vocab.json and merges.txt of OPT's size: bytes, then pairs of bytes."""
    letters = byte_letters()
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    merges = [(one, other) for one in letters for other in letters]
    merges = merges[: n_words - len(words)]
    words += [one + other for one, other in merges]
    assert len(words) == len(set(words)) == n_words
    vocab = json.dumps({word: number for number, word in enumerate(words)})
    lines = "".join(f"{one} {other}\n" for one, other in merges)
    return vocab.encode(), ("#version: 0.2\n" + lines).encode()


def opt_files():
    """The repository facebook/opt-125m, but for its width and depth."""
    config = {
        "_name_or_path": "opt-125m",
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 32,
        "hidden_size": 16,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 50_272,
        "word_embed_proj_dim": 16,
    }
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig.from_dict(config))
    # The hub's file was written by the model without its head: no "model." in names.
    weights = {
        name.removeprefix("model."): tensor.half()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    file = io.BytesIO()
    torch.save(weights, file)

    def token(content):
        settings = {"lstrip": False, "normalized": True, "rstrip": False}
        return {
            "__type": "AddedToken",
            "content": content,
            "single_word": False,
            **settings,
        }

    tokenizer = {
        "errors": "replace",
        "unk_token": token("</s>"),
        "bos_token": token("</s>"),
        "eos_token": token("</s>"),
        "pad_token": token("<pad>"),
        "add_prefix_space": False,
        "add_bos_token": True,
        "special_tokens_map_file": None,
        "name_or_path": "patrickvonplaten/opt-30b",
        "tokenizer_class": "GPT2Tokenizer",
    }
    special = {name: token("</s>") for name in ("bos_token", "eos_token", "unk_token")}
    special["pad_token"] = token("<pad>")
    vocab, merges = vocabulary()
    generation = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2}
    generation |= {"pad_token_id": 1}
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps(generation).encode(),
        "merges.txt": merges,
        "pytorch_model.bin": file.getvalue(),
        "special_tokens_map.json": json.dumps(special).encode(),
        "tokenizer_config.json": json.dumps(tokenizer).encode(),
        "vocab.json": vocab,
    }


def clip_files():
    torch.manual_seed(1)
    clip = open_clip.CLIP(**CLIP_CONFIG["model_cfg"])
    return {
        "open_clip_config.json": json.dumps(CLIP_CONFIG).encode(),
        "open_clip_model.safetensors": safetensors_bytes(clip.state_dict()),
    }


def siglip_files():
    """The repository timm/ViT-B-16-SigLIP, but for its sizes and its tokenizer."""
    vision = {"image_size": 160, "timm_model_name": "test_vit3"}
    vision |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    text = {**CLIP_CONFIG["model_cfg"]["text_cfg"], "context_length": 64}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text |= {"norm_kwargs": {"eps": 1e-6}}
    model = {"embed_dim": 96, "init_logit_bias": -10, "custom_text": True}
    model |= {"vision_cfg": vision, "text_cfg": text}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    half["resize_mode"] = "squash"
    torch.manual_seed(2)
    clip = open_clip.model.CustomTextCLIP(
        **{name: part for name, part in model.items() if name != "custom_text"}
    )
    config = {"model_cfg": model, "preprocess_cfg": half}
    return {
        "open_clip_config.json": json.dumps(config).encode(),
        "open_clip_model.safetensors": safetensors_bytes(clip.state_dict()),
    }


def no_grid_files():
    """A CLIP whose tower has two lists of tokens, of patches of two sizes."""
    vision = {"image_size": 240, "timm_model_name": "crossvit_tiny_240"}
    vision |= {"timm_pool": "", "timm_proj": "linear"}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision}}
    return {
        "open_clip_config.json": json.dumps(config).encode(),
        "open_clip_model.safetensors": b"weights that nobody should ask for",
    }


class Handler(BaseHTTPRequestHandler):
    """What the hub's client asks for: a file's head, the file, a listing."""

    protocol_version = "HTTP/1.1"

    def answer(self, with_body):
        path = unquote(urlparse(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/"):
            return self.listing(path.removeprefix("/api/models/"))
        repository, resolve, file = path.strip("/").partition("/resolve/")
        file = file.partition("/")[2]
        files = self.server.repositories.get(repository)
        if files is None or not resolve:
            return self.refuse("RepoNotFound")
        if file not in files:
            return self.refuse("EntryNotFound")
        data, start = files[file], 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send_header("Content-Range", span)
        self.end_headers()
        if with_body:
            end = len(data)
            if file == self.server.cut_file:
                end = min(end, start + self.server.cut)
                self.close_connection = True
            self.wfile.write(data[start:end])

    def listing(self, path):
        repository, _, rest = path.partition("/revision/")
        repository, tree, place = repository.partition("/tree/")
        files = self.server.repositories.get(repository)
        if files is None:
            return self.refuse("RepoNotFound")
        if tree:
            folder = "/".join(place.split("/")[1:])  # behind the branch's name
            here = {f: d for f, d in files.items() if f.startswith(folder)}
            if not here:
                return self.refuse("EntryNotFound")
            body = [
                {"type": "file", "path": f, "size": len(d), "oid": COMMIT}
                for f, d in here.items()
            ]
        else:
            siblings = [{"rfilename": file} for file in files]
            body = {"id": repository, "modelId": repository, "sha": COMMIT}
            body |= {"siblings": siblings, "private": False, "tags": [], "downloads": 0}
        self.send_json(body)

    def send_json(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def do_POST(self):
        self.server.asked.append(("POST", self.path, None))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.refuse("EntryNotFound")

    def log_message(self, *args):
        pass


class Hub(ThreadingHTTPServer):
    """Start with `with Hub() as hub`; `hub.address` is for HF_ENDPOINT.

    `cut_file` and `cut`: of that file only so many bytes are sent, then silence.
    """

    daemon_threads = True

    def __init__(self, repositories=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories or {
            OPT: opt_files(),
            CLIP: clip_files(),
            SIGLIP: siglip_files(),
            NO_GRID: no_grid_files(),
        }
        self.asked, self.cut_file, self.cut = [], None, 0
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)
