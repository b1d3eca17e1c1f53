"""The methods and attributes of transformers' PreTrainedModel that users call: embeddings, sizes, devices, the hub."""

from __future__ import annotations

import functools
import math
import tempfile
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoints.families import ALBERT, FAMILIES, Family
from ..layers.packed import packed_in
from .config import ALBERTConfig
from .encoder_config import EncoderConfig
from .load_arguments import LoadArguments, as_config

# Variance of new rows around the mean of the old ones, as a part of the old rows' covariance; transformers' value.
_NEW_ROWS_VARIANCE = 1e-9


class ModelMethods(nn.Module):
    """Base of `PretrainedMixin`. The encoder is an attribute in a model with a head (`albert`), else the model itself.

    A family's classes set the class variables `family`, `config_class` and `base_model_prefix`.
    """

    config: Any  # of the class config_class
    config_class: ClassVar[type[EncoderConfig]] = ALBERTConfig
    family: ClassVar[Family] = ALBERT
    base_model_prefix: ClassVar[str] = ALBERT.attribute
    main_input_name: ClassVar[str] = "input_ids"
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    framework: ClassVar[str] = "pt"
    _keys_to_ignore_on_save: ClassVar[None] = None
    execution: Any  # see `PretrainedMixin.execution`

    def __init_subclass__(cls, **options: Any) -> None:
        """Name the `forward` that this library's classes share after the class, for Python's messages and for help()."""
        super().__init_subclass__(**options)
        root, forward = __name__.partition(".")[0], cls.forward
        if "forward" in vars(cls) or not all(part.__module__.startswith(f"{root}.") for part in (cls, forward)):
            return
        code = forward.__code__, forward.__globals__, "forward", forward.__defaults__, forward.__closure__
        named: Any = functools.update_wrapper(types.FunctionType(*code), forward)
        named.__qualname__ = f"{cls.__qualname__}.forward"
        named.__kwdefaults__ = forward.__kwdefaults__
        del named.__wrapped__
        cls.forward = named

    def __init__(self) -> None:
        super().__init__()
        self.warnings_issued: dict[str, bool] = {}  # transformers' Trainer keeps a list of its warnings here
        self._input_grad_hook: Any = None

    def asked(self, name: str, given: bool | None) -> bool:
        """The value of forward's argument `name`, or the configuration's where the caller gave None."""
        return bool(getattr(self.config, name) if given is None else given)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters; integer layers are not counted."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @property
    def base_model(self) -> Any:
        """The encoder: that attribute of a model with a head, else the model itself."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def own_family(self) -> Family:
        """The names of the model's family, as its configuration states it."""
        return FAMILIES.get(self.config.model_type, self.family)

    def find_lm_head(self) -> Any:
        """The masked-language head: the module that holds the decoder; None for a model without one."""
        path, decoder = self.family.lm_head
        try:
            head: Any = self.get_submodule(path)
        except AttributeError:
            return None
        return head if isinstance(getattr(head, decoder, None), nn.Module) else None

    def _decoder(self) -> Any:
        return getattr(self.find_lm_head(), self.family.lm_head[1])

    @property
    def name_or_path(self) -> str:
        """What `from_pretrained` was given."""
        return self.config.name_or_path

    @property
    def _tied_weights_keys(self) -> dict[str, str] | None:
        """As transformers 5 lists them; None where the model has no masked-language head."""
        return None if self.find_lm_head() is None else dict(self.family.tied)

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Aliases of tied tensors and the names that they share, where `config.tie_word_embeddings`."""
        return dict(self._tied_weights_keys or {}) if self.config.tie_word_embeddings else {}

    def can_generate(self) -> bool:
        """False: an encoder does not generate text."""
        return False

    # Embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings (V, E)."""
        table: nn.Embedding = self.base_model.embeddings.word_embeddings
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put a table (V', E) in the place of the word embeddings; `tie_weights` then makes a tied decoder share it.

        Raises:
            ValueError: a table of another width than embedding_size.
        """
        expected = self.config.word_embedding_size
        width = getattr(value, "embedding_dim", expected)
        if width != expected:
            raise ValueError(f"the table has rows of {width}, embedding_size is {expected}")
        self.base_model.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The decoder (V, E) of a masked-language head; None for other models."""
        return None if self.find_lm_head() is None else self._decoder()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put a Linear (E, V') in the place of the decoder; its bias becomes the head's.

        Raises:
            ValueError: the model has no masked-language head.
        """
        head = self.find_lm_head()
        if head is None:
            raise ValueError(f"{type(self).__name__} has no decoder")
        setattr(head, self.family.lm_head[1], new_embeddings)
        if hasattr(head, "bias") and isinstance(bias := getattr(new_embeddings, "bias", None), nn.Parameter):
            head.bias = bias

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Make the decoder share the word embeddings, where `config.tie_word_embeddings`; call it after replacing either.

        The bias is cut to the number of rows, or continued with zeros.
        """
        head = self.find_lm_head()
        if head is None or not self.config.tie_word_embeddings:
            return
        weight, decoder = self.get_input_embeddings().weight, self._decoder()
        decoder.weight = weight
        decoder.out_features = len(weight)
        owner = head if hasattr(head, "bias") else decoder  # some families' decoders have the only bias
        if len(owner.bias) != len(weight):
            padded = nn.functional.pad(owner.bias.detach(), (0, len(weight) - len(owner.bias)))
            owner.bias = nn.Parameter(padded, requires_grad=owner.bias.requires_grad)
        decoder.bias = owner.bias

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Give the word embeddings, and a masked-language head, room for `new_num_tokens` tokens.

        Rows are cut off, or added, at the end. New rows are drawn close to the mean of the old ones (their covariance
        times 1e-9), or, without `mean_resizing`, from N(0, initializer_range). Optimizers made before hold the old
        table: make them afterwards.

        Args:
            new_num_tokens: rows; None: as many as there are.
            pad_to_multiple_of: round the number of rows up to a multiple of it.
            mean_resizing: how new rows are drawn.

        Returns:
            The embedding, the same module as before.

        Raises:
            ValueError: a size that is not a positive integer.
        """
        words = self.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return words
        rows = words.weight.shape[0] if new_num_tokens is None else new_num_tokens
        for name, value in (("new_num_tokens", rows), ("pad_to_multiple_of", pad_to_multiple_of or 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        multiple = pad_to_multiple_of or 1
        rows = -(-rows // multiple) * multiple
        std = None if mean_resizing else self.config.initializer_range
        words.weight = _resized(words.weight, rows, std)
        words.num_embeddings = rows
        if words.padding_idx is not None and words.padding_idx >= rows:
            words.padding_idx = None
        head = self.find_lm_head()
        if head is not None:
            decoder = self._decoder()
            owner = head if hasattr(head, "bias") else decoder
            tied_bias = decoder.bias is owner.bias
            owner.bias = _resized(owner.bias, rows, None if mean_resizing else 0.0)
            if not self.config.tie_word_embeddings:
                decoder.weight = _resized(decoder.weight, rows, std)
                decoder.out_features = rows
                if tied_bias:
                    decoder.bias = owner.bias
                elif decoder.bias is not None:
                    decoder.bias = _resized(decoder.bias, rows, None if mean_resizing else 0.0)
        self.config.vocab_size = rows
        if self.base_model.config is not self.config:
            self.base_model.config.vocab_size = rows
        self.tie_weights()
        return words

    # Weights

    def post_init(self) -> None:
        """What a subclass calls at the end of its constructor: draws all weights anew and ties them."""
        self.init_weights()
        self.tie_weights()

    def init_weights(self) -> None:
        """Linear and Embedding weights from N(0, initializer_range), zero biases, a zero row for the pad token."""
        done = set[int]()
        for module in self.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, nn.Embedding)) and id(weight) not in done:
                done.add(id(weight))  # a decoder is tied to the embeddings, which come first
                self._init_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
            elif isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_config(cls, config: Any, **arguments: Any) -> Any:
        """A model with random weights: from a configuration, transformers' or this library's, or a dictionary.

        `dtype` (or `torch_dtype`) is obeyed, `attn_implementation` ignored; others are fields of the configuration.
        """
        bare = cls.base_model_prefix not in getattr(cls, "prefix", "")
        read = LoadArguments.sorted(bare, None, None, arguments | {"config": config})
        config = as_config(config, cls.config_class).replace(**read.changes)
        pooling = () if read.add_pooling_layer is None else (read.add_pooling_layer,)
        model: Any = cls(config, *pooling)  # type: ignore[call-arg]
        return model.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(read.precision)))

    _from_config = from_config

    # Sizes

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; shared ones count once, packed ones by their shapes, integer layers not at all."""
        tables = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        plain = sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and id(parameter) in tables)
        )
        return plain if only_trainable else plain + sum(math.prod(one.weight_shape()) for one in packed_in(self))

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, with `return_buffers`, of the buffers, which integer layers are."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)

    def estimate_tokens(self, input_dict: Mapping[str, Tensor]) -> int:
        """Number of ids in a batch, padding counted."""
        return input_dict[self.main_input_name].numel() if self.main_input_name in input_dict else 0

    def floating_point_ops(self, input_dict: Mapping[str, Tensor], exclude_embeddings: bool = True) -> int:
        """transformers' estimate of a training step: 6 x tokens x parameters. Layers that share weights count once."""
        return 6 * self.estimate_tokens(input_dict) * self.num_parameters(exclude_embeddings=exclude_embeddings)

    # Training

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """`execution.recompute = "layers"`: a backward computes layers again instead of keeping their states.

        Raises:
            ValueError: a model of `albert_fast.models.reference`, which keeps everything.
        """
        if not self.supports_gradient_checkpointing:
            raise ValueError(f"{type(self).__name__} of albert_fast.models.reference keeps everything for its backward")
        self.execution.recompute = "layers"

    def gradient_checkpointing_disable(self) -> None:
        """`execution.recompute = "nothing"`."""
        if self.supports_gradient_checkpointing:
            self.execution.recompute = "nothing"

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.supports_gradient_checkpointing and self.execution.recompute == "layers"

    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable
    is_activation_checkpointing = is_gradient_checkpointing

    @property
    def supports_gradient_checkpointing(self) -> bool:
        return hasattr(type(self.execution), "recompute")

    def enable_input_require_grads(self) -> None:
        """Let the embeddings' result require a gradient, so that it flows to adapters on a frozen model."""
        self.disable_input_require_grads()
        self._input_grad_hook = self.base_model.embeddings.register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        if self._input_grad_hook is not None:
            self._input_grad_hook.remove()
            self._input_grad_hook = None

    # The hub

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: Any = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, which is made if need be.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        try:
            import huggingface_hub
        except ImportError as error:
            raise ImportError("push_to_hub: pip install albert-fast[hub]") from error
        api = huggingface_hub.HfApi(token=token)
        repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)  # type: ignore[operator]
            return str(
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message or f"Upload {type(self).__name__}",
                )
            )


def _require_grad(_module: nn.Module, _given: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _resized(old: Tensor, rows: int, std: float | None) -> nn.Parameter:
    """`old` (V, E) or (V,) with `rows` rows: cut, or with new ones from N(0, std), or for None close to the old ones' mean."""
    kept = old.detach()[:rows]
    added = rows - len(kept)
    if added <= 0:
        return nn.Parameter(kept.clone(), requires_grad=old.requires_grad)
    known = old.detach().float().reshape(len(old), -1)
    if std is None:
        mean = known.mean(0)
        centred = known - mean
        values, directions = torch.linalg.eigh(_NEW_ROWS_VARIANCE * (centred.T @ centred) / len(known))
        noise = torch.randn(added, known.shape[1], device=old.device)
        new = mean + (noise * values.clamp(min=0).sqrt()) @ directions.T
    else:
        new = std * torch.randn(added, known.shape[1], device=old.device)
    new = new.reshape(added, *old.shape[1:]).to(old.dtype)
    return nn.Parameter(torch.cat([kept, new]), requires_grad=old.requires_grad)
