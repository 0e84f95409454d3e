"""A decoder-only transformers model that takes flat micro-batches and computes its loss in its head.

Shape letters: T tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from understudy.contracts import IGNORED, Batch, HiddenStates, LayerLoss, LossSum, TokenLoss
from understudy.devices.attention import Documents
from understudy.errors import UserError
from understudy.models.attention import isolating_documents
from understudy.models.decoding import Decoding
from understudy.models.head import LossHead
from understudy.models.layer_maps import LayerMaps
from understudy.models.layer_outputs import collecting_outputs
from understudy.models.prompted import Prompted

__all__ = ["LanguageModel"]


class LanguageModel(nn.Module):
    """`network` is a transformers causal language model whose output embedding is a `LossHead`.

    Parameter names are `network.` and the Hugging Face name. Call it as a module, so that strategies' hooks run.
    """

    network: PreTrainedModel
    prompt_embeddings: nn.Parameter | None
    """[P, H], in front of every document, where prompt tuning learns them."""
    distillation: LayerMaps | None
    """What is learned beside the model where hidden states are held to a teacher's."""

    def __init__(self, network: PreTrainedModel, document_limit: int | None) -> None:
        """`document_limit`: most tokens of one document, where positions beyond it do not exist or change the meaning
        of those before."""
        super().__init__()
        self.network = network
        self.document_limit = document_limit
        self.register_parameter("prompt_embeddings", None)
        self.register_module("distillation", None)

    def forward(
        self,
        batch: Batch | None,
        token_loss: TokenLoss | None = None,
        logits_at: Tensor | None = None,
        hidden_at: Tensor | None = None,
        texts: Decoding | None = None,
        *,
        layers: Sequence[int] = (),
        layer_loss: LayerLoss | None = None,
    ) -> LossSum | Tensor | HiddenStates:
        """With `token_loss`: its sum over the supervised positions of `batch`; with `layer_loss` that of it too, at its
        weight, and alone as the metric `hidden_states`. With `logits_at` [n] int64 instead: fp32 logits [n, V] at those
        tokens. With `hidden_at` [n] int64: hidden states there, those of decoder layers `layers` too. With `texts`,
        without a batch: fp32 logits [B, V] of the next token of each."""
        if texts is not None:
            return self.head.logits(texts.hidden(self.network, self.prompt_embeddings))
        assert batch is not None, "texts take its place"
        if hidden_at is not None:
            last, outputs = self._hidden(batch, hidden_at, layers)
            return HiddenStates(last, tuple(outputs[layer] for layer in layers))
        if token_loss is None:
            assert logits_at is not None, "one of the three says what to compute"
            return self.head.logits(self._hidden(batch, logits_at)[0])
        supervised = (batch.labels != IGNORED).nonzero().squeeze(1)
        hidden, outputs = self._hidden(batch, supervised, () if layer_loss is None else layer_loss.layers)
        loss, metrics = self.head(hidden, token_loss)
        if layer_loss is not None:
            assert self.distillation is not None, "it was put there before a strategy took the model"
            apart = self.distillation(outputs, layer_loss)
            loss, metrics = loss + layer_loss.weight * apart, {**metrics, "hidden_states": apart.detach()}
        return LossSum(loss, torch.tensor(len(supervised), device=loss.device), metrics)

    def _hidden(self, batch: Batch, at: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Final hidden states [n, H] at tokens `at` [n], and what `layers` put out there, by number."""
        if self.prompt_embeddings is None:
            offsets, positions = batch.document_offsets, batch.positions
            words: dict[str, Tensor] = {"input_ids": batch.tokens.unsqueeze(0)}
        else:
            prompted = Prompted.of(batch, len(self.prompt_embeddings))
            offsets, positions = prompted.document_offsets, prompted.positions
            embedded = self.network.get_input_embeddings()(batch.tokens)
            words = {"inputs_embeds": prompted.join(self.prompt_embeddings, embedded).unsqueeze(0)}
        documents = Documents.of(offsets, batch.tokens.device)
        if self.document_limit is not None and documents.longest > self.document_limit:
            raise UserError(
                f"a document of {documents.longest} tokens is longer than the {self.document_limit} positions this "
                f"model has; set data.max_length to at most {self.document_limit}."
            )
        rows = at if self.prompt_embeddings is None else prompted.rows.index_select(0, at)
        wanted = dict(enumerate(self.decoder_layers())) if layers else {}
        with isolating_documents(), collecting_outputs({layer: wanted[layer] for layer in layers}, rows) as outputs:
            output = self.network.base_model(
                **words, position_ids=positions.unsqueeze(0), use_cache=False, documents=documents
            )
        return output.last_hidden_state.squeeze(0).index_select(0, rows), outputs

    @property
    def head(self) -> LossHead:
        head = self.network.get_output_embeddings()
        assert isinstance(head, LossHead)
        return head

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.network.config

    def persistent_buffers(self) -> dict[str, Tensor]:
        """Constants that a few architectures keep in their checkpoints beside the parameters, by Hugging Face name.
        They are whole on every rank, are never trained, and belong in a saved model."""
        parameters = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.network.state_dict().items() if name not in parameters}

    def decoder_layers(self) -> list[nn.Module]:
        """The repeated blocks, in order: units to shard, to compile and to checkpoint."""
        lists = [module for module in self.network.modules() if isinstance(module, nn.ModuleList)]
        # Of a parameter that ZeRO-3 partitioned, only its `ds_numel` tells how large it is.
        sizes = [sum(getattr(p, "ds_numel", p.numel()) for p in layers.parameters()) for layers in lists]
        return list(lists[sizes.index(max(sizes))])

    def enable_activation_checkpointing(self, kind: Literal["full", "selective"]) -> None:
        """Each decoder layer recomputes its activations in the backward pass: all of them, or (selective) all but the
        outputs of matrix products and attention. Dropout draws the same again. Call it before layers are sharded."""

        def recompute(function: Any, *args: Any) -> Any:
            if kind == "full":
                return checkpoint(function, *args, use_reentrant=False)
            return checkpoint(function, *args, use_reentrant=False, context_fn=_selective_contexts)

        enable = getattr(self.network, "_set_gradient_checkpointing")  # noqa: B009  # the only one that takes a function
        enable(enable=True, gradient_checkpointing_func=recompute)

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles each decoder layer in place, names kept. One graph serves every length of micro-batch.

        Layers that are checkpointed are compiled part by part: the compiler takes a checkpoint only whole, and
        attention over documents is no part of a graph. Call it after `enable_activation_checkpointing`.
        """
        for layer in self.decoder_layers():
            checkpointed = getattr(layer, "gradient_checkpointing", False)
            for module in layer.children() if checkpointed else (layer,):
                module.compile(backend=backend, dynamic=True)


_aten = torch.ops.aten
_COSTLY = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._flash_attention_forward.default,
    _aten._efficient_attention_forward.default,
}


def _selective_contexts() -> Any:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kernel = operator in _COSTLY or operator.namespace in ("torch_attn", "flash_attn")
        return CheckpointPolicy.MUST_SAVE if kernel else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
