"""Reads a Hugging Face model block by block from its safetensors shards; the whole model is never in memory."""

from __future__ import annotations

import copy
import shutil
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from calibrate.blocks import FAMILIES, BlockLayout, CalibrationBlock, rotate_block
from calibrate.errors import UserError, first_line
from calibrate.recipe import Recipe
from calibrate.transforms import Rotation, fold_norm
from sliderquant_vllm.format import FUSED_MODULES, LinearScheme, QuantizationConfig, matches
from sliderquant_vllm.shards import Reader

SHORT_NAMES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
}
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WEIGHT_SUFFIXES = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"),
    *(".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
)


def resolve_model(name: str) -> Path:
    """The directory of a model named by a directory, a short name or a hub id. Raises UserError if there is none."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"--model {name}: a directory without config.json; name a Hugging Face model directory")
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                SHORT_NAMES.get(name.lower(), name),
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"],
                ignore_patterns=["consolidated*", "original/*"],  # a second copy of the weights
            )
        )
    except Exception as error:
        raise UserError(
            f"--model {name}: no such directory, and the hub did not give it ({first_line(error)}); name a model "
            f"directory, a hub id, or one of {', '.join(SHORT_NAMES)}"
        ) from None


class Model:
    """A model directory seen as embedding, decoder blocks and head, rotated if the recipe says so.

    Raises:
        UserError: an unsupported family, an already quantized model, a missing, unreadable or misshapen tensor.
    """

    def __init__(self, directory: Path, recipe: Recipe, device: torch.device):
        self.directory, self.recipe, self.device = Path(directory), recipe, device
        try:
            self.config = AutoConfig.from_pretrained(self.directory)
        except Exception as error:  # whatever a damaged config makes transformers raise
            raise UserError(f"--model {directory}: config.json cannot be read ({error}); download it again") from None
        if getattr(self.config, "quantization_config", None) is not None:
            raise UserError(f"--model {directory}: already quantized; name the 16-bit model it was made from")
        if self.config.model_type not in FAMILIES:
            raise UserError(
                f"--model {directory}: model_type {self.config.model_type!r} is not supported; "
                f"expected one of {', '.join(FAMILIES)}"
            )
        window = getattr(self.config, "sliding_window", None)
        if getattr(self.config, "use_sliding_window", True) and window is not None and recipe.seqlen > window:
            raise UserError(f"--seqlen {recipe.seqlen}: beyond the model's sliding window of {window}; lower it")
        if recipe.seqlen > self.config.max_position_embeddings:
            longest = self.config.max_position_embeddings
            raise UserError(f"--seqlen {recipe.seqlen}: beyond the {longest} positions of the model; lower it")
        self.layout: BlockLayout = FAMILIES[self.config.model_type]
        self.config._attn_implementation = "sdpa"
        try:
            with torch.device("meta"):
                self.skeleton = AutoModelForCausalLM.from_config(self.config)
            head_dim = self.skeleton.model.layers[0].self_attn.head_dim
        except Exception as error:  # likewise
            raise UserError(f"--model {directory}: no model can be made from config.json ({error!r})") from None
        self.reader = Reader(self.directory)
        self._check_tensors()
        self.stream = Rotation.random(self.config.hidden_size, recipe.seed)
        self.head = Rotation.random(head_dim, recipe.seed + 1)

    @property
    def blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit dtype in which norms, embedding and head are served."""
        return torch.float16 if self.config.dtype == torch.float16 else torch.bfloat16

    @property
    def tied(self) -> bool:
        return "lm_head.weight" not in self.reader.headers

    @cached_property
    def tokenizer(self):
        try:
            return AutoTokenizer.from_pretrained(self.directory)
        except Exception as error:  # likewise
            raise UserError(f"--model {self.directory}: its tokenizer cannot be loaded ({error})") from None

    def _check_tensors(self) -> None:
        """Compare names, shapes and dtypes with what the config promises, from the headers alone."""
        expected = {name: tuple(value.shape) for name, value in self.skeleton.state_dict().items()}
        if self.tied:
            if not self.config.tie_word_embeddings:
                raise UserError(f"{self.directory}: lm_head.weight is missing and the config does not tie it")
            expected.pop("lm_head.weight", None)
        for name, shape in expected.items():
            header = self.reader.headers.get(name)
            if header is None:
                raise UserError(f"{self.directory}: tensor {name} is missing; download the model again")
            if header.shape != shape:
                raise UserError(
                    f"{header.file}: {name}: expected shape {list(shape)} from config.json, found "
                    f"{list(header.shape)}; config and weights are of different models"
                )
            if header.dtype not in WEIGHT_DTYPES:
                raise UserError(
                    f"{header.file}: {name}: expected bf16, fp16 or fp32, found {header.dtype}; "
                    "name the unquantized model"
                )

    def read(self, name: str) -> Tensor:
        """A tensor as fp32 on the device. Raises UserError where it is not finite."""
        tensor = self.reader.tensor(name).to(self.device, torch.float32)
        if not torch.isfinite(tensor).all():
            file = self.reader.headers[name].file
            raise UserError(f"{file}: {name}: found NaN or infinite weights; download the model again")
        return tensor

    def quantization_config(self, calibration: dict | None = None) -> QuantizationConfig:
        recipe = self.recipe
        return QuantizationConfig(
            weights=recipe.weights,
            activations=recipe.activations,
            ignore=recipe.ignore,
            calibration=calibration or {},
        )

    def schemes(self, index: int) -> dict[str, LinearScheme | None]:
        """Linear -> scheme of one block. Raises FormatError where parts of a fused module disagree."""
        config = self.quantization_config()
        prefix = f"model.layers.{index}"
        for stem in sorted({path.rpartition(".")[0] for path in self.layout.linears}):
            for fused in FUSED_MODULES:
                config.scheme_for_fused(f"{prefix}.{stem}.{fused}")
        return {path: config.scheme_for(f"{prefix}.{path}") for path in self.layout.linears}

    def check_schemes(self) -> None:
        """Refuse, before any work, a scheme that some layer's shape cannot have, and patterns that match nothing."""
        names = [f"model.layers.{index}.{path}" for index in range(self.blocks) for path in self.layout.linears]
        for pattern in self.recipe.ignore:
            if pattern != "lm_head" and not any(matches(pattern, name) for name in names):
                raise UserError(f"--ignore {pattern}: matches no linear; they are named like {names[0]}")
        if not any(scheme for index in range(self.blocks) for scheme in self.schemes(index).values()):
            raise UserError("--ignore: leaves no linear to quantize; name fewer")
        problems: dict[str, list[str]] = {}
        for index in range(self.blocks):
            for path, scheme in self.schemes(index).items():
                out_features, in_features = self.skeleton.model.layers[index].get_submodule(path).weight.shape
                if scheme and (problem := scheme.shape_problem(out_features, in_features)):
                    problems.setdefault(f"{path} ({problem})", []).append(str(index))
        if problems:
            found = "; ".join(f"{what} in blocks {', '.join(where)}" for what, where in problems.items())
            raise UserError(
                f"--group_size {self.recipe.weights.group_size}: {found}; choose another group size, or keep these "
                "layers in 16 bits with --ignore 're:.*NAME'"
            )

    def block(self, index: int) -> CalibrationBlock:
        """Decoder block ``index`` with fp32 weights on the device."""
        prefix = f"model.layers.{index}."
        layer = self.skeleton.model.layers[index]
        tensors = {name: self.read(prefix + name) for name in layer.state_dict()}
        if self.recipe.rotate:
            rotate_block(tensors, self.layout, self.stream, self.head)
        layer = _materialise(layer, tensors)
        seed = self.recipe.seed * 100_003 + index
        return CalibrationBlock(layer, self.layout, prefix[:-1], self.schemes(index), self.recipe, seed)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before the first block: [..., seqlen] int64 -> fp32 [..., seqlen, hidden]."""
        if (highest := int(tokens.max())) >= len(self.embedding):
            raise UserError(
                f"--model {self.directory}: its tokenizer gives token {highest}, its embedding has "
                f"{len(self.embedding)}; tokenizer and weights are of different models"
            )
        return self.embedding[tokens.cpu()].to(self.device)

    @cached_property
    def embedding(self) -> Tensor:
        """fp32 [vocabulary, hidden] on the CPU, rotated."""
        weight = self.read("model.embed_tokens.weight")
        return (self.stream.apply(weight) if self.recipe.rotate else weight).cpu()

    @cached_property
    def head_tensors(self) -> dict[str, Tensor]:
        """Final norm and lm_head, fp32 on the CPU. A tied head is untied where rotation makes it differ."""
        norm = self.read("model.norm.weight")
        weight = self.read("model.embed_tokens.weight" if self.tied else "lm_head.weight")
        if self.recipe.rotate:
            norm, weight = torch.ones_like(norm), self.stream.apply(fold_norm(norm, weight))
        return {"model.norm.weight": norm.cpu(), "lm_head.weight": weight.cpu()}

    def head_module(self) -> nn.Module:
        """Final norm and lm_head on the device: hidden states behind the last block -> fp32 [..., vocabulary]."""
        tensors = {name: tensor.to(self.device) for name, tensor in self.head_tensors.items()}
        norm = _materialise(self.skeleton.model.norm, {"weight": tensors["model.norm.weight"]})
        head = _materialise(self.skeleton.lm_head, {"weight": tensors["lm_head.weight"]})
        return nn.Sequential(norm, head)

    def position_embeddings(self, seqlen: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary embedding, as the decoder layers take them."""
        rotary = type(self.skeleton.model.rotary_emb)(config=self.config).to(self.device)
        positions = torch.arange(seqlen, device=self.device).unsqueeze(0)
        return rotary(torch.zeros(1, device=self.device), positions)

    def copy_other_files(self, directory: Path) -> None:
        """Copy everything but weights: tokenizer, generation config, licence."""
        for file in sorted(self.directory.iterdir()):
            if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, directory / file.name)


def _materialise(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of a module that lives on the meta device, with these tensors as its weights."""

    module = copy.deepcopy(module)
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()
