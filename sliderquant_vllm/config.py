"""The vLLM quantization config ``sliderquant``: which layer is quantized and how."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from sliderquant_vllm import format
from sliderquant_vllm.checkpoint import CONFIG_FILE, NOT_QUANTIZED, Linear, validate_checkpoint
from sliderquant_vllm.shards import is_complete


def basis_changes(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a calibration did that gave linears other channels than the parent's -> the flag that leaves it out."""
    learns = recipe.get("learn_scale") and (recipe.get("epochs") or recipe.get("end_to_end_epochs"))
    changes = {
        "rotate": (recipe.get("rotate"), "--no-rotate"),
        "equalize": (recipe.get("equalize", "off") != "off", "--equalize off"),
        "scale_start": (recipe.get("scale_start", "ones") != "ones", "--scale-start ones"),
        "learn_scale": (learns, "--no-learn-scale"),
        "dual_scale": (recipe.get("dual_scale"), "--no-dual-scale"),
    }
    return {name: flag for name, (happened, flag) in changes.items() if happened}


def _cached(hub_id: str, revision: str | None) -> Path | None:
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # it is not in the cache, or no hub id
        return None


@register_quantization_config(format.QUANT_METHOD)
class SliderQuantConfig(QuantizationConfig):
    """The ``quantization_config`` of a checkpoint, asked by vLLM for a method layer by layer.

    Args:
        checkpoint: missing where vLLM is told to serve a model that has none.
    """

    def __init__(self, checkpoint: format.QuantizationConfig | None = None):
        super().__init__()
        if checkpoint is None:
            raise format.FormatError(f"{CONFIG_FILE}: {NOT_QUANTIZED}")
        self.checkpoint = checkpoint
        self.linears: dict[str, Linear] = {}

    def __repr__(self) -> str:
        return f"SliderQuantConfig({self.checkpoint!r})"

    def get_name(self) -> str:
        return format.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SliderQuantConfig:
        return cls(format.QuantizationConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, *args: Any, revision: str | None = None, **kwargs: Any) -> None:
        """Check the headers of a checkpoint before anything is loaded. Raises FormatError.

        A directory without weights is left to the loader, since some load formats need none, and so is a hub id until
        its files are in the cache.
        """
        directory = Path(model_name)
        if directory.is_dir():
            is_there = any(directory.glob("*.safetensors*"))
        else:
            directory = _cached(model_name, revision)
            is_there = directory is not None and is_complete(directory)
        if is_there:
            self.linears = dict(validate_checkpoint(directory).linears)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Give exact names the form of the served model; ``re:`` patterns are left as they are."""

        def mapped(pattern: str) -> list[str]:
            return [pattern] if pattern.startswith("re:") else hf_to_vllm_mapper.apply_list([pattern])

        def names(patterns: Iterable[str]) -> tuple[str, ...]:
            return tuple(name for pattern in patterns for name in mapped(pattern))

        def entries(fields: Iterable) -> tuple:
            return tuple(replace(entry, match=name) for entry in fields for name in mapped(entry.match))

        self.checkpoint = replace(
            self.checkpoint,
            online_hadamard=entries(self.checkpoint.online_hadamard),
            added_bias=names(self.checkpoint.added_bias),
            ignore=names(self.checkpoint.ignore),
            overrides=entries(self.checkpoint.overrides),
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; None where vLLM's own 16-bit one serves (embeddings, attention).

        Raises:
            FormatError: the parts of a fused module disagree, the checkpoint is of a model of other sizes, or the
                layer cannot be served quantized.
            ValueError: the server is asked for something that the checkpoint does not allow.
        """
        # Here, because importing the layers is slow and register() runs in every process.
        from sliderquant_vllm import compat, fusion, linear, moe

        options = compat.OPTIONS
        if not prefix.startswith(compat.DRAFT_PREFIX):  # what is asked of a server is not asked of its draft model
            options = compat.serving_options()
            if not options["made_for_this_checkpoint"]:
                self._check_companions(compat.companions())
        prefix = prefix.removeprefix(compat.DRAFT_PREFIX)
        if isinstance(layer, compat.LinearBase):
            scheme = self.checkpoint.scheme_for_fused(prefix, self._fused())
            if scheme is None:
                return compat.UnquantizedLinearMethod()
            self._check_sizes(prefix, layer.output_size, layer.input_size)
            if options["int8_activations"]:
                scheme = self._with_int8_activations(prefix, scheme)
            if scheme.activations is None:
                compat.warn_of_batches()
            else:
                compat.add_graph_pass(fusion.QuantizerFusion())
            return linear.SliderQuantLinearMethod(scheme, prefix, self._biases(prefix))
        if isinstance(layer, compat.ParallelLMHead) and self.checkpoint.scheme_for(prefix) is not None:
            raise format.FormatError(
                f"{prefix}: expected a 16-bit output layer, found {self.checkpoint.scheme_for(prefix)}; "
                f"add {prefix!r} to 'ignore' and quantize the model again"
            )
        if isinstance(layer, compat.RoutedExperts):
            schemes = self._expert_schemes(layer, prefix)
            if schemes is not None and options["int8_activations"]:
                schemes = {part: self._with_int8_activations(prefix, scheme) for part, scheme in schemes.items()}
            if schemes is None:
                return None
            if any(scheme.activations is None for scheme in schemes.values()):
                compat.warn_of_batches()
            return moe.SliderQuantMoEMethod(layer.moe_config, schemes, prefix)
        return None

    def _check_companions(self, companions: Iterable[tuple[str, bool]]) -> None:
        """Adapters and the like were made for the parent, and would be wrong without a word in other channels."""
        recipe = self.checkpoint.calibration.get("recipe")
        changes = basis_changes(recipe) if isinstance(recipe, Mapping) else {}
        for flag, between_blocks in companions:
            # Only a rotation reaches the hidden states between blocks.
            found = {name: off for name, off in changes.items() if name == "rotate" or not between_blocks}
            if found:
                raise ValueError(
                    f"{flag}: what was made for the parent model would be wrong here: calibration gave this checkpoint "
                    f"other channels ({', '.join(found)}); serve without it, quantize with {' '.join(found.values())}, "
                    "or, where it was made for this very checkpoint, serve with --additional-config "
                    """'{"sliderquant": {"made_for_this_checkpoint": true}}'"""
                )

    def _expert_schemes(self, layer: torch.nn.Module, prefix: str) -> dict[str, format.LinearScheme] | None:
        """The schemes of all gates and ups ("w13") and of all downs ("w2"); None where they stay in 16 bits."""
        from sliderquant_vllm import compat

        if not compat.SERVES_EXPERTS:
            matrices = itertools.chain.from_iterable(format.EXPERT_MATRICES)
            if all(self.checkpoint.scheme_for(f"{prefix}.0.{matrix}") is None for matrix in matrices):
                return None
            raise format.FormatError(
                f"{prefix}: quantized experts need vLLM 0.32 or later; update it, or add 're:.*\\.experts\\..*' to "
                "'ignore' and quantize the model again"
            )
        count = layer.moe_config.num_logical_experts
        fused = {
            "w13": (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name),
            "w2": (layer.ckpt_down_proj_name,),
        }
        linears = {
            part: [f"{prefix}.{expert}.{matrix}" for expert in range(count) for matrix in matrices]
            for part, matrices in fused.items()
        }
        schemes = {part: self.checkpoint.common_scheme(prefix, names) for part, names in linears.items()}
        known = {name for names in linears.values() for name in names}
        for name in self.linears:
            if name.startswith(f"{prefix}.") and name not in known:
                raise format.FormatError(
                    f"{prefix}: config.json describes {count} experts, the checkpoint holds {name}; put the "
                    "config.json beside it that it came with"
                )
        if None in schemes.values() and len(set(schemes.values())) > 1:
            described = ", ".join(
                f"{' and '.join(fused[part])}: {scheme or '16-bit'}" for part, scheme in schemes.items()
            )
            raise format.FormatError(
                f"{prefix}: expected all matrices of the experts quantized or none, found {described}; make 'ignore' "
                "treat them alike and quantize the model again"
            )
        return None if None in schemes.values() else schemes

    def _with_int8_activations(self, prefix: str, scheme: format.LinearScheme) -> format.LinearScheme:
        """The scheme of a weight-only linear with activations in 8 bits per token, where its scales allow it."""
        if scheme.activations is not None:
            return scheme
        try:
            return replace(scheme, activations=format.ActivationScheme(8))
        except format.FormatError as error:
            raise ValueError(
                f"--additional-config sliderquant.int8_activations: {prefix}: {error}; serve without it, or quantize "
                "with --group-size -1"
            ) from None

    def _fused(self) -> dict[str, Iterable[str]]:
        return {**format.FUSED_MODULES, **self.packed_modules_mapping}

    def _check_sizes(self, prefix: str, output_size: int, input_size: int) -> None:
        from sliderquant_vllm.linear import check_sizes

        parts = format.parts_of(prefix, self._fused())
        held = [self.linears[part] for part in parts if part in self.linears]
        rows = sum(linear.out_features for linear in held)
        if len(parts) > 1:
            rows = max(rows, output_size)  # a fused module is wider than its parts where heads are repeated
        for linear in held:
            check_sizes(prefix, (output_size, input_size), (rows, linear.in_features))

    def _biases(self, prefix: str) -> dict[str, bool]:
        """Part -> whether the checkpoint holds a bias for it; empty where its headers have not been read."""
        parts = format.parts_of(prefix, self._fused())
        return {part: self.linears[part].has_bias for part in parts if part in self.linears}
