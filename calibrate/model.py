"""Reads a Hugging Face model block by block from its safetensors shards; the whole model is never in memory."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from calibrate.activations import Activations, Place
from calibrate.attention import IMPLEMENTATION
from calibrate.blocks import CalibrationBlock
from calibrate.errors import UserError
from calibrate.experts import Part, name_pattern, split_experts
from calibrate.layouts import FAMILIES, BlockLayout
from calibrate.recipe import Recipe
from calibrate.transforms import (
    CHUNK,
    Rotation,
    equalize_pairs,
    fold_norm,
    fold_norms,
    hadamard_block_size,
    rotate_block,
)
from sliderquant_vllm import references
from sliderquant_vllm.format import (
    FUSED_MODULES,
    FormatError,
    LinearScheme,
    OnlineHadamard,
    Override,
    QuantizationConfig,
    matches,
)
from sliderquant_vllm.shards import Reader

OUTER_ROWS = 8192  # of embedding and lm_head that are rotated at a time
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WEIGHT_SUFFIXES = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"),
    *(".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
)


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
        self.config._attn_implementation = IMPLEMENTATION
        try:
            with torch.device("meta"):
                self.skeleton = AutoModelForCausalLM.from_config(self.config)
            family = FAMILIES[self.config.model_type]
            self.layouts: list[BlockLayout] = [family(self.config, index) for index in range(self.blocks)]
            head_dim = self.skeleton.model.layers[0].self_attn.head_dim
        except Exception as error:  # likewise
            raise UserError(f"--model {directory}: no model can be made from config.json ({error!r})") from None
        self.reader = Reader(self.directory)
        self.parts: dict[str, tuple[str, Part]] = {}  # tensors that the directory holds as parts of others
        self._check_tensors(self._expected())
        self.bits: dict[str, int] = {}  # of linears that have their own, by name
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
        return HEAD not in self.reader.headers

    @cached_property
    def tokenizer(self):
        try:
            return AutoTokenizer.from_pretrained(self.directory)
        except Exception as error:  # likewise
            raise UserError(f"--model {self.directory}: its tokenizer cannot be loaded ({error})") from None

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that the config promises, experts fused or not as the directory has them."""
        fused = {name: tuple(value.shape) for name, value in self.skeleton.state_dict().items()}
        parts = {}
        for index, layer in enumerate(self.skeleton.model.layers):
            prefix = f"model.layers.{index}"
            for name, (whole, part) in split_experts(layer, self.layouts[index]).items():
                parts[f"{prefix}.{name}"] = (f"{prefix}.{whole}", part)
        if any(whole in self.reader.headers for whole, _ in parts.values()):
            self.parts = parts
            return fused
        return {name: tuple(value.shape) for name, value in self.skeleton.state_dict().items()}

    def _check_tensors(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare names, shapes and dtypes with what the config promises, from the headers alone."""
        if self.tied:
            if not self.config.tie_word_embeddings:
                raise UserError(f"{self.directory}: lm_head.weight is missing and the config does not tie it")
            expected.pop(HEAD, None)
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

    def read(self, name: str, rows: Tensor | slice | None = None) -> Tensor:
        """A tensor, or rows of it, as fp32 on the device. Raises UserError where it is not finite."""
        stored, part = self.parts.get(name, (name, ()))
        tensor = self.reader.tensor(stored)[part]
        tensor = (tensor if rows is None else tensor[rows]).to(self.device, torch.float32, copy=True)
        if not torch.isfinite(tensor).all():
            file = self.reader.headers[stored].file
            raise UserError(f"{file}: {name}: found NaN or infinite weights; download the model again")
        return tensor

    def quantization_config(self, calibration: dict | None = None) -> QuantizationConfig:
        recipe = self.recipe
        return QuantizationConfig(
            weights=recipe.weights,
            activations=recipe.activations,
            ignore=(*recipe.ignore, *dict.fromkeys(_in_any_block(path) for path in self._routers())),
            overrides=self._overrides(),
            online_hadamard=tuple(
                OnlineHadamard(match, size)
                for match, size in {_in_any_block(path): size for path, size in self.online_hadamard.items()}.items()
                if any(matches(match, name) for name in self.quantized)
            ),
            added_bias=tuple(dict.fromkeys(self._added_bias())) if recipe.correction else (),
            calibration=calibration or {},
        )

    @cached_property
    def quantized(self) -> set[str]:
        """Names of all linears of blocks but those that ``ignore`` keeps in 16 bits."""
        names = (f"model.layers.{index}.{path}" for index in range(self.blocks) for path in self.layouts[index].linears)
        return {name for name in names if not any(matches(pattern, name) for pattern in self.recipe.ignore)}

    def _overrides(self) -> tuple[Override, ...]:
        """One entry per linear whose bits are not the recipe's, experts of a block together."""
        weights, activations = self.recipe.weights, self.recipe.activations
        chosen = {f"re:{name_pattern(name)}" if ".experts." in name else name: bits for name, bits in self.bits.items()}
        return tuple(
            Override(match, replace(weights, bits=bits), activations)
            for match, bits in chosen.items()
            if bits != weights.bits
        )

    def _routers(self) -> Iterator[str]:
        for layout in self.layouts:
            yield from layout.routers

    def _added_bias(self) -> Iterator[str]:
        """Patterns of the linears that have a bias only because of the correction."""
        for index, layout in enumerate(self.layouts):
            for path in () if layout.routers else layout.readers[layout.mlp_norm]:
                name = f"model.layers.{index}.{path}"
                if name in self.quantized and f"{name}.bias" not in self.reader.headers:
                    yield _in_any_block(path)

    def schemes(self, index: int) -> dict[str, LinearScheme | None]:
        """Linear -> scheme of one block. Raises FormatError where parts of a fused module disagree."""
        config, layout = self.quantization_config(), self.layouts[index]
        for disagreement in self._disagreements(index, config):
            raise disagreement
        return {path: config.scheme_for(f"model.layers.{index}.{path}") for path in layout.linears}

    def _disagreements(self, index: int, config: QuantizationConfig) -> Iterator[FormatError]:
        """Of the parts of fused modules of one block."""
        prefix, layout = f"model.layers.{index}", self.layouts[index]
        for stem in sorted({path.rpartition(".")[0] for path in layout.linears}):
            for fused, parts in FUSED_MODULES.items():
                if f"{stem}.{parts[0]}" not in layout.linears:
                    continue
                try:
                    config.scheme_for_fused(f"{prefix}.{stem}.{fused}")
                except FormatError as error:
                    yield error
        for paths in layout.fused_experts:
            if len(found := {config.scheme_for(f"{prefix}.{path}"): path for path in paths}) > 1:
                examples = ", ".join(f"{path}: {scheme or '16-bit'}" for scheme, path in found.items())
                yield FormatError(
                    f"{prefix}.{layout.experts}: all experts run as one matrix product and need one scheme, found "
                    f"{examples}; make the patterns of --ignore treat them alike"
                )

    def check_schemes(self) -> None:
        """Refuse, before any work, the first of the ``scheme_problems``."""
        for problem in self.scheme_problems():
            raise problem

    def scheme_problems(self) -> Iterator[UserError | FormatError]:
        """Patterns that match nothing, neighbours that need one scheme and have two, schemes that no shape can have.

        What several blocks have in common comes once.
        """
        blocks, config = range(self.blocks), self.quantization_config()
        names = [f"model.layers.{index}.{path}" for index in blocks for path in self.layouts[index].linears]
        for pattern in self.recipe.ignore:
            if pattern != "lm_head" and not any(matches(pattern, name) for name in names):
                yield UserError(f"--ignore {pattern}: matches no linear; they are named like {names[0]}")
        if not self.quantized:
            yield UserError("--ignore: leaves no linear to quantize; name fewer")
        disagreements: dict[str, FormatError] = {}
        misshapen: dict[str, dict[str, None]] = {}
        for index in blocks:
            for error in self._disagreements(index, config):
                disagreements.setdefault(re.sub(r"(?<=layers\.|xperts\.)\d+", "*", str(error)), error)
            for path in self.layouts[index].linears:
                scheme = config.scheme_for(f"model.layers.{index}.{path}")
                shape = self.skeleton.model.layers[index].get_submodule(path).weight.shape
                if scheme and (problem := scheme.shape_problem(*shape)):
                    what = re.sub(r"(?<=\.experts\.)\d+", "*", path)
                    misshapen.setdefault(f"{what} ({problem})", {})[str(index)] = None
        yield from disagreements.values()
        if misshapen:
            found = "; ".join(f"{what} in blocks {', '.join(where)}" for what, where in misshapen.items())
            yield UserError(
                f"--group-size {self.recipe.weights.group_size}: {found}; choose another group size, or keep these "
                "layers in 16 bits with --ignore 're:.*NAME'"
            )

    def block(self, index: int) -> CalibrationBlock:
        """Decoder block ``index`` with fp32 weights on the device."""
        prefix = f"model.layers.{index}."
        layer, layout = self.skeleton.model.layers[index], self.layouts[index]
        tensors = {name: self.read(prefix + name) for name in layer.state_dict()}
        if self.recipe.folds_norms:
            fold_norms(tensors, layout)
        if self.recipe.equalize != "off":
            equalize_pairs(tensors, layout, self.head.signs.numel(), self.recipe.equalize == "all")
        if self.recipe.rotate:
            rotate_block(tensors, layout, self.stream, self.head)
        schemes = self.schemes(index)
        hadamard = {path: size for path, size in self.online_hadamard.items() if schemes.get(path)}
        for path, size in hadamard.items():
            weight = tensors[f"{path}.weight"]
            tensors[f"{path}.weight"] = references.hadamard(weight.double(), size).to(weight.dtype)
        layer = _materialise(layer, tensors)
        seed = self.recipe.seed * 100_003 + index
        return CalibrationBlock(layer, layout, prefix[:-1], schemes, self.recipe, seed, hadamard)

    @cached_property
    def online_hadamard(self) -> dict[str, int]:
        """Linear -> block size of the Hadamard transform of its input while serving."""
        if not self.recipe.online_hadamard:
            return {}
        kinds = dict(zip(self.layouts, self.skeleton.model.layers, strict=True))
        downs = {mlp.down: layer.get_submodule(mlp.down) for layout, layer in kinds.items() for mlp in layout.mlps}
        return {path: hadamard_block_size(down.weight.shape[1]) for path, down in downs.items()}

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before the first block: [..., seqlen] int64 -> fp32 [..., seqlen, hidden]."""
        rows = self.reader.headers[EMBEDDING].shape[0]
        if (highest := int(tokens.max())) >= rows:
            raise UserError(
                f"--model {self.directory}: its tokenizer gives token {highest}, its embedding has {rows}; "
                "tokenizer and weights are of different models"
            )
        found, places = tokens.cpu().unique(return_inverse=True)
        vectors = self.read(EMBEDDING, found)
        return (self.stream.apply(vectors) if self.recipe.rotate else vectors)[places.to(self.device)]

    def activations(self, samples: Tensor, place: Place) -> Activations:
        """Hidden states before the first block, of samples int64 [nsamples, seqlen]."""
        found = Activations((*samples.shape, self.config.hidden_size), place)
        for first in range(0, len(samples), self.recipe.batch_size):
            found.write(first, self.embed(samples[first : first + self.recipe.batch_size]))
        return found

    def embedding_tensors(self) -> dict[str, Tensor]:
        """The embedding by its name, as it is served."""
        return {EMBEDDING: self._outer(EMBEDDING, self.stream.apply if self.recipe.rotate else None)}

    def head_tensors(self) -> dict[str, Tensor]:
        """Final norm and lm_head by their names, as they are served. Rotation unties a tied head, since they differ."""
        norm = self.read(NORM)
        if not self.recipe.rotate:
            head = {} if self.tied else {HEAD: self._outer(HEAD, None)}
            return head | {NORM: norm.to("cpu", self.dtype)}
        rotated = self._outer(self._head_name, lambda rows: self.stream.apply(fold_norm(norm, rows)))
        return {NORM: torch.ones_like(norm).to("cpu", self.dtype), HEAD: rotated}

    @property
    def _head_name(self) -> str:
        return EMBEDDING if self.tied else HEAD

    def _outer(self, name: str, change: Callable[[Tensor], Tensor] | None) -> Tensor:
        """A large tensor in the served dtype on the CPU, read and changed in pieces."""
        shape = self.reader.headers[name].shape
        found = torch.empty(shape, dtype=self.dtype)
        for first in range(0, shape[0], OUTER_ROWS):
            rows = slice(first, first + OUTER_ROWS)
            values = self.read(name, rows)
            found[rows] = (values if change is None else change(values)).to(self.dtype)
        return found

    def head_module(self) -> nn.Module:
        """Final norm and lm_head on the device: hidden states behind the last block -> fp32 [..., vocabulary]."""
        norm, weight = self.read(NORM), self.read(self._head_name)
        if self.recipe.rotate:
            for rows in weight.split(max(CHUNK // weight.shape[1], 1)):  # as many as a rotation takes at a time
                rows.copy_(self.stream.apply(fold_norm(norm, rows)))
            norm = torch.ones_like(norm)
        return nn.Sequential(
            _materialise(self.skeleton.model.norm, {"weight": norm}),
            _materialise(self.skeleton.lm_head, {"weight": weight}),
        )

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


def _in_any_block(path: str) -> str:
    """A pattern for the linears of a name in all blocks, and of all experts if it is that of one."""
    return f"re:model\\.layers\\.\\d+\\.{name_pattern(path)}"


def _materialise(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of a module that lives on the meta device, with these tensors as its weights."""

    module = copy.deepcopy(module)
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()
